"""Bytes that nobody can overwrite, and that may therefore be sent without a copy (rule 1).

Pages that ``sendfile`` gave to a socket are the file's own until the client has taken them:
a write to the file in the meantime changes what the client receives. So only a file that we
read, and that QEMU's locks keep every other program from writing, is *stable*. The
locks belong to the open file, of which a :class:`StableFile` holds a duplicate: they last
until the node is closed and no queued reply refers to the file any more.

``sendfile`` has no way to say that it would have to wait for the disk. What is not in the
page cache is therefore brought there by a thread first (rule 5), and copied nowhere.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final, NamedTuple, Self

from .linux import ResidencyMap
from .threads import in_thread

STABLE_PIECE_BYTES_MIN: Final = 32 << 10
"""Pieces of a range smaller than this, on average, had better be copied: each is a system call."""

_LOST_MAX: Final = 4
"""Fetches in a row that left nothing in the page cache, after which a file is not fetched."""


class StableFile:
    """A file whose bytes hold still; closed when the last user has dropped it.

    Args:
        fd: An open file with locks that exclude writers; duplicated.
        is_in_memory: Its pages are its storage, so none of them is ever cold.
    """

    __slots__ = ("_lost", "_residency", "fd", "size")

    def __init__(self, fd: int, *, is_in_memory: bool) -> None:
        self.size = os.fstat(fd).st_size
        self._residency = None if is_in_memory else ResidencyMap(fd, self.size)
        self._lost = 0
        self.fd = os.dup(fd)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)

    @property
    def is_cached(self) -> bool:
        """Whether what was fetched has stayed: ZFS, DAX and direct I/O do without a page cache."""
        return self._lost < _LOST_MAX

    def reopen(self) -> int:
        """A descriptor of the caller's, for which the kernel reads ahead separately if it can."""
        try:
            return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # not allowed to us, or /proc is not there
            return os.dup(self.fd)

    def note_fetch(self, *, is_kept: bool) -> None:
        """What was fetched just now is in the page cache, or gone already."""
        self._lost = 0 if is_kept else self._lost + 1

    def is_at_hand(self, offset: int, length: int) -> bool:
        """Whether a range of the file can be sent without waiting for the disk."""
        return self._residency is None or self._residency.is_resident(offset, length)


class StablePlace(NamedTuple):
    """Where bytes lie."""

    file: StableFile
    offset: int
    """In bytes from the file's beginning."""
    length: int
    """In bytes."""

    @property
    def is_at_hand(self) -> bool:
        """Whether the bytes can be sent without waiting for the disk."""
        return self.file.is_at_hand(self.offset, self.length)


class Fetcher:
    """Has threads bring what is cold into the page cache; used as a context.

    The kernel reads ahead for each open file by what was read of it last. Streams that are
    fetched at the same time through one of them spoil that for each other, so each fetcher opens
    what it fetches once more. The locks stay with the :class:`StableFile`.
    """

    def __init__(self) -> None:
        self._opened: dict[StableFile, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._opened.values():
            os.close(fd)
        self._opened.clear()

    async def bring_to_hand(self, places: Sequence[StablePlace]) -> bool:
        """Fetch what is cold of some places; whether all can be sent then."""
        cold = [place for place in places if not place.is_at_hand]
        if not cold:
            return True
        if not cold[0].file.is_cached:
            return False
        try:
            # The thread gets no places: it would let go of them some time after it has ended, and a
            # file's locks last as long.
            ranges = [(self._open(place.file), place.offset, place.length) for place in cold]
            await in_thread(_fetch_all, ranges)
        except OSError:  # whoever reads it now will say the same
            return False
        is_kept = all(place.is_at_hand for place in places)
        cold[0].file.note_fetch(is_kept=is_kept)
        return is_kept

    def _open(self, file: StableFile) -> int:
        if file not in self._opened:
            self._opened[file] = file.reopen()
        return self._opened[file]


async def bring_to_hand(places: Sequence[StablePlace]) -> bool:
    """As :meth:`Fetcher.bring_to_hand`, for this once."""
    with Fetcher() as fetcher:
        return await fetcher.bring_to_hand(places)


def _fetch_all(ranges: list[tuple[int, int, int]]) -> None:
    for fd, offset, length in ranges:
        fetch(fd, offset, length)


def fetch(fd: int, offset: int, length: int) -> None:
    """Wait until a range of a file is in the page cache.

    Raises:
        OSError: It could not be read.
    """
    end = offset + length
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        while offset < end and (count := os.sendfile(nowhere, fd, offset, end - offset)):
            offset += count
    finally:
        os.close(nowhere)


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
