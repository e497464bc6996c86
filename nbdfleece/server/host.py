"""What a connection needs of its server."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Protocol

from ..export.export import Export
from ..nbd.negotiation import MayAccess
from ..nbd.outcomes import Negotiated, TlsMode
from .buffers import BufferPool
from .catalogue import Catalogue
from .channel import Channel
from .delegation import Deputy
from .limits import Limits
from .polling import Polling
from .sessions import Session
from .turns import Turns

if TYPE_CHECKING:
    from .connection import Connection


class Host(Protocol):
    """See :class:`~.server.NbdServer`."""

    limits: Limits
    pool: BufferPool
    turns: Turns
    polling: Polling
    catalogue: Catalogue
    tls_mode: TlsMode

    def may_access(self, connection: Connection) -> MayAccess:
        """The check of what this client may have."""

    def new_session(self, connection: Connection) -> Session | None:
        """The connection's own view of what is served; None if it sees what all see."""

    def start_tls(self, channel: Channel) -> Channel:
        """TLS over a channel, as the server's side."""

    def deputy(self, export: Export) -> Deputy | None:
        """Who serves an export's clients in place of the server; None for nobody."""

    def hand_over(
        self, connection: Connection, sock: socket.socket, negotiated: Negotiated, to: Deputy
    ) -> str | None:
        """The deputy serves the client from now on; says why not, if nobody must."""

    def open_export(self, connection: Connection, export: Export) -> str | None:
        """The connection's transmission phase begins; says why not, if it must not."""

    def drained(self, connection: Connection) -> None:
        """What was asked before :meth:`Connection.shut_down` is answered."""

    def closed(self, connection: Connection) -> None:
        """The connection is over and nothing of it is left."""
