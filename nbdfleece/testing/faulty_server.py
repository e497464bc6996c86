"""The real server, with a place for faults between the wire and the disk."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..export.export import ExportTable
from ..extents import Extents
from ..nbd.constants import Command, Error
from ..nbd.outcomes import Negotiated
from ..nbd.replies import Replies
from ..nbd.requests import Request
from ..server.channel import Channel
from ..server.connection import Connection
from ..server.inbox import Inbox
from ..server.limits import Limits
from ..server.server import NbdServer
from ..server.transmission import Transmission
from .faults import BadMagic, Delay, Drop, Fail, Fault, FaultList, Lie, Lying, WrongCookie

_Handler = Callable[..., Coroutine[Any, Any, None]]


class Seen(NamedTuple):
    """A request that the server has carried out, or has met a fault with."""

    command: Command
    offset: int
    length: int
    flags: int


class FaultyReplies(Replies):
    """Other replies, spoiled where the request is befallen by a fault.

    Args:
        inner: The replies.
        negotiated: What the handshake ended with.

    Attributes:
        faults: Of the requests in work, by cookie.
    """

    __slots__ = ("_contexts", "_inner", "_size", "chunked", "faults")

    def __init__(self, inner: Replies, negotiated: Negotiated) -> None:
        self._inner = inner
        self._size = negotiated.export.size
        self._contexts = {each.context_id: each.name for each in negotiated.contexts}
        self.chunked = inner.chunked
        self.faults: dict[int, list[Fault]] = {}

    def _spoil(self, request: Request, message: bytes) -> bytes:
        for fault in self.faults.get(request.cookie, ()):
            if isinstance(fault, WrongCookie | BadMagic):
                message = fault.spoil(message)
        return message

    def data(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """See :class:`Replies`."""
        return self._spoil(request, self._inner.data(request, offset, length, done=done))

    def hole(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """See :class:`Replies`."""
        return self._spoil(request, self._inner.hole(request, offset, length, done=done))

    def success(self, request: Request) -> bytes:
        """See :class:`Replies`."""
        return self._spoil(request, self._inner.success(request))

    def error(self, request: Request, error: int, text: str) -> bytes:
        """See :class:`Replies`."""
        return self._spoil(request, self._inner.error(request, error, text))

    def error_at(
        self, request: Request, error: Error, text: str, offset: int, *, done: bool
    ) -> bytes:
        """See :class:`Replies`."""
        message = self._inner.error_at(request, error, text, offset, done=done)
        return self._spoil(request, message)

    def block_status(
        self, request: Request, context_id: int, extents: Extents, *, done: bool
    ) -> bytes:
        """See :class:`Replies`; the extents may be no truth."""
        pack = partial(self._inner.block_status, request, context_id)
        lies = [
            fault
            for fault in self.faults.get(request.cookie, ())
            if isinstance(fault, Lying) and fault.context in (None, self._contexts[context_id])
        ]
        if not lies:
            return self._spoil(request, pack(extents, done=done))
        pairs = extents.pairs()
        for lie in lies:
            pairs = lie.distort(request.offset, request.length, pairs, self._size)
        told = Extents(  # as it is: nothing is merged
            np.array([length for length, _ in pairs], dtype=np.int64),
            np.array([status for _, status in pairs], dtype=np.uint32),
        )
        again = any(lie.how is Lie.OVERLAPPING for lie in lies)
        before = self._spoil(request, pack(told, done=False)) if again else b""
        return before + self._spoil(request, pack(told, done=done))


class FaultyTransmission(Transmission):
    """The transmission phase, where faults befall requests."""

    def __init__(self, negotiated: Negotiated, host: FaultyConnection, limits: Limits) -> None:
        super().__init__(negotiated, host, limits)
        self._connection = host
        self._server = host.server
        self._handlers = {
            command: partial(self._handle_faulty, handler)
            for command, handler in self._handlers.items()
        }
        self._begin_read = partial(self._handle_faulty, self._reads.answer)

    def _new_replies(self, negotiated: Negotiated) -> Replies:
        self._faulty = FaultyReplies(super()._new_replies(negotiated), negotiated)
        return self._faulty

    def _write_at_once(self, request: Request, inbox: Inbox) -> bool:
        """No request passes the faults by."""
        return False

    async def _handle_faulty(
        self, handler: _Handler, request: Request, *payload: memoryview
    ) -> None:
        seen = Seen(Command(request.command), request.offset, request.length, request.flags)
        self._server.seen.append(seen)
        faults = self._server.faults.for_request(*seen[:3])
        for fault in faults:
            if isinstance(fault, Delay):
                await asyncio.sleep(fault.seconds)
        if any(isinstance(fault, Drop) for fault in faults):
            await asyncio.sleep(0)  # not while the connection is handling what it has received
            self._connection.abort("a fault of the test server")
            return
        self._faulty.faults[request.cookie] = faults
        try:
            for fault in faults:
                if isinstance(fault, Fail):
                    self.statistics.errors += 1
                    self._outbox.put(self._replies.error(request, fault.error, fault.text))
                    return
            await handler(request, *payload)
        finally:
            self._faulty.faults.pop(request.cookie, None)


class CutChannel:
    """Another channel, closed when it has sent so many bytes."""

    def __init__(self, channel: Channel, bytes_left: int) -> None:
        self._channel = channel
        self._bytes_left = bytes_left
        self.reader_fd, self.writer_fd = channel.reader_fd, channel.writer_fd
        self.peer, self.identity = channel.peer, channel.identity
        self.recv_into, self.has_pending = channel.recv_into, channel.has_pending
        self.send_own, self.finish = channel.send_own, channel.finish
        self.discard, self.close = channel.discard, channel.close

    def sendmsg(self, views: list[memoryview], /) -> int:
        """Send what may still be sent.

        Raises:
            ConnectionResetError: All of it is sent.
            OSError: As the other channel.
        """
        if self._bytes_left:
            sent = self._channel.sendmsg(_first(views, self._bytes_left))
            self._bytes_left -= sent
        if not self._bytes_left:
            raise ConnectionResetError(errno.ECONNRESET, "cut by a fault of the test server")
        return sent


def _first(views: list[memoryview], count: int) -> list[memoryview]:
    """The first bytes of all views together."""
    found: list[memoryview] = []
    for view in views:
        found.append(view[:count])
        count -= len(found[-1])
        if not count:
            break
    return found


class FaultyConnection(Connection):
    """One client of a :class:`FaultyServer`."""

    transmission_class = FaultyTransmission

    def __init__(self, host: FaultyServer, channel: Channel) -> None:
        self.server = host
        super().__init__(host, channel)


class FaultyServer(NbdServer):
    """The server.

    Args:
        exports: What is served.
        faults: May be changed at any time.

    Attributes:
        seen: The requests, in the order in which they were begun.
    """

    connection_class = FaultyConnection

    def __init__(self, exports: ExportTable, faults: FaultList) -> None:
        super().__init__(exports)
        self.faults = faults
        self.seen: list[Seen] = []

    def add_channel(self, channel: Channel) -> Connection:
        """Serve one client, perhaps not to its end."""
        at_byte = self.faults.cut_for_connection()
        return super().add_channel(channel if at_byte is None else CutChannel(channel, at_byte))
