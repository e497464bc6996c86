"""Streams back: into a backup directory, or straight to a target.

Whatever a stream says is checked before it is believed; one that was cut or is damaged leaves
no restore point, and no new file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import BinaryIO

import numpy as np

from ..errors import StateError
from ..extents import Extents
from ..qcow2.image import Qcow2Image
from .block_status import overlay
from .blocks import DATA, ZEROES
from .building import DiskBuild, complete, discard
from .compress import ImageWriter, Part
from .directory import BackupDirectory, check_point_name, disk_file_name
from .errors import BackupError
from .journal import DiskHead, DoneBlock, Head, Journal
from .manifest import BLOCK_BYTES, Compression, Point, checksum, sync_directory
from .rate import RateLimit
from .restore import ZERO_BYTES_MAX, Restored
from .stream import StreamBlock, StreamDisk, StreamHead, StreamReader, decode
from .target import Target
from .tasks import Crew
from .transfer import BLOCK_COST_MIN, IN_FLIGHT_BYTES_MAX, Progress, ReportProgress

OpenTarget = Callable[[StreamHead], Awaitable[tuple[Target, str]]]
"""Opens the target for what a stream brings, and says which disk of it is wanted."""


async def import_stream(
    directory: BackupDirectory,
    file: BinaryIO,
    *,
    compression: Compression | None = None,
    progress: ReportProgress | None = None,
) -> list[Point]:
    """Make restore points of streams that follow one another.

    Args:
        directory: Where to; it is made if it is not there.
        file: The streams; read in a thread.
        compression: How to compress the clusters that become smaller; None for not at all.
        progress: Called after every block; the total is not known before the end.

    Returns:
        The restore points, complete and durable.

    Raises:
        BackupError: A stream is cut or damaged, or what it builds on is not there; restore
            points of streams before it are complete.
        StateError: The restore point exists, or another pull is under way.
        OSError: The directory cannot be written.
    """
    directory.create()
    reader = StreamReader(file)
    points = []
    with directory.writing(), directory.reading():
        while (head := await asyncio.to_thread(reader.head)) is not None:
            importing = _Import(directory, reader, head, compression, progress)
            points.append(await importing.run())
    if not points:
        raise BackupError("there is no stream of restore points in the input")
    return points


class _Import:
    """One stream on its way into a directory."""

    def __init__(
        self,
        directory: BackupDirectory,
        reader: StreamReader,
        head: StreamHead,
        compression: Compression | None,
        progress: ReportProgress | None,
    ) -> None:
        self._directory = directory
        self._reader = reader
        self._head = head
        self._compression = compression
        self._progress = progress
        self._moved: dict[str, int] = {}
        self._writers: list[ImageWriter] = []
        self._builds = [self._build(disk) for disk in head.disks]

    def _build(self, disk: StreamDisk) -> DiskBuild:
        """What is to be made of a disk.

        Raises:
            BackupError: The restore point that it builds on is not there.
        """
        point = check_point_name(self._head.point)
        parent = None if disk.parent is None else self._directory.find(disk.parent)
        if (parent is None) != (disk.kind == "full"):
            raise BackupError(f"the stream cannot be meant: kind and parent of {disk.name!r}")
        head = DiskHead(
            name=disk.name,
            size=disk.size,
            kind=disk.kind,
            parent=None if parent is None else parent.name,
            bitmap=disk.bitmap,
            extents_blake2b=checksum([]),
            identity=None,
            compression=self._compression,
        )
        if parent is not None:
            parent.disk(disk.name)
            _check_same_checkpoint(disk, parent.checkpoint_created)
        path = self._directory.path / disk_file_name(point, disk.name)
        return DiskBuild(head, path, parent, disk.uri, disk.reason)

    async def run(self) -> Point:
        """Make the restore point, or leave nothing of it."""
        directory, head = self._directory, self._head
        if directory.has(head.point):
            raise StateError(f"{directory.path}: restore point {head.point!r} exists already")
        discard(directory, head.point)
        journal = Journal.create(directory.journal_path(head.point), self._journal_head())
        try:
            for build in self._builds:
                await build.create_file()
            await self._read_all()
            self._check_growth()
            point = await complete(directory, journal, self._builds)
        except BaseException:
            if not directory.has(head.point):
                discard(directory, head.point)
            raise
        finally:
            journal.close()
        journal.path.unlink()
        sync_directory(directory.path)
        return point

    def _journal_head(self) -> Head:
        head = self._head
        return Head(
            point=head.point,
            checkpoint=head.checkpoint,
            checkpoint_created=head.checkpoint_created,
            started=head.started,
            disks=[build.head for build in self._builds],
        )

    async def _read_all(self) -> None:
        """Write all blocks; they are durable on return."""
        async with AsyncExitStack() as stack:
            for build in self._builds:
                image = await Qcow2Image.open(build.partial, read_only=False)
                stack.push_async_callback(image.close)
                size, is_full = build.head.size, build.is_full
                self._writers.append(
                    ImageWriter(image, self._compression, is_full=is_full, disk_size=size)
                )
            await read_blocks(self._reader, self._take)

    async def _take(self, block: StreamBlock, payload: bytes) -> None:
        writer, build = self._writers[block.disk], self._builds[block.disk]

        def prepare() -> Callable[[], Awaitable[None]]:
            return writer.prepare(parts_of(block, decode(block, payload)))

        write = await asyncio.to_thread(prepare)
        await write()
        build.done[block.number] = DoneBlock(
            block.disk, block.number, block.checksum, block.extents, block.read_bytes
        )
        if self._progress is not None:
            name = build.head.name
            self._moved[name] = self._moved.get(name, 0) + block.data_bytes
            self._progress(Progress(name, self._moved[name], build.head.size))

    def _check_growth(self) -> None:
        """Whether all that is new at the end of a disk is there.

        Raises:
            BackupError: The disk has grown, and who made the stream did not know.
        """
        for disk, build in zip(self._head.disks, self._builds, strict=True):
            if build.parent is None:
                continue
            size = build.parent.disk(disk.name).size
            if disk.size > size and disk.parent_size != size and not _covers(build, size):
                raise BackupError(
                    f"disk {disk.name!r} has grown since {build.parent.name!r}, and the stream"
                    " does not have all that is new: pull it in full"
                )


def _check_same_checkpoint(disk: StreamDisk, created: float | None) -> None:
    """Whether the changes are those since the checkpoint that the parent was made with.

    Raises:
        BackupError: Another checkpoint has its name by now.
    """
    if created is not None and disk.parent_created not in (None, created):
        raise BackupError(
            f"the stream has the changes since another checkpoint {disk.parent!r} than the one"
            " that the restore point was made with: pull in full"
        )


def _covers(build: DiskBuild, begin: int) -> bool:
    """Whether the blocks say something of each byte of a disk from somewhere on."""
    for number in range(begin // BLOCK_BYTES, -(-build.head.size // BLOCK_BYTES)):
        block = build.done.get(number)
        offset = number * BLOCK_BYTES
        for length, status in [] if block is None else block.extents:
            offset += length
            if not status and offset > begin:
                return False
        if block is None:
            return False
    return True


def parts_of(block: StreamBlock, data: memoryview) -> list[Part]:
    """A block of a stream with its bytes."""
    parts = []
    offset, position = block.number * BLOCK_BYTES, 0
    for length, status in block.extents:
        content = data[position : position + length] if status == DATA else None
        parts.append(Part(offset, length, status, content))
        offset += length
        position += length if status == DATA else 0
    return parts


async def read_blocks(
    reader: StreamReader, take: Callable[[StreamBlock, bytes], Awaitable[None]]
) -> None:
    """Have all blocks of a stream taken, several at a time.

    Raises:
        BackupError: The stream is cut or damaged.
    """
    async with Crew(IN_FLIGHT_BYTES_MAX, BLOCK_COST_MIN) as crew:
        while (found := await asyncio.to_thread(reader.block)) is not None:
            block, payload = found

            async def work(block: StreamBlock = block, payload: bytes = payload) -> None:
                await take(block, payload)

            await crew.start(block.data_bytes, work)


async def restore_stream(
    file: BinaryIO,
    open_target: OpenTarget,
    *,
    limit: RateLimit | None = None,
    progress: ReportProgress | None = None,
) -> Restored:
    """Write a disk of a full stream, and of the increments that follow it, to a target.

    Args:
        file: The streams; read in a thread.
        open_target: Opens the target once the first head is known.
        limit: Bytes per second that are written.
        progress: Called after every block; the total is not known before the end.

    Returns:
        What was done, of the last stream's point; all of it is durable.

    Raises:
        BackupError: A stream is cut or damaged, or builds on another one than that before it;
            a new file is removed, what was there before stays half written.
        ServerError, OSError: The target failed.
    """
    reader = StreamReader(file)
    head = await asyncio.to_thread(reader.head)
    if head is None:
        raise BackupError("there is no stream of restore points in the input")
    target, disk = await open_target(head)
    try:
        restoring = _StreamRestore(reader, target, disk, limit or RateLimit(), progress)
        while head is not None:
            restored = await restoring.run(head)
            head = await asyncio.to_thread(reader.head)
        await target.finish()
    except BaseException:
        await target.abort()
        raise
    return restored


class _StreamRestore:
    """Streams on their way to a target."""

    def __init__(
        self,
        reader: StreamReader,
        target: Target,
        disk: str,
        limit: RateLimit,
        progress: ReportProgress | None,
    ) -> None:
        self._reader = reader
        self._target = target
        self._disk = disk
        self._limit = limit
        self._progress = progress
        self._before: StreamHead | None = None
        self._written = self._zeroed = 0
        self._found: dict[int, StreamBlock] = {}

    async def run(self, head: StreamHead) -> Restored:
        """Write one stream's disk."""
        number, disk = self._choose(head)
        self._found = {}
        await read_blocks(self._reader, partial(self._take, number))
        if disk.kind == "full":
            await self._zero_rest(disk.size)
        self._before = head
        size = disk.size
        skipped = max(0, size - self._written - self._zeroed)
        return Restored(self._disk, head.point, size, self._written, self._zeroed, skipped)

    def _choose(self, head: StreamHead) -> tuple[int, StreamDisk]:
        """The disk in a stream, which must go on where the one before has ended."""
        for number, disk in enumerate(head.disks):
            if disk.name == self._disk:
                self._check_order(head, disk)
                return number, disk
        raise BackupError(f"the stream of {head.point!r} has no disk {self._disk!r}")

    def _check_order(self, head: StreamHead, disk: StreamDisk) -> None:
        if (disk.kind == "full") != (disk.parent is None):
            raise BackupError(f"the stream cannot be meant: kind and parent of {disk.name!r}")
        before = self._before
        if before is None:
            if disk.parent is not None:
                raise BackupError(
                    f"the stream of {head.point!r} builds on {disk.parent!r}, which must come"
                    " before it, or be in the directory that it is imported to"
                )
            return
        if disk.parent is None or disk.parent not in (before.point, before.checkpoint):
            raise BackupError(
                f"the stream of {head.point!r} does not build on {before.point!r} before it"
            )
        _check_same_checkpoint(disk, before.checkpoint_created)
        if any(each.name == disk.name and each.size != disk.size for each in before.disks):
            raise BackupError(f"disk {disk.name!r} changes its size: import the streams first")

    async def _take(self, number: int, block: StreamBlock, payload: bytes) -> None:
        data = await asyncio.to_thread(decode, block, payload)
        if block.disk != number:
            return
        self._found[block.number] = block
        await self._limit.take(len(data))
        for part in parts_of(block, data):
            if part.data is not None:
                await self._target.write(part.offset, part.data)
                self._written += part.length
            elif part.status == ZEROES:
                await self._zero(part.offset, part.length)
        if self._progress is not None:
            self._progress(Progress(self._disk, self._written, self._target.size))

    async def _zero(self, offset: int, length: int) -> None:
        for start in range(offset, offset + length, ZERO_BYTES_MAX):
            count = min(ZERO_BYTES_MAX, offset + length - start)
            await self._target.write_zeroes(start, count)
        self._zeroed += length

    async def _zero_rest(self, size: int) -> None:
        """Zero what is no data, where the target is not known to be zero."""
        if not size:
            return
        written = layer_of(self._found, size)
        known = (await self._target.known_zeroes()).clipped(size)
        written, known = overlay(written, known)
        offset = 0
        for length, is_data, is_zero in zip(
            written.lengths.tolist(), written.status.tolist(), known.status.tolist(), strict=True
        ):
            if not is_data and not is_zero:
                await self._zero(offset, length)
            offset += length


def layer_of(found: dict[int, StreamBlock], size: int) -> Extents:
    """What some blocks wrote of a disk: status 1, else 0."""
    parts: list[Extents] = []
    offset = 0
    for number, block in sorted(found.items()):
        begin = number * BLOCK_BYTES
        if begin > offset:
            parts.append(Extents.single(begin - offset, 0))
        parts.append(Extents.from_pairs(block.extents))
        offset = begin + parts[-1].total()
    if offset < size:
        parts.append(Extents.single(size - offset, 0))
    layer = Extents.concatenate(parts)
    return layer.with_status((layer.status != 0).astype(np.uint32))
