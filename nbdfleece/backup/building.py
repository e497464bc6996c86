"""A restore point while it is made: its files, and how they become complete.

What stands on the disk at which moment:

=====================  ===========================================================
begun                  journal; ``.partial`` files
every few seconds      data durable, then the journal says so
all blocks done        files durable under their own names, journal still there
complete               manifest in place, then the journal is removed
=====================  ===========================================================

Until the manifest is there nobody takes the files for a restore point.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from .. import __version__
from ..errors import ImageError, StateError
from ..extents import Extents
from ..qcow2.check import Repair, check_image
from ..qcow2.compressed import ZLIB
from ..qcow2.create import create_image
from ..qcow2.image import Qcow2Image
from .blocks import ABSENT, DATA
from .compress import COMPRESSION_TYPES
from .directory import PARTIAL_SUFFIX, BackupDirectory
from .journal import DiskHead, DoneBlock, Journal
from .manifest import (
    BLOCK_BYTES,
    Compression,
    DiskEntry,
    Point,
    file_checksum,
    layer_pairs,
    sync_directory,
)

_SECTOR: Final = 512
"""QEMU's disks are whole sectors; a file for one that is not is rounded up."""


@dataclass(slots=True)
class DiskBuild:
    """A disk of a restore point that is not complete yet.

    Attributes:
        head: What it is.
        path: Its file, once that is complete.
        parent: The restore point below; None for a full one.
        uri: Where it comes from.
        reason: Why it is full although an increment was asked for.
        done: The blocks that are durable in the file, by number.
    """

    head: DiskHead
    path: Path
    parent: Point | None
    uri: str
    reason: str | None
    done: dict[int, DoneBlock] = field(default_factory=dict)

    @property
    def partial(self) -> Path:
        """The file as long as it is not complete."""
        return self.path.with_name(self.path.name + PARTIAL_SUFFIX)

    @property
    def is_full(self) -> bool:
        """Whether there is nothing below."""
        return self.parent is None

    async def create_file(self) -> None:
        """Make the empty file.

        Raises:
            OSError: It is there, or cannot be made.
        """
        backing = None if self.parent is None else self.parent.disk(self.head.name).file
        await create_image(
            self.partial,
            image_size(self.head.size),
            backing_file=backing,
            backing_format=None if backing is None else "qcow2",
            compression_type=compression_type(self.head.compression),
        )

    def finish_file(self) -> DiskEntry:
        """Give the file its name, durably, and describe it."""
        file_blake2b = file_checksum(self.partial)
        file_size = self.partial.stat().st_size
        self.partial.rename(self.path)
        sync_directory(self.path.parent)
        head = self.head
        return DiskEntry(
            name=head.name,
            size=head.size,
            kind=head.kind,
            parent=head.parent,
            reason=self.reason,
            uri=self.uri,
            bitmap=head.bitmap,
            file=self.path.name,
            file_size=file_size,
            file_blake2b=file_blake2b,
            block_size=BLOCK_BYTES,
            blocks=[
                (number, block.checksum)
                for number, block in sorted(self.done.items())
                if block.checksum is not None
            ],
            extents=self._extents(),
            read_bytes=sum(block.read_bytes for block in self.done.values()),
            compression=head.compression or msgspec.UNSET,
        )

    def _extents(self) -> list[tuple[int, int]]:
        """What the file says of the whole disk: as was found in the blocks, nothing elsewhere."""
        parts: list[Extents] = []
        offset = 0
        for number, block in sorted(self.done.items()):
            begin = number * BLOCK_BYTES
            if begin > offset:
                parts.append(Extents.single(begin - offset, ABSENT))
            extents = Extents.from_pairs(block.extents)
            if self.is_full:
                extents = extents.with_status(np.where(extents.status == DATA, extents.status, 0))
            parts.append(extents)
            offset = begin + extents.total()
        if offset < self.head.size:
            parts.append(Extents.single(self.head.size - offset, ABSENT))
        return layer_pairs(parts)


def image_size(size: int) -> int:
    """Bytes of the image for a disk."""
    return -(-size // _SECTOR) * _SECTOR


def compression_type(compression: Compression | msgspec.UnsetType | None) -> int:
    """The image's compression type."""
    return COMPRESSION_TYPES[compression] if isinstance(compression, str) else ZLIB


async def drop_leaks(path: Path) -> None:
    """Free what a writer that was killed had allocated but not entered yet.

    Raises:
        OSError, ImageError: The image cannot be read, or is damaged.
    """
    found = await check_image(path, repair=Repair.LEAKS)
    if found.corruptions or found.check_errors:
        raise ImageError(path, "the file of the cut pull is damaged")


async def complete(
    directory: BackupDirectory, journal: Journal, disks: Sequence[DiskBuild]
) -> Point:
    """Complete a restore point all of whose blocks are durable.

    Raises:
        OSError: It could not be; nothing is taken for a restore point.
    """
    head = journal.head
    finishing = [asyncio.create_task(asyncio.to_thread(disk.finish_file)) for disk in disks]
    await asyncio.wait(finishing)  # all: who is told of an error may remove the files
    entries = [task.result() for task in finishing]
    point = Point(
        name=head.point,
        parent=next((disk.parent for disk in entries if disk.parent is not None), None),
        checkpoint=head.checkpoint,
        checkpoint_created=head.checkpoint_created,
        started=head.started,
        finished=datetime.now(UTC),
        tool=f"nbdfleece {__version__}",
        disks=entries,
    )
    directory.publish(point)
    return point


class Keeper:
    """Makes durable what is done of a disk, and notes it in the journal."""

    def __init__(
        self, journal: Journal, image: Qcow2Image, disk: DiskBuild, journal_seconds: float
    ) -> None:
        self._journal = journal
        self._image = image
        self._disk = disk
        self._seconds = journal_seconds
        self._unsaved: list[DoneBlock] = []

    def note(self, block: DoneBlock) -> None:
        """A block is written."""
        self._unsaved.append(block)

    async def keep(self) -> None:
        """Save again and again, until cancelled."""
        while True:
            await asyncio.sleep(self._seconds)
            await self.save()

    async def save(self) -> None:
        """Make durable what was noted so far, and then the note of it."""
        blocks, self._unsaved = self._unsaved, []
        if not blocks:
            return
        try:
            await self._image.flush()
            await asyncio.to_thread(self._journal.append, blocks)
        except BaseException:
            self._unsaved = blocks + self._unsaved
            raise
        self._disk.done.update((block.number, block) for block in blocks)


def discard(directory: BackupDirectory, point: str) -> None:
    """Remove what a cut pull left; nothing of complete restore points.

    Raises:
        StateError: The restore point is complete.
    """
    if directory.has(point):
        raise StateError(f"{directory.path}: restore point {point!r} is complete")
    for path in directory.path.glob("*.qcow2*"):
        stem = path.name.removesuffix(PARTIAL_SUFFIX).removesuffix(".qcow2")
        if stem.rpartition(".")[0] == point:
            path.unlink()
    directory.journal_path(point).unlink(missing_ok=True)
