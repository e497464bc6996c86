"""Pruning: removing restore points without breaking those that build on them.

A point that stays and whose parent goes gets a new file, in which its own layer and those
of all the points that go below it are one. All new files are made first; then everything
changes at once (:class:`~nbdfleece.backup.directory.Replacement`). Every byte that is
merged is checked against its checksum on the way: a damaged backup is not made to look good.

The new files need room beside the old ones until the change is made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from ..errors import UsageError
from ..extents import Extents
from ..qcow2.create import create_image
from ..qcow2.image import Qcow2Image
from .blocks import ABSENT, DATA, ZEROES, Block, cut_blocks, ranges_of
from .building import compression_type, image_size
from .compress import ImageWriter, Part
from .content import PENDING, DiskContent, stack
from .directory import NEW_SUFFIX, BackupDirectory, Replacement
from .manifest import (
    Compression,
    DiskEntry,
    Point,
    checksum,
    encode_manifest,
    file_checksum,
    write_atomically,
)
from .tasks import Crew
from .transfer import BLOCK_COST_MIN, IN_FLIGHT_BYTES_MAX


def surplus(directory: BackupDirectory, keep: int) -> list[str]:
    """The names of all restore points but the newest ``keep``, oldest first."""
    points = directory.points()
    return [point.name for point in points[: max(0, len(points) - keep)]]


async def prune(directory: BackupDirectory, names: Sequence[str]) -> None:
    """Remove restore points, all or none.

    Args:
        directory: The backup.
        names: The restore points that go.

    Raises:
        BackupError: One is not there, or a chain is broken or damaged; nothing was changed.
        StateError: The directory is in use.
        UsageError: Nothing would be left.
        OSError: There is no room for the new files; nothing was changed.
    """
    with directory.writing(), directory.replacing():
        points = {point.name: point for point in directory.points()}
        doomed = {name: directory.point(name) for name in names}
        if doomed and len(doomed) == len(points):
            raise UsageError(f"{directory.path}: no restore point would be left")
        changed = [
            await _without(directory, point, doomed)
            for point in points.values()
            if point.name not in doomed and any(disk.parent in doomed for disk in point.disks)
        ]
        directory.replace(_replacement(directory, changed, doomed))


def _replacement(
    directory: BackupDirectory, changed: list[Point], doomed: dict[str, Point]
) -> Replacement:
    """What to rename and remove; the new files are there, the new manifests are made here."""
    rename: list[str] = []
    for point in changed:
        path = directory.manifest_path(point.name)
        write_atomically(path.with_name(path.name + NEW_SUFFIX), encode_manifest(point))
        old = directory.point(point.name)
        rename += [disk.file for disk in point.disks if old.disk(disk.name).parent in doomed]
        rename.append(path.name)
    remove = [directory.manifest_path(name).name for name in doomed]
    remove += [disk.file for point in doomed.values() for disk in point.disks]
    return Replacement(rename, remove)


async def _without(directory: BackupDirectory, point: Point, doomed: dict[str, Point]) -> Point:
    """A point as it is when some others are gone; its new files are durable on return."""
    disks = [
        await _merge(directory, point, disk, doomed) if disk.parent in doomed else disk
        for disk in point.disks
    ]
    parent = next((disk.parent for disk in disks if disk.parent is not None), None)
    return msgspec.structs.replace(point, parent=parent, disks=disks)


async def _merge(
    directory: BackupDirectory, point: Point, disk: DiskEntry, doomed: dict[str, Point]
) -> DiskEntry:
    """Make a new file of a disk's layer and those of the points that go below it."""
    chain = [entry for _, entry in directory.chain(point, disk.name)]
    names = [point.name, *(entry.parent for entry in chain)]
    count = next(number for number in range(1, len(names)) if names[number] not in doomed)
    lowest, below = chain[count - 1], chain[count] if count < len(chain) else None
    path = directory.path / (disk.file + NEW_SUFFIX)
    merging = chain[:count]
    compression = next((entry.compression for entry in merging if entry.compression), None)
    await create_image(
        path,
        image_size(disk.size),
        backing_file=None if below is None else below.file,
        backing_format=None if below is None else "qcow2",
        compression_type=compression_type(compression),
    )
    content = await DiskContent.open(directory, point, disk.name)
    try:
        merged = await _write_merged(content, count, path, compression, is_full=below is None)
    finally:
        await content.close()
    return msgspec.structs.replace(
        disk,
        kind=lowest.kind,
        parent=lowest.parent,
        bitmap=lowest.bitmap,
        file_size=(await asyncio.to_thread(path.stat)).st_size,
        file_blake2b=await asyncio.to_thread(file_checksum, path),
        blocks=sorted(merged.checksums),
        extents=merged.extents.pairs(),
        compression=compression or msgspec.UNSET,
    )


class _Merged(NamedTuple):
    """What a merged file says, and its checksums by block number."""

    extents: Extents
    checksums: list[tuple[int, str]]


async def _write_merged(
    content: DiskContent,
    count: int,
    path: Path,
    compression: Compression | None,
    *,
    is_full: bool,
) -> _Merged:
    """Write the topmost ``count`` layers as one; durable on return."""
    found = stack([layer.entry.layer() for layer in content.layers[:count]], content.size)
    where = found.with_status(np.where(found.status == PENDING, 0, found.status))
    zeroes = ABSENT if is_full else ZEROES
    status = np.where(found.status == 0, zeroes, np.where(found.status == PENDING, ABSENT, DATA))
    merged = _Merged(found.with_status(status.astype(np.uint32)), [])
    image = await Qcow2Image.open(path, read_only=False)
    writer = ImageWriter(image, compression, is_full=is_full, disk_size=content.size)
    try:
        for part in ranges_of(0, merged.extents):
            if part.status == ZEROES:
                await image.write_zeroes(part.offset, part.length)
        async with Crew(IN_FLIGHT_BYTES_MAX, BLOCK_COST_MIN) as crew:
            for block in cut_blocks(where):
                copy = partial(_copy, content, block, writer, merged.checksums)
                await crew.start(content.read_bytes(block), copy)
    finally:
        await image.close()
    return merged


async def _copy(
    content: DiskContent, block: Block, writer: ImageWriter, checksums: list[tuple[int, str]]
) -> None:
    pieces = await content.read(block)
    parts = [Part(offset, len(data), DATA, data) for offset, data in pieces]
    write = await asyncio.to_thread(writer.prepare, parts)
    await write()
    found = await asyncio.to_thread(checksum, [data for _, data in pieces])
    checksums.append((block.number, found))
