"""Whose turn it is among the connections that have more to do than fits in one.

Between two looks at the sockets the loop takes **one** turn of one such connection, and
they take theirs one after the other. So a client that asks for a little waits for one turn
of the others at most, however many of them stream (rule 5). Each look costs some
microseconds, a turn some hundred.
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
    """The queue of one server.

    Args:
        loop: Runs the turns. It looks at the sockets before a callback that it is given while
            it runs others; what it finds is called before that by uvloop, after it by asyncio.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: deque[Turn] = deque()

    def add(self, callback: Callable[[], None]) -> Turn:
        """Have ``callback`` called when all who wait have had their turn."""
        if not self._queue:
            self._loop.call_soon(self._take)
        turn = Turn(callback)
        self._queue.append(turn)
        return turn

    def _take(self) -> None:
        """Take one turn; the next one comes after the next look at the sockets."""
        while self._queue and self._queue[0].callback is None:
            self._queue.popleft()
        if not self._queue:
            return
        callback = self._queue[0].callback
        assert callback is not None
        try:
            callback()
        finally:
            self._queue.popleft()
            if self._queue:
                self._loop.call_soon(self._take)
