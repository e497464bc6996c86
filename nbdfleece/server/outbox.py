"""Replies on their way out: filled in place, sent together.

Replies are built one behind the other in a pooled buffer, header and data where
they will be sent from::

    buffer, start = outbox.reserve(28 + length)     # place for header and data
    ...read into buffer.view, perhaps waiting, then pack the header...
    outbox.commit(buffer, start, start + 28 + length)

What is committed next to the last reply in the same buffer becomes one segment
with it, so that 32 small replies are one piece of memory for the kernel. When
everything in the current buffer has been sent, it goes back to the pool, which
hands out what came back last: clients that keep up are all served out of the
same few hundred KiB, which stay in the processor's cache.

Bytes that hold still in a file are queued as such (:meth:`Outbox.put_file`), where the
channel can send files, and never copied.

A reserved place counts as one use of its buffer until it has been sent,
discarded, or the outbox is closed.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Final, Protocol

from ..block.stable import StableFile, StablePlace
from ..nbd.limits import MIB
from .buffers import Buffer, BufferPool

ARENA_BYTES: Final = 1 * MIB
"""Size of the buffers that replies are built in; a larger reply has a buffer of its own."""

SEGMENTS_MAX: Final = 1024
"""IOV_MAX of Linux: so many pieces fit in one sendmsg(2)."""


class Sender(Protocol):
    """Where replies go."""

    def sendmsg(self, views: list[memoryview], /) -> int:
        """Send what can be sent without waiting.

        Returns:
            The bytes that were taken, at least one.

        Raises:
            BlockingIOError: None can be taken now.
            OSError: The connection is broken.
        """


SendFile = Callable[[int, int, int], int]
"""Sends a part of a file, ``(fd, offset, length)``, as :meth:`Sender.sendmsg` sends memory."""


class Segment:
    """Consecutive bytes of one buffer that wait to be sent, and the places they consist of."""

    __slots__ = ("buffer", "end", "places", "start")

    def __init__(self, buffer: Buffer, start: int, end: int) -> None:
        self.buffer = buffer
        self.start = start
        self.end = end
        self.places = 1

    @property
    def view(self) -> memoryview:
        """The bytes."""
        return self.buffer.view[self.start : self.end]

    def release(self) -> None:
        """Drop the uses of the buffer."""
        self.buffer.release(self.places)


class FileSegment:
    """Bytes of a file that wait to be sent; they hold still (rule 1)."""

    __slots__ = ("end", "file", "start")

    def __init__(self, file: StableFile, start: int, end: int) -> None:
        self.file = file
        self.start = start
        self.end = end

    def send(self, sendfile: SendFile) -> int:
        """Send what can be sent without waiting."""
        count = sendfile(self.file.fd, self.start, self.end - self.start)
        if not count:
            raise OSError(errno.EIO, "a file that is being sent has become shorter")
        return count

    def release(self) -> None:
        """Nothing to give back: the file closes with its last user."""


class Outbox:
    """The queue of replies of one connection.

    Attributes:
        sendfile: The channel's way to send files; None if it has none.
    """

    __slots__ = (
        "_arena",
        "_fill",
        "_pool",
        "_segments",
        "_tail",
        "is_closed",
        "queued_bytes",
        "sendfile",
        "sent_bytes",
    )

    def __init__(self, pool: BufferPool) -> None:
        self._pool = pool
        self._arena: Buffer | None = None
        self._fill = 0
        self._segments: deque[Segment | FileSegment] = deque()
        self.sendfile: SendFile | None = None
        self._tail: Segment | None = None
        self.is_closed = False
        """Nothing is sent any more."""
        self.queued_bytes = 0
        """Committed and not yet sent."""
        self.sent_bytes = 0

    def reserve(self, length: int) -> tuple[Buffer, int]:
        """A place for one reply.

        Args:
            length: Bytes, headers included.

        Returns:
            The buffer and where the place begins in it.
        """
        if length > ARENA_BYTES:
            return self._pool.take(length), 0
        arena = self._arena
        if arena is None or self._fill + length > ARENA_BYTES:
            arena = self._next_arena()
        start = self._fill
        self._fill = start + length
        arena.users += 1
        return arena, start

    def _next_arena(self) -> Buffer:
        if self._arena is not None:
            self._arena.release()
        self._arena = self._pool.take(ARENA_BYTES)
        self._fill = 0
        return self._arena

    def commit(self, buffer: Buffer, start: int, end: int) -> None:
        """Queue what was built in a reserved place; ``end`` may be before the place's end."""
        if self.is_closed:
            self.discard(buffer)
            return
        self.queued_bytes += end - start
        tail = self._tail
        if tail is not None and tail.end == start and tail.buffer is buffer:
            tail.end = end
            tail.places += 1
            return
        self._tail = segment = Segment(buffer, start, end)
        self._segments.append(segment)

    def discard(self, buffer: Buffer) -> None:
        """Give a reserved place up."""
        buffer.release()
        if self.is_closed:
            self._give_back()

    def take_back(self, buffer: Buffer, start: int) -> None:
        """Give the place up that was reserved last: the next one begins where it did."""
        self.discard(buffer)
        if buffer is self._arena:
            self._fill = start

    def put(self, data: bytes | bytearray | memoryview) -> None:
        """Queue a copy of bytes that were built elsewhere."""
        start = self._fill
        end = start + len(data)
        tail = self._tail
        if (
            tail is not None
            and tail.buffer is self._arena
            and tail.end == start
            and end <= ARENA_BYTES
        ):
            # One more reply behind the last: the segment's use of the buffer is theirs, too.
            tail.buffer.view[start:end] = data
            self._fill = tail.end = end
            self.queued_bytes += end - start
            return
        buffer, start = self.reserve(len(data))
        end = start + len(data)
        buffer.view[start:end] = data
        self.commit(buffer, start, end)

    def put_file(self, place: StablePlace) -> None:
        """Queue bytes of a file; only where :attr:`sendfile` is set."""
        if not self.is_closed:
            self.queued_bytes += place.length
            end = place.offset + place.length
            self._segments.append(FileSegment(place.file, place.offset, end))
            self._tail = None

    def send(self, sender: Sender) -> None:
        """Send what can be sent without waiting.

        Raises:
            BlockingIOError: Some of it is left.
            OSError: The connection is broken.
        """
        segments = self._segments
        while segments:
            first = segments[0]
            if isinstance(first, Segment):
                count = sender.sendmsg(self._next_views(first))
            else:
                assert self.sendfile is not None
                count = first.send(self.sendfile)
            self.queued_bytes -= count
            self.sent_bytes += count
            self._drop_sent(count)
        self._tail = None
        self._give_back()

    def _next_views(self, first: Segment) -> list[memoryview]:
        """The memory up to the next file."""
        if len(self._segments) == 1:
            return [first.view]
        views = []
        for segment in islice(self._segments, SEGMENTS_MAX):
            if not isinstance(segment, Segment):
                break
            views.append(segment.view)
        return views

    def _drop_sent(self, count: int) -> None:
        segments = self._segments
        while count:
            segment = segments[0]
            length = segment.end - segment.start
            if count < length:
                segment.start += count
                return
            count -= length
            segments.popleft()
            segment.release()

    def _give_back(self) -> None:
        """Return the current buffer to the pool if nothing in it is in use."""
        if self._arena is not None and self._arena.users == 1:
            self._arena.release()
            self._arena = None

    def close(self) -> None:
        """Forget what is queued and what will be; reserved places stay valid until given up."""
        self.is_closed = True
        for segment in self._segments:
            segment.release()
        self._segments.clear()
        self._tail = None
        self.queued_bytes = 0
        self._give_back()
