"""Pulling: from exports into a new restore point of a backup directory.

What stands on the disk at which moment:

=====================  ===========================================================
begun                  journal; ``.partial`` files
every few seconds      data durable, then the journal says so
all blocks done        files durable under their own names, journal still there
complete               manifest in place, then the journal is removed
=====================  ===========================================================

Until the manifest is there nobody takes the files for a restore point, and the pull can
go on from its journal (:mod:`nbdfleece.backup.journal` says when).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Final

import numpy as np

from .. import __version__
from ..errors import StateError, UsageError
from ..extents import Extents
from ..qcow2.create import create_image
from ..qcow2.image import Qcow2Image
from .blocks import ABSENT, DATA, ZEROES, Block, cut_blocks, layer_extents, ranges_of
from .directory import PARTIAL_SUFFIX, BackupDirectory, check_point_name, disk_file_name
from .errors import InterruptedPullError, ServerError
from .journal import DiskHead, DoneBlock, Head, Journal
from .manifest import (
    BLOCK_BYTES,
    DiskEntry,
    Point,
    checksum,
    file_checksum,
    layer_pairs,
    sync_directory,
)
from .rate import RateLimit
from .source import CONNECTIONS_DEFAULT, Source, read_as_dirty_from
from .transfer import Progress, ReportProgress, Transfer, read_block

SAMPLE_BLOCKS: Final = 16
"""Blocks read again before a cut pull goes on."""

JOURNAL_SECONDS: Final = 5.0
"""How often what is done is made durable: the most that is pulled twice."""

_SECTOR: Final = 512
"""QEMU's disks are whole sectors; a file for one that is not is rounded up."""


class Resume(Enum):
    """What to do about a cut pull of the same restore point."""

    IF_SAME = "if-same"
    """Go on if the frozen view proves to be the same by its identity; otherwise refuse."""
    TRUST = "trust"
    """Go on: the user knows that the server still shows the same view."""
    RESTART = "restart"
    """Throw away what was pulled and start over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRequest:
    """A disk to pull.

    Attributes:
        name: What to call it in the backup.
        uri: The export.
        bitmap: The context that tells what changed since ``parent`` (by its full name); None
            for everything.
        parent: The restore point to build on; None for a full one.
        reason: Why it is to be full although an increment was asked for.
        identity: Something that is different for every frozen view, if there is such a thing.
    """

    name: str
    uri: str
    bitmap: str | None = None
    parent: Point | None = None
    reason: str | None = None
    identity: str | None = None

    def __post_init__(self) -> None:
        if (self.bitmap is None) != (self.parent is None):
            raise UsageError(f"disk {self.name!r}: an increment needs a bitmap and a parent")


@dataclass(frozen=True, slots=True, kw_only=True)
class PullOptions:
    """How to pull.

    Attributes:
        connections: To each server, at most.
        resume: What to do about a cut pull.
        limit: Bytes per second.
        progress: Called in the loop's thread, after every block.
        journal_seconds: How often what is done is made durable.
    """

    connections: int = CONNECTIONS_DEFAULT
    resume: Resume = Resume.IF_SAME
    limit: RateLimit = field(default_factory=RateLimit)
    progress: ReportProgress | None = None
    journal_seconds: float = JOURNAL_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What pulling a disk would mean, in bytes; ``zero_bytes`` are written but not read."""

    disk: str
    size: int
    read_bytes: int
    zero_bytes: int
    reason: str | None


@dataclass(slots=True)
class _DiskPull:
    """A disk while it is pulled."""

    request: DiskRequest
    source: Source
    layer: Extents
    path: Path
    done: dict[int, DoneBlock] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        return self.request.parent is None

    def head(self) -> DiskHead:
        """What this pull is about, for the journal."""
        request, layer = self.request, self.layer
        parent = request.parent
        return DiskHead(
            name=request.name,
            size=self.source.size,
            kind="full" if parent is None else "incremental",
            parent=None if parent is None else parent.name,
            bitmap=request.bitmap,
            extents_blake2b=checksum([layer.lengths.tobytes(), layer.status.tobytes()]),
            identity=request.identity,
        )


async def estimate(
    requests: Sequence[DiskRequest], *, connections: int = CONNECTIONS_DEFAULT
) -> list[Estimate]:
    """Find out what a pull would read, and read nothing.

    Raises:
        ServerError: A server fails or cannot be trusted.
    """
    async with AsyncExitStack() as stack:
        disks = [await _open_disk(stack, Path(), request, connections) for request in requests]
    return [
        Estimate(
            disk=disk.request.name,
            size=disk.source.size,
            read_bytes=int(disk.layer.lengths[disk.layer.status == DATA].sum()),
            zero_bytes=int(disk.layer.lengths[disk.layer.status == ZEROES].sum()),
            reason=disk.request.reason,
        )
        for disk in disks
    ]


async def pull(
    requests: Sequence[DiskRequest],
    directory: BackupDirectory,
    *,
    point: str,
    checkpoint: str | None = None,
    checkpoint_created: float | None = None,
    options: PullOptions | None = None,
) -> Point:
    """Pull disks into a new restore point, or go on with a cut pull of it.

    Args:
        requests: The disks; all exports must show the same instant.
        directory: Where to; it is made if it is not there.
        point: What to call the restore point.
        checkpoint: The server's checkpoint made with the snapshot: the next increment asks
            for what changed since then.
        checkpoint_created: When the server made it, in seconds since the epoch, if known.
        options: How.

    Returns:
        The restore point, complete and durable.

    Raises:
        StateError: The restore point exists, or another pull is under way, or a cut one cannot
            go on.
        InterruptedPullError: It was cut; it can go on.
        ServerError: A server fails or cannot be trusted, and nothing was begun.
        OSError: The directory cannot be written, and nothing was begun.
    """
    options = options or PullOptions()
    check_point_name(point)
    _check_names(requests)
    directory.create()
    with directory.writing(), directory.reading():
        if directory.has(point):
            raise StateError(f"{directory.path}: restore point {point!r} exists already")
        async with AsyncExitStack() as stack:
            disks = [
                await _open_disk(
                    stack,
                    directory.path / disk_file_name(point, request.name),
                    request,
                    options.connections,
                )
                for request in requests
            ]
            head = Head(
                point=point,
                checkpoint=checkpoint,
                checkpoint_created=checkpoint_created,
                started=datetime.now(UTC),
                disks=[disk.head() for disk in disks],
            )
            journal = await _begin(directory, head, disks, options)
            stack.callback(journal.close)
            return await _run(directory, journal, disks, options)


def _check_names(requests: Sequence[DiskRequest]) -> None:
    names = [request.name for request in requests]
    if not names or len(set(names)) != len(names):
        raise UsageError("a pull needs at least one disk, and every disk a name of its own")


async def _open_disk(
    stack: AsyncExitStack, path: Path, request: DiskRequest, connections: int
) -> _DiskPull:
    """Connect to a disk's server and find out what is to be pulled."""
    source = await Source.open(request.uri, dirty_bitmap=request.bitmap, connections=connections)
    stack.push_async_callback(source.close)
    merged = await source.extents()
    if request.parent is not None:
        # What is new at the end of a disk that has grown is clean in QEMU's bitmap.
        merged = read_as_dirty_from(merged, request.parent.disk(request.name).size)
    layer = layer_extents(merged, is_full=request.parent is None)
    return _DiskPull(request, source, layer, path)


async def _begin(
    directory: BackupDirectory, head: Head, disks: list[_DiskPull], options: PullOptions
) -> Journal:
    """The journal of a cut pull that goes on, or a new one with new files."""
    path = directory.journal_path(head.point)
    if path.exists() and options.resume is not Resume.RESTART:
        journal = Journal.open(path)
        if journal.done:
            try:
                await _go_on(journal, head, disks, options.resume)
            except BaseException:
                journal.close()
                raise
            return journal
        journal.close()
    discard(directory, head.point)
    journal = Journal.create(path, head)
    try:
        for disk in disks:
            await _create_file(disk)
    except BaseException:
        journal.close()
        discard(directory, head.point)
        raise
    return journal


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


async def _create_file(disk: _DiskPull) -> None:
    parent = disk.request.parent
    backing = None if parent is None else parent.disk(disk.request.name).file
    await create_image(
        _partial(disk.path),
        image_size(disk.source.size),
        backing_file=backing,
        backing_format=None if backing is None else "qcow2",
    )


def image_size(size: int) -> int:
    """Bytes of the image for a disk."""
    return -(-size // _SECTOR) * _SECTOR


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL_SUFFIX)


async def _go_on(journal: Journal, head: Head, disks: list[_DiskPull], resume: Resume) -> None:
    """Take over what a cut pull has done, if what is left can be added to it.

    Raises:
        StateError: It cannot; the text says why.
    """
    _check_same(journal.head, head, resume)
    for block in journal.done:
        disks[block.disk].done[block.number] = block
    for disk in disks:
        if disk.path.exists():  # cut between its renaming and the manifest
            disk.path.rename(_partial(disk.path))
        await _check_sample(disk, head.point)


def _check_same(old: Head, new: Head, resume: Resume) -> None:
    """Whether two pulls are about the same; see :mod:`nbdfleece.backup.journal`."""
    refusal = f"the cut pull of {new.point!r} cannot go on (--restart begins it anew): "
    if [disk.name for disk in old.disks] != [disk.name for disk in new.disks]:
        raise StateError(refusal + "it was of other disks")
    if old.checkpoint != new.checkpoint:
        raise StateError(refusal + f"it was to be checkpoint {old.checkpoint!r}")
    for before, now in zip(old.disks, new.disks, strict=True):
        for what in ("size", "kind", "parent", "bitmap", "extents_blake2b"):
            if getattr(before, what) != getattr(now, what):
                shown = "the changes that the server tells" if what == "extents_blake2b" else what
                raise StateError(refusal + f"{shown} of disk {now.name!r} is not what it was")
        if before.identity != now.identity:
            raise StateError(refusal + f"disk {now.name!r} is another snapshot than before")
        if now.identity is None and resume is not Resume.TRUST:
            raise StateError(
                f"there is a cut pull of {new.point!r}: go on with --resume if the server still"
                " shows the same snapshot, or begin anew with --restart"
            )


async def _check_sample(disk: _DiskPull, point: str) -> None:
    """Read some blocks again that are done, and compare."""
    done = [block for block in disk.done.values() if block.checksum is not None]
    for block in random.sample(done, min(SAMPLE_BLOCKS, len(done))):
        extents = Extents.from_pairs(block.extents)
        ranges = ranges_of(block.number * BLOCK_BYTES, extents)
        again = Block(block.number, ranges)
        content = bytearray(again.data_bytes)
        await read_block(disk.source, again, memoryview(content))
        if checksum([memoryview(content)]) != block.checksum:
            raise StateError(
                f"the cut pull of {point!r} cannot go on (--restart begins it anew):"
                f" disk {disk.request.name!r} has other content now"
            )


async def _run(
    directory: BackupDirectory, journal: Journal, disks: list[_DiskPull], options: PullOptions
) -> Point:
    """Pull what is left, and complete the restore point."""
    try:
        for number, disk in enumerate(disks):
            await _pull_disk(journal, number, disk, options)
        entries = [await asyncio.to_thread(_finish_file, disk) for disk in disks]
        point = Point(
            name=journal.head.point,
            parent=next((disk.parent for disk in entries if disk.parent is not None), None),
            checkpoint=journal.head.checkpoint,
            checkpoint_created=journal.head.checkpoint_created,
            started=journal.head.started,
            finished=datetime.now(UTC),
            tool=f"nbdfleece {__version__}",
            disks=entries,
        )
        directory.publish(point)
    except (ServerError, OSError) as error:
        raise InterruptedPullError(
            f"the pull of {journal.head.point!r} was cut and can go on: {error}"
        ) from error
    journal.path.unlink()
    sync_directory(directory.path)
    return point


async def _pull_disk(journal: Journal, number: int, disk: _DiskPull, options: PullOptions) -> None:
    """Pull the blocks of a disk that are not done; all are durable on return."""
    image = await Qcow2Image.open(_partial(disk.path), read_only=False)
    keeper = _Keeper(journal, image, disk, options)
    try:
        transfer = Transfer(disk.source, image, number, options.limit, keeper.note)
        keeping = asyncio.create_task(keeper.keep())
        try:
            blocks = (block for block in cut_blocks(disk.layer) if block.number not in disk.done)
            await transfer.run(blocks)
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            await keeper.save()
    finally:
        await image.close()


class _Keeper:
    """Makes durable what is done, and keeps the journal and the progress."""

    def __init__(
        self, journal: Journal, image: Qcow2Image, disk: _DiskPull, options: PullOptions
    ) -> None:
        self._journal = journal
        self._image = image
        self._disk = disk
        self._options = options
        self._unsaved: list[DoneBlock] = []
        self._total = int(disk.layer.lengths[disk.layer.status != ABSENT].sum())
        self._moved = sum(map(_moved_bytes, disk.done.values()))
        self._report()

    def note(self, block: DoneBlock) -> None:
        """A block is written."""
        self._unsaved.append(block)
        self._moved += _moved_bytes(block)
        self._report()

    def _report(self) -> None:
        if self._options.progress is not None:
            name = self._disk.request.name
            self._options.progress(Progress(name, self._moved, self._total))

    async def keep(self) -> None:
        """Save again and again, until cancelled."""
        while True:
            await asyncio.sleep(self._options.journal_seconds)
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


def _moved_bytes(block: DoneBlock) -> int:
    return sum(length for length, status in block.extents if status)


def _finish_file(disk: _DiskPull) -> DiskEntry:
    """Give a disk's file its name, durably, and describe it."""
    partial = _partial(disk.path)
    file_blake2b = file_checksum(partial)
    file_size = partial.stat().st_size
    partial.rename(disk.path)
    sync_directory(disk.path.parent)
    head = disk.head()
    return DiskEntry(
        name=head.name,
        size=head.size,
        kind=head.kind,
        parent=head.parent,
        reason=disk.request.reason,
        uri=disk.request.uri,
        bitmap=head.bitmap,
        file=disk.path.name,
        file_size=file_size,
        file_blake2b=file_blake2b,
        block_size=BLOCK_BYTES,
        blocks=[
            (number, block.checksum)
            for number, block in sorted(disk.done.items())
            if block.checksum is not None
        ],
        extents=_final_extents(disk),
        read_bytes=sum(block.read_bytes for block in disk.done.values()),
    )


def _final_extents(disk: _DiskPull) -> list[tuple[int, int]]:
    """What the file says of the whole disk: as was found in the blocks, nothing elsewhere."""
    parts: list[Extents] = []
    offset = 0
    for number, block in sorted(disk.done.items()):
        begin = number * BLOCK_BYTES
        if begin > offset:
            parts.append(Extents.single(begin - offset, ABSENT))
        extents = Extents.from_pairs(block.extents)
        if disk.is_full:
            extents = extents.with_status(np.where(extents.status == DATA, extents.status, 0))
        parts.append(extents)
        offset = begin + extents.total()
    if offset < disk.source.size:
        parts.append(Extents.single(disk.source.size - offset, ABSENT))
    return layer_pairs(parts)
