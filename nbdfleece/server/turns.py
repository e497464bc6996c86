"""Whose turn it is among the connections that have more to do than fits in one.

Between two looks at the sockets the loop takes **one** turn of one such connection, and
they take theirs one after the other. So a client that asks for a little waits for one turn
of the others at most, however many of them stream (rule 5). Each look costs some
microseconds, a turn some hundred.

A *busy* client asks for little, but for several things at a time: it is after throughput, and
would have a turn after each of a stream's. Beside streams it waits, for :data:`STREAM_TURNS` of
their turns at most, however many they are.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

REQUEST_COST: Final = 4096
"""What a request counts for at least in its connection's turn, in bytes."""

STATUS_TURN_COST: Final = 512 << 10
"""What a block status counts for in its connection's turn, in bytes: to search a context of many
extents takes as long as to read about so much."""

BUSY_REQUESTS: Final = 3
"""So many requests in one turn make a client busy."""

STREAM_TURNS: Final = 5
"""Turns of those who stream before all who are busy have theirs: half a millisecond, about."""

COPIES_PER_SENDFILE: Final = 8
"""So much more do the two copies of other data cost: 25 to 200 us for 256 KiB."""


class Turn:
    """A place in the queue."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Do not take it."""
        self.callback = None


class Turns:
    """The queues of one server.

    Args:
        loop: Runs the turns. It looks at the sockets before a callback that it is given while
            it runs others; what it finds is called before that by uvloop, after it by asyncio.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._streams: deque[Turn] = deque()
        self._busy: deque[Turn] = deque()
        self._streams_left = STREAM_TURNS
        self._busy_left = 0

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for a turn, or has one."""
        return not (self._streams or self._busy)

    def add(self, callback: Callable[[], None]) -> Turn:
        """Have ``callback`` called when all who wait have had their turn."""
        return self._add(self._streams, callback)

    def add_busy(self, callback: Callable[[], None]) -> Turn:
        """The same for a busy client."""
        return self._add(self._busy, callback)

    async def next(self) -> None:
        """Wait until all who wait have had their turn."""
        waiter = self._loop.create_future()

        def begin() -> None:
            if not waiter.done():
                waiter.set_result(None)

        self.add(begin)
        await waiter

    def _add(self, queue: deque[Turn], callback: Callable[[], None]) -> Turn:
        if self.is_idle:
            self._loop.call_soon(self._take)
        turn = Turn(callback)
        queue.append(turn)
        return turn

    def _take(self) -> None:
        """Take one turn; the next one comes after the next look at the sockets."""
        queue = self._next_queue()
        callback = queue[0].callback
        try:
            if callback is not None:
                callback()
        finally:
            queue.popleft()
            if not self.is_idle:
                self._loop.call_soon(self._take)

    def _next_queue(self) -> deque[Turn]:
        """Whose turn it is: in each round those who are busy when it begins, then streams."""
        if not self._busy_left and not (self._streams and self._streams_left):
            self._busy_left, self._streams_left = len(self._busy), STREAM_TURNS
        if self._busy_left:
            self._busy_left -= 1
            return self._busy
        self._streams_left -= 1
        return self._streams
