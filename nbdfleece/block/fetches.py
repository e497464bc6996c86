"""Cold ranges of a file that threads bring into the page cache, those of a stream together.

A client that streams asks for more than the disk has ready, so that most of its requests have
to wait. If each had a thread, starting those, and handing Python's lock to and fro, would cost the
loop's thread more than to send the bytes, and one stream would fill the pool. So a range that
begins where one ends that is being fetched belongs to the same *run*. A few threads work for
a run; what comes while they are busy waits, and is fetched in parts that each wake the loop
once. Reads in no order are runs of one range, and have a thread each.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from .threads import finished

RUN_THREADS_MAX: Final = 4
"""Threads that work for one run: with fewer, a disk of which the kernel reads no more than 128 KiB
ahead is slower than with a thread for each request."""

PART_BYTES: Final = 2 << 20
"""Ranges that wait are fetched together until they come to this."""

Range = tuple[int, int]
"""Offset and length."""

Begin = Callable[[list[Range]], asyncio.Future[None]]
"""Has a thread bring ranges into the page cache, one after the other."""


class Fetches:
    """What is being fetched of one file.

    Args:
        begin: Puts a thread to work.

    Attributes:
        runs: By where the last range of each ends.
    """

    __slots__ = ("begin", "runs")

    def __init__(self, begin: Begin) -> None:
        self.begin = begin
        self.runs: dict[int, _Run] = {}

    async def fetch(self, ranges: list[Range]) -> None:
        """Wait until ranges have been fetched, also when cancelled.

        Raises:
            OSError: They could not be read, or others with which they were fetched.
        """
        offset, length = ranges[-1]
        run = self.runs.pop(ranges[0][0], None) or _Run(self)
        run.end = offset + length
        self.runs[run.end] = run
        await finished(run.add(ranges))


class _Part:
    """Ranges that one thread fetches, and what their callers wait for."""

    __slots__ = ("bytes", "fetched", "ranges")

    def __init__(self) -> None:
        self.bytes = 0
        self.ranges: list[Range] = []
        self.fetched: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class _Run:
    """Ranges that follow one another. It ends when no thread works for it."""

    __slots__ = ("_fetches", "_threads", "_waiting", "end")

    def __init__(self, fetches: Fetches) -> None:
        self.end = 0
        self._fetches = fetches
        self._threads = 0
        self._waiting: deque[_Part] = deque()

    def add(self, ranges: list[Range]) -> asyncio.Future[None]:
        """Have ranges fetched, at once or with others; returns what ends when they have been."""
        if not self._waiting or self._waiting[-1].bytes >= PART_BYTES:
            self._waiting.append(_Part())
        part = self._waiting[-1]
        part.ranges += ranges
        part.bytes += sum(length for _, length in ranges)
        if self._threads < RUN_THREADS_MAX:
            self._start()
        return part.fetched

    def _start(self) -> None:
        part = self._waiting.popleft()
        self._threads += 1
        self._fetches.begin(part.ranges).add_done_callback(partial(self._end, part.fetched))

    def _end(self, fetched: asyncio.Future[None], job: asyncio.Future[None]) -> None:
        """A thread has ended: give it the next part, and wake who waited for this one."""
        self._threads -= 1
        if self._waiting:
            self._start()
        elif not self._threads and self._fetches.runs.get(self.end) is self:
            del self._fetches.runs[self.end]
        if (error := job.exception()) is None:
            fetched.set_result(None)
        else:
            fetched.set_exception(error)
