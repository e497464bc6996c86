"""Pulling: from exports into a new restore point of a backup directory.

:mod:`nbdfleece.backup.building` has what stands on the disk at which moment. Until the
manifest is there the pull can go on from its journal
(:mod:`nbdfleece.backup.journal` says when).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Final

from ..errors import ImageError, StateError, UsageError
from ..extents import Extents
from ..qcow2.image import Qcow2Image
from .blocks import ABSENT, DATA, ZEROES, Block, cut_blocks, layer_extents, ranges_of
from .building import DiskBuild, Keeper, complete, discard, drop_leaks
from .compress import ImageWriter
from .connection import TIMEOUT_SECONDS
from .directory import BackupDirectory, check_point_name, disk_file_name
from .errors import InterruptedPullError, ServerError
from .journal import DiskHead, DoneBlock, Head, Journal
from .manifest import BLOCK_BYTES, Compression, Point, checksum, sync_directory
from .rate import RateLimit
from .source import CONNECTIONS_DEFAULT, Source, read_as_dirty_from
from .transfer import ImageSink, Progress, ReportProgress, Transfer, read_block

SAMPLE_BLOCKS: Final = 16
"""Blocks read again before a cut pull goes on."""

JOURNAL_SECONDS: Final = 5.0
"""How often what is done is made durable: the most that is pulled twice."""


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
        compression: How to compress the clusters that become smaller; None for not at all.
        timeout_seconds: How long a server may be silent while it owes answers; None for ever.
    """

    connections: int = CONNECTIONS_DEFAULT
    resume: Resume = Resume.IF_SAME
    limit: RateLimit = field(default_factory=RateLimit)
    progress: ReportProgress | None = None
    journal_seconds: float = JOURNAL_SECONDS
    compression: Compression | None = None
    timeout_seconds: float | None = TIMEOUT_SECONDS


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
    build: DiskBuild


async def estimate(
    requests: Sequence[DiskRequest], *, options: PullOptions | None = None
) -> list[Estimate]:
    """Find out what a pull would read, and read nothing.

    Raises:
        ServerError: A server fails or cannot be trusted.
    """
    options = replace(options or PullOptions(), connections=1)
    async with AsyncExitStack() as stack:
        disks = [await _open_disk(stack, Path(), request, options) for request in requests]
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
                    options,
                )
                for request in requests
            ]
            head = Head(
                point=point,
                checkpoint=checkpoint,
                checkpoint_created=checkpoint_created,
                started=datetime.now(UTC),
                disks=[disk.build.head for disk in disks],
            )
            journal = await _begin(directory, head, disks, options)
            stack.callback(journal.close)
            return await _run(directory, journal, disks, options)


def _check_names(requests: Sequence[DiskRequest]) -> None:
    names = [request.name for request in requests]
    if not names or len(set(names)) != len(names):
        raise UsageError("a pull needs at least one disk, and every disk a name of its own")


async def _open_disk(
    stack: AsyncExitStack, path: Path, request: DiskRequest, options: PullOptions
) -> _DiskPull:
    """Connect to a disk's server and find out what is to be pulled."""
    parent = request.parent
    base_size = None if parent is None else parent.disk(request.name).size
    source, layer = await survey(stack, request.uri, request.bitmap, base_size, options)
    head = DiskHead(
        name=request.name,
        size=source.size,
        kind="full" if parent is None else "incremental",
        parent=None if parent is None else parent.name,
        bitmap=request.bitmap,
        extents_blake2b=checksum([layer.lengths.tobytes(), layer.status.tobytes()]),
        identity=request.identity,
        compression=options.compression,
    )
    build = DiskBuild(head, path, parent, request.uri, request.reason)
    return _DiskPull(request, source, layer, build)


async def survey(
    stack: AsyncExitStack,
    uri: str,
    bitmap: str | None,
    base_size: int | None,
    options: PullOptions,
) -> tuple[Source, Extents]:
    """Connect to an export, for as long as ``stack`` lasts, and find out what is to be pulled.

    Args:
        stack: Closes the connections.
        uri: The export.
        bitmap: The context that tells what changed; None for everything.
        base_size: Bytes that the disk had when the bitmap began, if known.
        options: How.

    Raises:
        ServerError: The server fails or cannot be trusted.
    """
    source = await Source.open(
        uri,
        dirty_bitmap=bitmap,
        connections=options.connections,
        timeout_seconds=options.timeout_seconds,
    )
    stack.push_async_callback(source.close)
    merged = await source.extents()
    if base_size is not None:
        # What is new at the end of a disk that has grown is clean in QEMU's bitmap.
        merged = read_as_dirty_from(merged, base_size)
    return source, layer_extents(merged, is_full=bitmap is None)


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
            await disk.build.create_file()
    except BaseException:
        journal.close()
        discard(directory, head.point)
        raise
    return journal


async def _go_on(journal: Journal, head: Head, disks: list[_DiskPull], resume: Resume) -> None:
    """Take over what a cut pull has done, if what is left can be added to it.

    Raises:
        StateError: It cannot; the text says why.
    """
    _check_same(journal.head, head, resume)
    for block in journal.done:
        disks[block.disk].build.done[block.number] = block
    for disk in disks:
        if disk.build.path.exists():  # cut between its renaming and the manifest
            disk.build.path.rename(disk.build.partial)
        await _check_sample(disk, head.point)
        try:
            await drop_leaks(disk.build.partial)
        except (OSError, ImageError) as error:
            raise StateError(f"{_refusal(head.point)}: {error}") from error


def _refusal(point: str) -> str:
    return f"the cut pull of {point!r} cannot go on (--restart begins it anew)"


def _check_same(old: Head, new: Head, resume: Resume) -> None:
    """Whether two pulls are about the same; see :mod:`nbdfleece.backup.journal`."""
    refusal = f"{_refusal(new.point)}: "
    if [disk.name for disk in old.disks] != [disk.name for disk in new.disks]:
        raise StateError(refusal + "it was of other disks")
    if old.checkpoint != new.checkpoint:
        raise StateError(refusal + f"it was to be checkpoint {old.checkpoint!r}")
    for before, now in zip(old.disks, new.disks, strict=True):
        for what in ("size", "kind", "parent", "bitmap", "compression", "extents_blake2b"):
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
    done = [block for block in disk.build.done.values() if block.checksum is not None]
    for block in random.sample(done, min(SAMPLE_BLOCKS, len(done))):
        extents = Extents.from_pairs(block.extents)
        ranges = ranges_of(block.number * BLOCK_BYTES, extents)
        again = Block(block.number, ranges)
        content = bytearray(again.data_bytes)
        await read_block(disk.source, again, memoryview(content))
        if checksum([memoryview(content)]) != block.checksum:
            raise StateError(f"{_refusal(point)}: disk {disk.request.name!r} has other content now")


async def _run(
    directory: BackupDirectory, journal: Journal, disks: list[_DiskPull], options: PullOptions
) -> Point:
    """Pull what is left, and complete the restore point."""
    try:
        for number, disk in enumerate(disks):
            await _pull_disk(journal, number, disk, options)
        point = await complete(directory, journal, [disk.build for disk in disks])
    except (ServerError, OSError) as error:
        raise InterruptedPullError(
            f"the pull of {journal.head.point!r} was cut and can go on: {error}"
        ) from error
    journal.path.unlink()
    sync_directory(directory.path)
    return point


async def _pull_disk(journal: Journal, number: int, disk: _DiskPull, options: PullOptions) -> None:
    """Pull the blocks of a disk that are not done; all are durable on return."""
    build = disk.build
    image = await Qcow2Image.open(build.partial, read_only=False)
    keeper = Keeper(journal, image, build, options.journal_seconds)
    tell = teller(disk.request.name, disk.layer, build.done.values(), options.progress)

    def on_done(block: DoneBlock) -> None:
        keeper.note(block)
        tell(block)

    try:
        size = disk.source.size
        writer = ImageWriter(image, options.compression, is_full=build.is_full, disk_size=size)
        transfer = Transfer(disk.source, ImageSink(writer), number, options.limit, on_done)
        keeping = asyncio.create_task(keeper.keep())
        try:
            blocks = (block for block in cut_blocks(disk.layer) if block.number not in build.done)
            await transfer.run(blocks)
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            await keeper.save()
    finally:
        await image.close()


def teller(
    disk: str, layer: Extents, done: Iterable[DoneBlock], progress: ReportProgress | None
) -> Callable[[DoneBlock], None]:
    """What counts the blocks of a disk and tells how far it is; it has told once on return."""
    total = int(layer.lengths[layer.status != ABSENT].sum())
    moved = 0

    def tell(*blocks: DoneBlock) -> None:
        nonlocal moved
        moved += sum(length for block in blocks for length, status in block.extents if status)
        if progress is not None:
            progress(Progress(disk, moved, total))

    tell(*done)
    return tell
