"""A conformance suite for NBD servers: any server, any transport, numbered requirements.

The client in :mod:`conformance.client` is the suite's own. It shares nothing with
:mod:`nbdfleece.nbd`, so that a mistake in one cannot hide in the other.
"""
