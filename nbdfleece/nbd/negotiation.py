"""The handshake phase: fixed newstyle negotiation as a state machine without I/O.

The driver's part::

    negotiation = Negotiation(catalogue, limits, tls=TlsMode.SELECTIVETLS)
    while negotiation.outcome is None:
        while data := negotiation.data_to_send():
            ...send it...
        ...receive some bytes, or end-of-file...
        negotiation.receive_data(received)       # or negotiation.receive_eof()
    while data := negotiation.data_to_send():
        ...send it...

``data_to_send`` is called until it returns nothing: replies are made as they are taken.
After :class:`StartTls` the driver does the TLS handshake and goes on with
:meth:`Negotiation.after_starttls`, which remembers nothing but the client flags.
"""
