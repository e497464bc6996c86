"""The Linux calls that Python's ``os`` module does not have, each behind one function."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

import numpy as np

FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10

_MEMORY_FILE_SYSTEMS: Final = frozenset({0x01021994, 0x858458F6})
"""TMPFS_MAGIC and RAMFS_MAGIC (linux/magic.h)."""

_STATFS_BYTES: Final = 256
"""More than ``struct statfs`` has on any Linux (120 on x86-64); its first field is the type."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.fallocate.restype = ctypes.c_int
_libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_char_p]
_libc.fstatfs.restype = ctypes.c_int
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_libc.mincore.restype = ctypes.c_int


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2): change the space behind ``[offset, offset + length)``.

    Raises:
        OSError: As the call failed; EOPNOTSUPP where the file system has no such mode.
    """
    if _libc.fallocate(fd, mode, offset, length):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def lives_in_memory(fd: int) -> bool:
    """Whether the file's pages are its storage (tmpfs, ramfs), so that no read can be cold."""
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc.fstatfs(fd, buffer):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF in _MEMORY_FILE_SYSTEMS


class ResidencyMap:
    """What of a file is in the page cache, by mincore(2) on a mapping that is never touched.

    Args:
        fd: Open for reading.
        size: Bytes of the file.

    Raises:
        OSError: The file cannot be mapped.
        ValueError: It is empty.
    """

    __slots__ = ("_address", "_mapping", "_vector")

    def __init__(self, fd: int, size: int) -> None:
        self._mapping = mmap.mmap(fd, size, prot=mmap.PROT_READ)
        self._address = np.frombuffer(self._mapping, dtype=np.uint8).ctypes.data
        self._vector = ctypes.create_string_buffer(64)

    def is_resident(self, offset: int, length: int) -> bool:
        """Whether all pages of a range inside the file are in memory now."""
        start = offset & -mmap.PAGESIZE
        pages = (offset + length - 1 - start) // mmap.PAGESIZE + 1
        if pages > len(self._vector):
            self._vector = ctypes.create_string_buffer(pages)
        length = pages * mmap.PAGESIZE
        if _libc.mincore(self._address + start, length, self._vector):
            return False
        return self._vector.raw.find(b"\0", 0, pages) < 0
