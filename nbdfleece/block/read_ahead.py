"""Asking the disk for what a cold stream will read next.

The kernel reads ahead by itself, but in the thread that reads: asking with ``RWF_NOWAIT``
starts it in the loop's thread, 0.6 ms at a time where the kernel's window is large, and
streams of several connections through one descriptor mislead it. So the large reads that follow
one another are followed here, and a thread asks for what comes after them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Final

AHEAD_BYTES: Final = 8 << 20
"""So far ahead of a stream the disk is asked, a quarter of it at a time, and never for more than
has been read of the stream."""

STREAMS_MAX: Final = 16
"""Streams of one file that are followed; above it the one is forgotten that was silent longest."""

_PIECE_BYTES: Final = 512 << 10
"""What is asked for at once: the kernel leaves out what is more than one request to the disk."""

Ask = Callable[[int, int], asyncio.Future[None]]
"""Has a thread ask the disk for the bytes ``[begin, end)``."""


class ReadAhead:
    """The cold streams of one file.

    A stream begins with a read that had to wait for the disk, and goes on with each that
    begins where the last one ended.

    Attributes:
        asking: The thread's work; None if it has none. There is one at a time.
        streams: By where the next read of a stream begins: up to where the disk was asked, and
            the bytes that were read of the stream.
    """

    __slots__ = ("_ask", "asking", "streams")

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self.asking: asyncio.Future[None] | None = None
        self.streams: dict[int, tuple[int, int]] = {}

    def begin(self, offset: int, end: int) -> None:
        """The read of ``[offset, end)`` was cold: a stream begins, if none has gone on with it."""
        if end in self.streams:
            return
        if len(self.streams) >= STREAMS_MAX:
            del self.streams[next(iter(self.streams))]
        self.streams[end] = end, end - offset

    def follow(self, offset: int, end: int) -> None:
        """A read of ``[offset, end)`` begins: if a stream goes on with it, ask for what follows."""
        stream = self.streams.pop(offset, None)
        if stream is None:
            return
        asked, length = stream
        length += end - offset
        ahead = min(AHEAD_BYTES, length)
        if self.asking is None and asked - end <= ahead - ahead // 4:
            self.asking = self._ask(max(asked, end), end + ahead)
            self.asking.add_done_callback(self._end)
            asked = end + ahead
        self.streams[end] = asked, length

    def _end(self, asking: asyncio.Future[None]) -> None:
        self.asking = None


def will_need(fd: int, begin: int, end: int) -> None:
    """Have the kernel read ``[begin, end)`` of a file into the page cache; a hint, no more."""
    with contextlib.suppress(OSError):
        for at in range(begin, end, _PIECE_BYTES):
            os.posix_fadvise(fd, at, min(_PIECE_BYTES, end - at), os.POSIX_FADV_WILLNEED)
