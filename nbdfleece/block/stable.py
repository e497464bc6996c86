"""Bytes that nobody can overwrite, and that may therefore be sent without a copy (rule 1).

Pages that ``sendfile`` gave to a socket are the file's own until the client has taken them:
a write to the file in the meantime changes what the client receives. So only a file that we
read, and that QEMU's locks keep every other program from writing, is *stable*. The
locks belong to the open file, of which a :class:`StableFile` holds a duplicate: they last
until the node is closed and no queued reply refers to the file any more.

``sendfile`` has no way to say that it would have to wait for the disk. What is not
in the page cache is therefore read in the ordinary way, by a thread (rule 5).
"""

from __future__ import annotations

import os
from typing import NamedTuple

from .linux import ResidencyMap


class StableFile:
    """A file whose bytes hold still; closed when the last user has dropped it.

    Args:
        fd: An open file with locks that exclude writers; duplicated.
        is_in_memory: Its pages are its storage, so none of them is ever cold.
    """

    __slots__ = ("_residency", "_size", "fd")

    def __init__(self, fd: int, *, is_in_memory: bool) -> None:
        self._size = os.fstat(fd).st_size
        self._residency = None if is_in_memory else ResidencyMap(fd, self._size)
        self.fd = os.dup(fd)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)

    def is_at_hand(self, offset: int, length: int) -> bool:
        """Whether the range is inside the file and can be sent without waiting for the disk."""
        if offset + length > self._size:
            return False
        return self._residency is None or self._residency.is_resident(offset, length)


class StablePlace(NamedTuple):
    """Where bytes lie."""

    file: StableFile
    offset: int
    """In bytes from the file's beginning."""


def open_stable(fd: int, *, is_in_memory: bool) -> StableFile | None:
    """The stable file of a descriptor; None if the page cache cannot be looked into.

    The kernel tells only those who may write a file, or own it, what of it is in memory.
    """
    info = os.fstat(fd)
    if not is_in_memory and info.st_uid != os.geteuid() and os.geteuid() != 0:
        return None
    try:
        return StableFile(fd, is_in_memory=is_in_memory)
    except (OSError, ValueError):  # not enough address space, or an empty file
        return None
