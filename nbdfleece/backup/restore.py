"""Restoring: a disk of a restore point to a target, verified on the way.

Nothing is written that was not checked first. A block whose checksum is wrong stops the
restore, with the target incomplete: a new file is removed, what was there before is left
half written, and the error says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import numpy as np

from ..extents import Extents
from .block_status import overlay
from .blocks import Block, ranges_of
from .content import DiskContent
from .directory import BackupDirectory
from .errors import BackupError
from .manifest import Point
from .rate import RateLimit
from .target import Target
from .tasks import Crew
from .transfer import BLOCK_COST_MIN, IN_FLIGHT_BYTES_MAX, Progress, ReportProgress

ZERO_BYTES_MAX: Final = 256 << 20
"""Zeroed by one command: some servers write zeroes out, and are not to look dead meanwhile."""


class Restored(NamedTuple):
    """What a restore did, in bytes; ``skipped_bytes`` were zero on both sides."""

    disk: str
    point: str
    size: int
    written_bytes: int
    zeroed_bytes: int
    skipped_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreOptions:
    """How to restore.

    Attributes:
        limit: Bytes per second that are written.
        progress: Called in the loop's thread, after every block.
    """

    limit: RateLimit | None = None
    progress: ReportProgress | None = None


async def restore(
    directory: BackupDirectory,
    point: Point,
    disk: str,
    target: Target,
    *,
    options: RestoreOptions | None = None,
) -> Restored:
    """Write a disk as it was at a restore point; the target is finished or aborted, and closed.

    Args:
        directory: The backup.
        point: The restore point.
        disk: The disk's name.
        target: Where to; from :func:`~nbdfleece.backup.target.open_target`.
        options: How.

    Returns:
        What was done; all of it is durable.

    Raises:
        BackupError: The chain is broken, or a checksum is wrong.
        ServerError: The target's server failed.
        OSError: The target cannot be written.
    """
    try:
        with directory.reading():
            content = await DiskContent.open(directory, point, disk)
            try:
                work = _Restore(content, target, options or RestoreOptions())
                done = await work.run(point.name)
            finally:
                await content.close()
        await target.finish()
    except BaseException:
        await target.abort()
        raise
    return done


class _Restore:
    """One disk on its way to a target."""

    def __init__(self, content: DiskContent, target: Target, options: RestoreOptions) -> None:
        self._content = content
        self._target = target
        self._limit = options.limit or RateLimit()
        self._progress = options.progress
        self._moved = 0
        self._total = content.data_bytes

    async def run(self, point: str) -> Restored:
        """Zero what must be, write what is not zero."""
        if self._target.size < self._content.size:
            raise BackupError(f"{self._target.name}: smaller than disk {self._content.name!r}")
        zeroes = await self._zeroes_needed()
        zeroed = int(zeroes.lengths[zeroes.status != 0].sum())
        self._total += zeroed
        async with Crew(IN_FLIGHT_BYTES_MAX, BLOCK_COST_MIN) as crew:
            for part in ranges_of(0, zeroes):
                if part.status:
                    await self._zero(crew, part.offset, part.length)
            for block in self._content.blocks():
                await self._limit.take(_wanted_bytes(block))
                await crew.start(self._content.read_bytes(block), partial(self._move, block))
        written = self._content.data_bytes
        size = self._content.size
        return Restored(self._content.name, point, size, written, zeroed, size - written - zeroed)

    async def _zeroes_needed(self) -> Extents:
        """Status 1 where the disk is zero and the target is not known to be."""
        if not self._content.size:
            return Extents.from_pairs([])
        known = (await self._target.known_zeroes()).clipped(self._content.size)
        content, target = overlay(self._content.extents, known)
        return content.with_status(((content.status == 0) & (target.status == 0)).astype(np.uint32))

    async def _zero(self, crew: Crew, offset: int, length: int) -> None:
        for start in range(offset, offset + length, ZERO_BYTES_MAX):
            count = min(ZERO_BYTES_MAX, offset + length - start)
            await crew.start(BLOCK_COST_MIN, partial(self._zero_part, start, count))

    async def _zero_part(self, offset: int, length: int) -> None:
        await self._target.write_zeroes(offset, length)
        self._report(length)

    async def _move(self, block: Block) -> None:
        for piece in await self._content.read(block):
            await self._target.write(piece.offset, piece.data)
        self._report(_wanted_bytes(block))

    def _report(self, amount: int) -> None:
        self._moved += amount
        if self._progress is not None:
            self._progress(Progress(self._content.name, self._moved, self._total))


def _wanted_bytes(block: Block) -> int:
    return sum(part.length for part in block.ranges if part.status)
