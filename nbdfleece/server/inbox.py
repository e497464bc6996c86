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
once in half a megabyte that it sends and no more often than it may have requests
in flight, which bounds what it can hold.

Of large messages no more is received at a time than up to the end of one: the next
one then begins at the front again, so that nothing is moved, and the same few hundred
KiB are used over and over, which stay in the processor's cache.

A message whose payload is larger than half the buffer has a buffer of its own,
and the rest of it is received straight into that (:meth:`Inbox.begin_large`).

Between wake-ups a connection with nothing left over holds no buffer.
"""

from __future__ import annotations

from typing import Final, Protocol

from ..errors import NbdfleeceError
from ..nbd.limits import KIB, MIB
from .buffers import Buffer, BufferPool

INBOX_BYTES: Final = 1 * MIB
"""Size of the shared receive buffers."""

IN_PLACE_BYTES_MAX: Final = INBOX_BYTES // 2
"""Messages up to this size are handled in the shared buffer."""

LARGE_BYTES_MIN: Final = 64 * KIB
"""Messages of at least this size are received one at a time."""

_RECEIVE_BYTES_MIN: Final = 64 * KIB
"""No receive is offered less room than this, lest one message take many system calls."""

_NOTHING: Final = memoryview(b"")


class Receiver(Protocol):
    """Where bytes come from."""

    def recv_into(self, view: memoryview, /) -> int:
        """Receive what is there, up to ``len(view)`` bytes.

        Returns:
            The number of bytes; 0 at the end.

        Raises:
            BlockingIOError: Nothing is there now.
            OSError: The connection is broken.
        """


class BrokenChannelError(NbdfleeceError):
    """Receiving failed amid a turn: drop the connection.

    It is no ``OSError``: what else is done there may raise those, and they are failures of ours.
    """


class Inbox:
    """The received and not yet handled bytes of one connection: ``view[start:end]``.

    Args:
        pool: Where buffers come from.
        source: Where bytes come from; None once the inbox is closed.
    """

    __slots__ = (
        "_large",
        "_large_end",
        "_large_length",
        "_pool",
        "buffer",
        "end",
        "is_dry",
        "source",
        "start",
        "view",
    )

    def __init__(self, pool: BufferPool, source: Receiver) -> None:
        self._pool = pool
        self.source: Receiver | None = source
        self.buffer: Buffer | None = None
        self.view = _NOTHING
        """The memory of ``buffer``."""
        self.start = 0
        self.end = 0
        self.is_dry = False
        """The last look was for more of a large message, and found nothing, and no end either."""
        self._large: Buffer | None = None
        self._large_length = 0
        self._large_end = 0

    def __len__(self) -> int:
        return self.end - self.start

    def space(self, needed: int) -> memoryview:
        """Where to receive next.

        Args:
            needed: Bytes from ``start`` on that the next message takes, as far as is known or
                to be expected; at most :data:`IN_PLACE_BYTES_MAX`, if it is not a large one.
        """
        if self._large is not None:
            return self._large.view[self._large_end : self._large_length]
        buffer = self.buffer
        if buffer is None:
            self.buffer = buffer = self._pool.take(INBOX_BYTES)
            self.view = buffer.view
            self.start = self.end = 0
        elif self.start == self.end and buffer.users == 1:
            self.start = self.end = 0
        elif INBOX_BYTES - self.start < needed or INBOX_BYTES - self.end < _RECEIVE_BYTES_MIN:
            buffer = self._make_room(buffer)
        if needed < LARGE_BYTES_MIN:
            return buffer.view[self.end :]
        return buffer.view[self.end : max(self.start + needed, self.end + _RECEIVE_BYTES_MIN)]

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

    def receive(self, needed: int) -> int:
        """Receive what is there, up to the room for it.

        Args:
            needed: As for :meth:`space`.

        Returns:
            The number of bytes; 0 at the end.

        Raises:
            BlockingIOError: Nothing is there now.
            OSError: The connection is broken.
        """
        assert self.source is not None, "received after the end"
        count = self.source.recv_into(self.space(needed))
        self.is_dry = False
        self.received(count)
        return count

    def receive_large(self, needed: int) -> int:
        """Receive what is there of a large message, or where one is likely to be.

        To ask the event loop first would cost more than to find nothing.

        Args:
            needed: As for :meth:`space`; nothing is received if no large message is meant, or
                if so much is here.

        Returns:
            The number of bytes; 0 if there are none now, and at the end.

        Raises:
            BrokenChannelError: The connection is broken.
        """
        if needed < LARGE_BYTES_MIN or len(self) >= needed or self.source is None:
            return 0
        try:
            return self.receive(needed)
        except BlockingIOError:
            self.is_dry = True
            return 0
        except OSError as error:
            raise BrokenChannelError(str(error)) from error

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
        self.buffer = self._large = self.source = None
        self.view = _NOTHING
        self.start = self.end = 0


def needed_after(header_size: int, length: int) -> int:
    """Bytes that the next message is likely to take, which is likely to be like the last.

    Args:
        header_size: Of any message.
        length: Bytes of the last one's payload.
    """
    if length < LARGE_BYTES_MIN:
        return header_size
    # What follows a message in a buffer of its own is to be received there, too, most of it.
    return header_size + (length if length <= IN_PLACE_BYTES_MAX else LARGE_BYTES_MIN)
