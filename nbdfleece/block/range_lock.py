"""Mutual exclusion by byte range, free of cost where nothing overlaps.

Holders are the operations that are *suspended* while they own a range: an
operation that runs to its end without awaiting cannot be interleaved and need
only ask :meth:`RangeLock.is_free`.
"""

from __future__ import annotations

import asyncio


class RangeLock:
    """Exclusive locks on half-open byte ranges, granted in the order of their request.

    A request waits for every overlapping range that is held or was asked for
    earlier, so no request starves.
    """

    __slots__ = ("_ranges",)

    def __init__(self) -> None:
        self._ranges: list[HeldRange] = []

    def is_free(self, offset: int, end: int) -> bool:
        """Whether no held or awaited range overlaps ``[offset, end)``."""
        for held in self._ranges:
            if held.offset < end and offset < held.end:
                return False
        return True

    def hold(self, offset: int, end: int) -> HeldRange:
        """The range ``[offset, end)`` as an asynchronous context manager."""
        return HeldRange(self, offset, end)

    @property
    def is_idle(self) -> bool:
        """Whether no range is held or awaited."""
        return not self._ranges


class HeldRange:
    """One range of a :class:`RangeLock`, held inside ``async with``."""

    __slots__ = ("_lock", "_waiters", "end", "offset")

    def __init__(self, lock: RangeLock, offset: int, end: int) -> None:
        self._lock = lock
        self._waiters: list[asyncio.Future[None]] = []
        self.offset = offset
        self.end = end

    async def __aenter__(self) -> HeldRange:
        ranges = self._lock._ranges
        if not ranges:
            ranges.append(self)
            return self
        earlier = [held for held in ranges if held.offset < self.end and self.offset < held.end]
        ranges.append(self)
        try:
            for held in earlier:
                while held in ranges:
                    waiter = asyncio.get_running_loop().create_future()
                    held._waiters.append(waiter)
                    await waiter
        except BaseException:
            self._release()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        self._lock._ranges.remove(self)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
