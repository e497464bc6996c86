"""The Linux calls that Python's ``os`` module does not have, each behind one function."""

from __future__ import annotations

import ctypes
import os
from typing import Final

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
