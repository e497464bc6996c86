"""Scratch space: where copy-before-write puts old data.

One unlinked file per disk, so that a crash leaves nothing behind. Granules are
handed out in ascending order and never twice: what was written once stays as it
is until it is given back, and space that is given back is punched out of the
file, not reused. A snapshot reader that holds an old place can therefore meet a
hole, but never another granule's data (rule 1).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import tempfile
from collections.abc import Sequence
from typing import Final

from .file import FileNode

_log = logging.getLogger("nbdfleece.block")

GRANULES_MAX: Final = (1 << 32) - 16
"""Places that a granule map can name; 16 TiB of copies at granules of 4 KiB."""


class Scratch:
    """Append-only granules in a temporary file, with a quota.

    Args:
        directory: Where the file is made; must bear the copies of all that the guest
            overwrites while a snapshot stands.
        granularity: Bytes of a granule.
        quota: Bytes that may be in use at once; None leaves the limit to the file system.
    """

    def __init__(
        self, directory: str | os.PathLike[str], granularity: int, quota: int | None = None
    ) -> None:
        fd, path = tempfile.mkstemp(prefix="nbdfleece-scratch-", dir=directory)
        os.unlink(path)
        self._file = FileNode(fd, f"{path} (scratch)", read_only=False)
        self._granularity = granularity
        self._quota = quota
        self._next = 0
        self._in_use = 0
        self._punching: asyncio.Task[None] | None = None
        self._to_punch: list[tuple[int, int]] = []
        self._busy = 0
        self._is_closed = False
        self._idle: asyncio.Future[None] | None = None

    def fileno(self) -> int:
        """The descriptor of the file."""
        return self._file.fileno()

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the granules that are handed out and not given back."""
        return self._in_use * self._granularity

    def allocate(self, count: int) -> int:
        """Hand out ``count`` adjacent granules.

        Returns:
            The number of the first one.

        Raises:
            OSError: ENOSPC, the quota would be exceeded; ECANCELED, the scratch is closed.
        """
        if self._is_closed:
            raise OSError(errno.ECANCELED, "the snapshots were dropped")
        wanted = (self._in_use + count) * self._granularity
        if (self._quota is not None and wanted > self._quota) or self._next + count > GRANULES_MAX:
            raise OSError(errno.ENOSPC, f"scratch quota of {self._quota} bytes is used up")
        first = self._next
        self._next += count
        self._in_use += count
        return first

    async def write(self, granule: int, data: memoryview) -> None:
        """Store the data of adjacent granules from number ``granule`` on."""
        self._busy += 1
        try:
            await self._file.write(granule * self._granularity, data)
        finally:
            self._end_use()

    def append(self, data: memoryview) -> int:
        """Store the data of one granule, without waiting; returns its number.

        Raises:
            OSError: As :meth:`allocate`, or the data could not be written.
        """
        granule = self.allocate(1)
        try:
            self._file.write_at_once(granule * self._granularity, data)
        except BaseException:
            self.free(granule, 1)
            raise
        return granule

    async def write_part(self, granule: int, skip: int, data: memoryview) -> None:
        """Overwrite bytes from ``skip`` bytes into a granule on that nobody else reads."""
        self._busy += 1
        try:
            await self._file.write(granule * self._granularity + skip, data)
        finally:
            self._end_use()

    async def read_into(self, granule: int, skip: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``skip`` bytes into granule number ``granule`` on."""
        self._busy += 1
        try:
            await self._file.read_into(granule * self._granularity + skip, view)
        finally:
            self._end_use()

    async def read_pieces(self, pieces: Sequence[tuple[int, memoryview]]) -> None:
        """Fill several views, each from so many bytes after the scratch's beginning on."""
        self._busy += 1
        try:
            await self._file.read_pieces(pieces)
        finally:
            self._end_use()

    def read_pieces_at_once(self, pieces: Sequence[tuple[int, memoryview]]) -> bool:
        """As :meth:`read_pieces`, if that needs no waiting; whether all views are filled."""
        return self._file.read_pieces_at_once(pieces)

    def _end_use(self) -> None:
        """A read or write has ended; :meth:`close` waits for the last one."""
        self._busy -= 1
        if not self._busy and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def free(self, granule: int, count: int) -> None:
        """Give ``count`` adjacent granules back; their space returns to the file system soon."""
        if self._is_closed:
            return
        self._in_use -= count
        self._to_punch.append((granule * self._granularity, count * self._granularity))
        if self._punching is None or self._punching.done():
            self._punching = asyncio.get_running_loop().create_task(self._punch())

    @property
    def is_punching(self) -> bool:
        """Whether space that was given back is on its way to the file system."""
        return self._punching is not None and not self._punching.done()

    async def punched(self) -> None:
        """Wait until the file system has what was given back."""
        if self._punching is not None:
            await asyncio.wait([self._punching])

    async def _punch(self) -> None:
        while self._to_punch:
            try:
                await self._file.trim(*self._to_punch.pop())
            except OSError as error:
                _log.warning("%s: space could not be given back: %s", self._file.path, error)

    async def close(self) -> None:
        """Give the file up, and with it all its space, once nobody reads or writes it."""
        self._is_closed = True
        self._to_punch.clear()
        if self._punching is not None:
            await self._punching
        while self._busy:
            self._idle = asyncio.get_running_loop().create_future()
            await self._idle
        try:
            await self._file.discard()
        except OSError as error:  # nobody needs what is in it any more
            _log.warning("%s: %s", self._file.path, error.strerror)
