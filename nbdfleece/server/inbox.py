"""Received bytes, used where they lie.

One receive fills as much of a pooled megabyte as the kernel has. Whole messages
are handled in place: a WRITE's payload is a view into the buffer. So the buffer
must not be overwritten while a write that waits still uses it:

* Such a write **pins** the buffer: it is one more user of it. While
  pinned, bytes are only added behind the last ones, never moved or overwritten.
* When there is no room left, the beginning of the next message moves: to the
  front of the same buffer if nobody pins it, else to a fresh one, and the old one
  goes back to the pool with its last pin.

A client could pin a megabyte with a write of 512 bytes, but no more often than
once in a megabyte that it sends and no more often than it may have requests in
flight, which bounds what it can hold.

A message whose payload is larger than half the buffer has a buffer of its own,
and the rest of it is received straight into that (:meth:`Inbox.begin_large`).

Between wake-ups a connection with nothing left over holds no buffer.
"""

from __future__ import annotations

from typing import Final

from ..nbd.limits import KIB, MIB
from .buffers import Buffer, BufferPool

INBOX_BYTES: Final = 1 * MIB
"""Size of the shared receive buffers."""

IN_PLACE_BYTES_MAX: Final = INBOX_BYTES // 2
"""Messages up to this size are handled in the shared buffer."""

_RECEIVE_BYTES_MIN: Final = 64 * KIB
"""No receive is offered less room than this, lest one message take many system calls."""

_NOTHING: Final = memoryview(b"")


class Inbox:
    """The received and not yet handled bytes of one connection: ``view[start:end]``."""

    __slots__ = ("_large", "_large_end", "_large_length", "_pool", "buffer", "end", "start", "view")

    def __init__(self, pool: BufferPool) -> None:
        self._pool = pool
        self.buffer: Buffer | None = None
        self.view = _NOTHING
        """The memory of ``buffer``."""
        self.start = 0
        self.end = 0
        self._large: Buffer | None = None
        self._large_length = 0
        self._large_end = 0

    def __len__(self) -> int:
        return self.end - self.start

    def space(self, needed: int) -> memoryview:
        """Where to receive next.

        Args:
            needed: Bytes from ``start`` on that the next message takes, as far as is known;
                at most :data:`IN_PLACE_BYTES_MAX`.
        """
        if self._large is not None:
            return self._large.view[self._large_end : self._large_length]
        buffer = self.buffer
        if buffer is None:
            self.buffer = buffer = self._pool.take(INBOX_BYTES)
            self.view = buffer.view
            self.start = self.end = 0
        elif INBOX_BYTES - self.start < needed or INBOX_BYTES - self.end < _RECEIVE_BYTES_MIN:
            buffer = self._make_room(buffer)
        return buffer.view[self.end :]

    def _make_room(self, buffer: Buffer) -> Buffer:
        """Move what is left to the front, of another buffer if this one is pinned."""
        target = buffer if buffer.users == 1 else self._pool.take(INBOX_BYTES)
        length = self.end - self.start
        target.view[:length] = buffer.view[self.start : self.end]
        if target is not buffer:
            buffer.release()
        self.buffer = target
        self.view = target.view
        self.start, self.end = 0, length
        return target

    def received(self, count: int) -> None:
        """Note that ``count`` bytes were received into :meth:`space`."""
        if self._large is not None:
            self._large_end += count
        else:
            self.end += count

    def peek(self, length: int) -> memoryview:
        """The next ``length`` bytes, which are there; valid until more is received."""
        return self.view[self.start : self.start + length]

    def append(self, data: bytes) -> None:
        """Add bytes that were received elsewhere."""
        while data:
            space = self.space(len(self) + 1)
            count = min(len(space), len(data))
            space[:count] = data[:count]
            self.received(count)
            data = data[count:]

    def begin_large(self, length: int) -> None:
        """Receive the next ``length`` bytes into a buffer of their own."""
        self._large = large = self._pool.take(length)
        self._large_length = length
        self._large_end = count = min(len(self), length)
        if count:
            large.view[:count] = self.peek(count)
            self.start += count

    def finish_large(self) -> Buffer | None:
        """What :meth:`begin_large` began, the caller's to release; None while bytes are missing."""
        large = self._large
        if self._large_end < self._large_length:
            return None
        self._large = None
        return large

    def give_back(self) -> None:
        """Return the buffer to the pool if nothing in it is in use."""
        buffer = self.buffer
        if buffer is not None and self.start == self.end and buffer.users == 1:
            buffer.release()
            self.buffer = None
            self.view = _NOTHING

    def close(self) -> None:
        """Forget everything; pinned buffers stay valid until their pins are dropped."""
        for buffer in (self.buffer, self._large):
            if buffer is not None:
                buffer.release()
        self.buffer = self._large = None
        self.view = _NOTHING
        self.start = self.end = 0
