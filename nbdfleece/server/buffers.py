"""Memory for payloads: anonymous mappings that are used again.

A fresh ``bytearray`` of a megabyte costs 256 page faults and as many cleared
pages, more than reading the bytes into it from the page cache. So buffers come
from a :class:`BufferPool` and go back to it. They are mappings and not byte
arrays because a mapping costs only the pages that were touched: a connection
that sends small requests holds one page of its megabyte.

A buffer has **users**: whoever fills it, and everything whose bytes lie in it
(a write that waits, a reply that is not yet sent). Who drops the last use gives
it back. A buffer that nobody gives back is freed by Python with its last view,
so that a lost use costs memory's re-use and never its safety.
"""

from __future__ import annotations

import mmap
from typing import Final

from ..nbd.limits import KIB

BUFFER_BYTES_MIN: Final = 256 * KIB
"""The smallest size class."""


class Buffer:
    """A piece of memory with a count of its users; made by :meth:`BufferPool.take`."""

    __slots__ = ("_pool", "size", "users", "view")

    def __init__(self, pool: BufferPool, size: int) -> None:
        self._pool = pool
        self.view = memoryview(mmap.mmap(-1, size))
        self.size = size
        self.users = 1

    def release(self, users: int = 1) -> None:
        """Drop uses; the last one gives the buffer back to its pool."""
        self.users -= users
        if not self.users:
            self._pool.put(self)


class BufferPool:
    """Buffers by size class, powers of two; those that nobody uses are kept up to a limit.

    Args:
        idle_bytes_max: Bytes of unused buffers that are kept.
    """

    def __init__(self, idle_bytes_max: int) -> None:
        self._idle: dict[int, list[Buffer]] = {}
        self._idle_bytes_max = idle_bytes_max
        self._made_bytes = 0
        self.idle_bytes = 0
        """Bytes of the buffers that nobody uses."""

    @property
    def taken_bytes(self) -> int:
        """Bytes of the buffers in use."""
        return self._made_bytes - self.idle_bytes

    def take(self, size: int) -> Buffer:
        """A buffer of at least ``size`` bytes with one user; its content is undefined."""
        idle = self._idle.get(size)
        if not idle:
            return self._take_class(max(BUFFER_BYTES_MIN, 1 << (size - 1).bit_length()))
        self.idle_bytes -= size
        buffer = idle.pop()
        buffer.users = 1
        return buffer

    def _take_class(self, size: int) -> Buffer:
        """A buffer of a size class, made if there is none."""
        if self._idle.setdefault(size, []):
            return self.take(size)
        self._made_bytes += size
        return Buffer(self, size)

    def put(self, buffer: Buffer) -> None:
        """Take a buffer back that has no users any more."""
        size = buffer.size
        if self.idle_bytes + size <= self._idle_bytes_max:
            self.idle_bytes += size
            self._idle[size].append(buffer)
        else:
            self._made_bytes -= size
