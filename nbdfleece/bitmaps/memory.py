"""Memory for what is mostly zero: bitmaps of large disks, tables of sparse ones."""

from __future__ import annotations

import mmap
from typing import Final

LAZY_BYTES_MIN: Final = 1 << 16
"""So many bytes or more are mapped: they take memory, and the time to clear it, only where they
are written to. Less is a byte array, a byte of which is written twice as fast."""


def zeroed_memory(length: int) -> bytearray | mmap.mmap:
    """Bytes that are all zero; if many, each page takes memory once it is written to."""
    if length < LAZY_BYTES_MIN:
        return bytearray(length)
    return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
