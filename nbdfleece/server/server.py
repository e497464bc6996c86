"""The NBD server: exports, listeners, connections, and how they all end."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import struct
from collections.abc import Callable
from typing import Final

from ..export.export import Export, ExportTable
from ..nbd.export_info import ExportInfo
from ..nbd.negotiation import MayAccess
from ..nbd.outcomes import Negotiated, TlsMode
from .buffers import BufferPool
from .catalogue import Catalogue, ServedExport
from .channel import Channel, SocketChannel
from .connection import Connection
from .delegation import DelegatedClient, Deputy
from .limits import Limits
from .listener import Listener
from .polling import Polling
from .sessions import Session, SessionFactory
from .tls import Authorization, Authorizer, TlsChannel, TlsSettings
from .turns import Turns

logger = logging.getLogger("nbdfleece.server")

Client = Connection | DelegatedClient
"""Who is connected: served here, or by a deputy."""

LINGER_SECONDS: Final = 0.5
"""On shutting down, once all that was asked before is answered: how long what is on its way is
still answered (with ESHUTDOWN or ERR_SHUTDOWN)."""

CANCEL_SECONDS: Final = 5.0
"""How long cancelled requests may take to end before they are left behind."""

_ACCEPTS_MAX: Final = 64
"""Connections that are accepted in one go, before the others have their turn."""

_CLIENT_IS_LOST: Final = (
    *(errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENOPROTOOPT, errno.EOPNOTSUPP),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENONET),
)
"""What accept(2) says of the one client that it did not accept; the next may be all right."""

_ACCEPT_PAUSE_SECONDS: Final = 1.0


class NbdServer:
    """Serves the exports of a table; made and used inside a running event loop.

    Args:
        exports: What is served; may change at any time, see :meth:`close_export`.
        limits: What clients may take.
        tls: How to do TLS; None for not at all.
        authorization: Who may have which export; None for everybody all.
        sessions: Makes the exports that each connection has of its own; ``exports`` is then
            not looked at.
        deputy: Says who serves an export's clients in place of this server, if anybody.

    Attributes:
        connections: All that are open, those of deputies among them.
        exports: As given.
        connection_class: What serves one client; a subclass of the server may have another one.
    """

    connection_class: type[Connection] = Connection

    def __init__(
        self,
        exports: ExportTable,
        *,
        limits: Limits | None = None,
        tls: TlsSettings | None = None,
        authorization: Authorizer | None = None,
        sessions: SessionFactory | None = None,
        deputy: Callable[[Export], Deputy | None] = lambda export: None,
    ) -> None:
        self.exports = exports
        self.limits = limits or Limits()
        self.pool = BufferPool(self.limits.idle_buffer_bytes_max)
        is_single = self.limits.connections_max == 1
        self.catalogue = Catalogue(exports, self.limits.wire, is_single=is_single)
        self.tls_mode = tls.mode if tls is not None else TlsMode.NOTLS
        self._tls = tls
        self._authorization = authorization or Authorization()
        self._sessions = sessions
        self.deputy = deputy
        self.connections: dict[Client, None] = {}
        self._listeners: list[Listener] = []
        self._loop = asyncio.get_running_loop()
        self.turns = Turns(self._loop)
        self.polling = Polling(self._loop, self.limits.poll_seconds)
        self._watchers: list[asyncio.Event] = []
        self._is_holding_back = False
        self._left = asyncio.Event()

    # Listeners and connections.

    def add_listener(self, listener: Listener) -> None:
        """Accept clients; the listener is the server's from now on."""
        self._listeners.append(listener)
        self._loop.add_reader(listener.sock.fileno(), self._accept, listener)

    def remove_listener(self, listener: Listener) -> None:
        """Stop listening; connected clients stay."""
        self._listeners.remove(listener)
        self._loop.remove_reader(listener.sock.fileno())
        listener.close()

    @property
    def listeners(self) -> list[Listener]:
        """Where clients are accepted."""
        return list(self._listeners)

    def _accept(self, listener: Listener) -> None:
        for _ in range(_ACCEPTS_MAX):
            if self.limits.excess_waits and len(self.connections) >= self.limits.connections_max:
                self._hold_back()
                return
            try:
                sock, address = listener.sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _CLIENT_IS_LOST:
                    continue
                self._pause_accepting(listener, error)
                return
            self._accept_socket(sock, address)

    def _accept_socket(self, sock: socket.socket, address: object) -> None:
        peer = _describe_peer(sock, address)
        if len(self.connections) >= self.limits.connections_max:
            logger.warning(
                "%s: connection refused: %d are open, the limit",
                peer,
                self.limits.connections_max,
            )
            sock.close()
            return
        try:
            channel = SocketChannel(sock, peer)
        except OSError as error:
            logger.info("%s: connection lost: %s", peer, error)
            sock.close()
            return
        self.add_channel(channel)

    def _hold_back(self) -> None:
        """Accept nobody until a connection ends."""
        self._is_holding_back = True
        for listener in self._listeners:
            self._loop.remove_reader(listener.sock.fileno())

    def _pause_accepting(self, listener: Listener, error: OSError) -> None:
        """Out of descriptors, as a rule: the listener would call us again at once, for ever."""
        logger.error("cannot accept on %s: %s; trying again soon", listener.name, error.strerror)
        self._loop.remove_reader(listener.sock.fileno())
        self._loop.call_later(_ACCEPT_PAUSE_SECONDS, self._accept_again, listener)

    def _accept_again(self, listener: Listener) -> None:
        if listener in self._listeners:
            self._loop.add_reader(listener.sock.fileno(), self._accept, listener)

    def add_channel(self, channel: Channel) -> Connection:
        """Serve one client on a channel that is connected already."""
        connection = self.add(channel)
        connection.start()
        return connection

    def add(self, channel: Channel) -> Connection:
        """A connection that begins once it is told to."""
        connection = self.connection_class(self, channel)
        self.connections[connection] = None
        logger.debug("%s: connected", channel.peer)
        return connection

    # What connections ask for.

    def may_access(self, connection: Connection) -> MayAccess:
        """The check of what this client may have."""

        def check(info: ExportInfo) -> str | None:
            refusal = self._authorization.refusal(info.name, connection.identity)
            if refusal is None and isinstance(info, ServedExport):
                refusal = _check_connections(info.export)
            return refusal

        return check

    def new_session(self, connection: Connection) -> Session | None:
        """The connection's own exports, if that is how exports are found here."""
        return None if self._sessions is None else self._sessions(connection)

    def start_tls(self, channel: Channel) -> Channel:
        """TLS over a channel."""
        assert self._tls is not None, "negotiation offers no TLS without settings"
        return TlsChannel(channel, self._tls.credentials)

    def open_export(self, connection: Connection, export: Export) -> str | None:
        """Note that a connection uses an export, unless it was closed or filled a moment ago."""
        is_shared = connection.session is None
        if is_shared and all(offered is not export for offered in self.exports):
            return f"export '{export.name}' is no longer served"
        refusal = _check_connections(export)
        if refusal is None:
            export.connections += 1
        return refusal

    def hand_over(
        self, connection: Connection, sock: socket.socket, negotiated: Negotiated, to: Deputy
    ) -> str | None:
        """Have a deputy serve the client of a connection, unless its export was closed or filled.

        The connection is to be released when this returns.
        """
        assert isinstance(negotiated.export, ServedExport)
        export = negotiated.export.export
        refusal = self.open_export(connection, export)
        if refusal is not None:
            return refusal
        client = DelegatedClient(self, to, export, connection.peer)
        try:
            to.serve(client, sock, negotiated)
        except OSError as error:
            export.connections -= 1
            return f"cannot be handed over: {error.strerror}"
        self.connections[client] = None
        return None

    def drained(self, connection: Client) -> None:
        """Note that a connection has nothing left to finish."""
        self._wake_watchers()

    def closed(self, connection: Client) -> None:
        """Note that a connection is over."""
        del self.connections[connection]
        if connection.session is not None:
            connection.session.end()
        if connection.export is not None:
            connection.export.connections -= 1
            if not self.connections:
                self._left.set()
        if isinstance(connection, Connection):
            logger.debug("%s: closed: %s", connection.peer, connection.statistics)
        if self._is_holding_back:
            self._is_holding_back = False
            for listener in self._listeners:
                self._accept_again(listener)
        self._wake_watchers()

    def _wake_watchers(self) -> None:
        for watcher in self._watchers:
            watcher.set()

    # The end.

    async def close_export(
        self, name: str, *, hard: bool = False, grace_seconds: float = 10.0
    ) -> None:
        """Stop serving an export; on return nothing uses its node any more.

        Args:
            name: The export, which is taken from the table if it is still there.
            hard: Close its clients at once; otherwise what they have in flight is finished.
            grace_seconds: How long that may take before they are closed all the same.
        """
        export = self.exports.find(name)
        if export is not None and export.name == name:
            self.exports.remove(name)
        clients = [
            connection
            for connection in self.connections
            if connection.export is not None and connection.export.name == name
        ]
        reason = f"export '{name}' is no longer served"
        await self._end(clients, reason, 0.0 if hard else grace_seconds)

    async def shut_down(self, grace_seconds: float = 10.0) -> None:
        """Stop listening, let clients finish, close them all.

        Args:
            grace_seconds: How long what is in flight may take before it is cancelled.
        """
        for listener in self.listeners:
            self.remove_listener(listener)
        await self._end(list(self.connections), "the server is shutting down", grace_seconds)

    async def _end(self, clients: list[Client], reason: str, grace_seconds: float) -> None:
        """End connections: refuse what is new and finish what is not, and in the end cancel.

        None is closed before all have finished: as long as it takes, each is told why (rule 8).
        """
        if grace_seconds > 0:
            await self._finish(clients, reason, self._loop.time() + grace_seconds)
        for connection in self._still_open(clients):
            connection.abort(f"{reason}, and {grace_seconds:g} s of grace are over")
        await self._wait_closed(clients, CANCEL_SECONDS)
        for connection in self._still_open(clients):
            logger.error("%s: its requests do not end", connection.peer)

    async def _finish(self, clients: list[Client], reason: str, deadline: float) -> None:
        for connection in clients:
            connection.shut_down(reason)
        await self._wait_until(
            lambda: not any(connection.is_draining for connection in self._still_open(clients)),
            deadline - self._loop.time(),
        )
        await self._wait_closed(clients, min(LINGER_SECONDS, deadline - self._loop.time()))
        for connection in self._still_open(clients):
            connection.finish(reason)
        await self._wait_closed(clients, deadline - self._loop.time())

    def _still_open(self, clients: list[Client]) -> list[Client]:
        return [connection for connection in clients if connection in self.connections]

    async def _wait_closed(self, clients: list[Client], seconds: float) -> None:
        """Wait until all of the clients are closed, or the time is over."""
        await self._wait_until(lambda: not self._still_open(clients), seconds)

    async def _wait_until(self, condition: Callable[[], bool], seconds: float | None) -> None:
        """Wait until something has become true of the connections, or the time is over."""
        changed = asyncio.Event()
        self._watchers.append(changed)
        try:
            async with asyncio.timeout(None if seconds is None else max(seconds, 0)):
                while not condition():
                    changed.clear()
                    await changed.wait()
        except TimeoutError:
            return
        finally:
            self._watchers.remove(changed)

    async def wait_left(self) -> None:
        """Wait until a client that had opened an export leaves as the last of all."""
        await self._left.wait()

    async def wait_idle(self) -> None:
        """Wait until no client is connected."""
        await self._wait_until(lambda: not self.connections, None)

    async def wait_closed(self, connection: Client) -> None:
        """Wait until one connection is over."""
        await self._wait_until(lambda: connection not in self.connections, None)


def _check_connections(export: Export) -> str | None:
    """Why an export has room for no more clients, or None if it has."""
    if export.connections_max is None or export.connections < export.connections_max:
        return None
    return f"export '{export.name}': {export.connections} clients have it open, the limit"


def _describe_peer(sock: socket.socket, address: object) -> str:
    """Who is at the other end, for the log."""
    if sock.family == socket.AF_UNIX:
        packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, _ = struct.unpack("3i", packed)
        return f"unix:pid={pid},uid={uid}"
    if isinstance(address, tuple) and len(address) >= 2:
        host, port = address[0], address[1]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    return str(address)
