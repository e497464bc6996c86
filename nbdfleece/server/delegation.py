"""Clients that another process serves.

The server negotiates with every client, and knows then which export it wants. If that has a
**deputy**, the client's socket goes there. For the server it stays one of its clients: it
counts, and it is told to end when its export does.

Only what has a socket without TLS can be handed over: what TLS has agreed on stays where it was.
"""

from __future__ import annotations

import socket
from itertools import count
from typing import Literal, Protocol

from ..export.export import Export
from ..nbd.outcomes import Negotiated

Ending = Literal["shut_down", "finish", "abort"]
"""How a client is ended, by the name of :class:`~.connection.Connection`'s method."""


_numbers = count()


class Deputy(Protocol):
    """Another process, which serves the clients of some exports."""

    def serve(
        self, client: DelegatedClient, sock: socket.socket, negotiated: Negotiated, /
    ) -> None:
        """Take a client over.

        Args:
            client: To be told when it has ended.
            sock: Its socket, which stays the caller's to close.
            negotiated: What it has agreed on with the server.

        Raises:
            OSError: There is no descriptor left for it.
        """

    def end(self, client: DelegatedClient, how: Ending, reason: str, /) -> None:
        """End a client."""


class Host(Protocol):
    """What a delegated client needs of its server."""

    def drained(self, client: DelegatedClient, /) -> None:
        """It has nothing left to finish."""

    def closed(self, client: DelegatedClient, /) -> None:
        """It is over."""


class DelegatedClient:
    """A client of a deputy; to the server what a :class:`~.connection.Connection` is.

    Args:
        host: The server.
        deputy: Who serves it.
        export: What it has open.
        peer: Who it is, for the log.

    Attributes:
        number: No other client of this server's process has or had it.
        is_draining: It is shutting down, and not all is answered that was asked before.
    """

    session = None

    def __init__(self, host: Host, deputy: Deputy, export: Export, peer: str) -> None:
        self._host = host
        self._deputy = deputy
        self.export = export
        self.peer = peer
        self.number = next(_numbers)
        self.is_draining = False

    def shut_down(self, reason: str) -> None:
        """Refuse what is asked from now on."""
        self.is_draining = True
        self._deputy.end(self, "shut_down", reason)

    def finish(self, reason: str) -> None:
        """Finish what is in flight, send all replies, close."""
        self._deputy.end(self, "finish", reason)

    def abort(self, reason: str) -> None:
        """Close at once; what is in flight is cancelled."""
        self._deputy.end(self, "abort", reason)

    def drained(self) -> None:
        """All is answered that was asked before :meth:`shut_down`."""
        self.is_draining = False
        self._host.drained(self)

    def closed(self) -> None:
        """The client is over."""
        self._host.closed(self)
