"""The system's libzstd, to inflate into memory that is there already.

Python's own module makes a new context for every frame, which takes as long as to inflate
a cluster of 64 KiB, and gives the result as new bytes. Every system with QEMU has the
library; without it :func:`load` gives None.
"""

from __future__ import annotations

import ctypes
import threading
from ctypes import byref, c_char, c_size_t, c_void_p


class ZstdError(Exception):
    """What was to be inflated is damaged, or does not fit."""


class Zstd:
    """The library, with a context for each thread."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._contexts = threading.local()
        self._create = library.ZSTD_createDCtx
        self._free = library.ZSTD_freeDCtx
        self._frame_bytes = library.ZSTD_findFrameCompressedSize
        self._decompress = library.ZSTD_decompressDCtx
        self._is_error = library.ZSTD_isError
        self._create.restype = c_void_p
        self._free.argtypes = [c_void_p]
        self._frame_bytes.argtypes = [c_void_p, c_size_t]
        self._frame_bytes.restype = c_size_t
        self._decompress.argtypes = [c_void_p, c_void_p, c_size_t, c_void_p, c_size_t]
        self._decompress.restype = c_size_t
        self._is_error.argtypes = [c_size_t]

    def inflate_into(self, data: memoryview, view: memoryview) -> None:
        """Fill a view from one frame or several in a row; what follows them is left alone.

        Args:
            data: Writable memory (it is not written to).
            view: Is filled whole, or an error is raised.

        Raises:
            ZstdError: A frame is damaged or inflates to more than there is room for, or all
                of them to less.
        """
        while len(view):
            if not len(data):
                raise ZstdError("too short")
            source, target = c_char.from_buffer(data), c_char.from_buffer(view)
            length = self._checked(self._frame_bytes(byref(source), len(data)))
            count = self._checked(
                self._decompress(self._context(), byref(target), len(view), byref(source), length)
            )
            data, view = data[length:], view[count:]

    def _checked(self, result: int) -> int:
        if self._is_error(result):
            raise ZstdError("damaged, or too large")
        return result

    def _context(self) -> int:
        holder: _Context | None = getattr(self._contexts, "holder", None)
        if holder is None:
            holder = self._contexts.holder = _Context(self)
        return holder.pointer


class _Context:
    """A context that goes with its thread."""

    def __init__(self, zstd: Zstd) -> None:
        self._free = zstd._free
        self.pointer: int = zstd._create()
        if not self.pointer:
            raise MemoryError

    def __del__(self) -> None:
        if getattr(self, "pointer", None):
            self._free(self.pointer)


def load() -> Zstd | None:
    """The library, if the system has it."""
    try:
        return Zstd(ctypes.CDLL("libzstd.so.1"))
    except (OSError, AttributeError):
        return None
