"""Verifying: that a backup is what was pulled, without restoring it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import numpy as np

from ..errors import NbdfleeceError
from .block_status import overlay
from .blocks import Block, cut_blocks, layer_extents
from .connection import TIMEOUT_SECONDS
from .content import DiskContent, Layer
from .directory import BackupDirectory
from .errors import ServerError
from .manifest import BLOCK_BYTES, DiskEntry, Point, file_checksum
from .source import CONNECTIONS_DEFAULT, Source
from .tasks import Crew, gather
from .transfer import BLOCK_COST_MIN, IN_FLIGHT_BYTES_MAX, Progress, ReportProgress

_DIFFERENCES_MAX: Final = 1000
"""Ranges that are listed when a restore point differs; more are only counted."""

_CLUSTER_BYTES: Final = 65536

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was found out about a backup.

    Attributes:
        points: Names of the restore points looked at.
        files: How many files were read whole.
        blocks: How many checksums of blocks were compared.
        problems: What is wrong, one line each; none if all is well.
    """

    points: list[str]
    files: int
    blocks: int
    problems: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How a disk of a restore point differs from an export.

    Attributes:
        disk: The disk's name.
        bytes_compared: Bytes that were read on both sides; the rest is zero on both.
        ranges: Offset and length of what differs, whole clusters, at most 1000.
        bytes_different: Of all ranges.
    """

    disk: str
    bytes_compared: int
    ranges: list[tuple[int, int]]
    bytes_different: int


async def verify(
    directory: BackupDirectory,
    points: Sequence[str] | None = None,
    *,
    progress: ReportProgress | None = None,
) -> Verified:
    """Check restore points and the chains that they stand on: every file, every checksum.

    Args:
        directory: The backup.
        points: Names; None for all.
        progress: Called as files are done; ``done`` and ``total`` are bytes of files.

    Returns:
        What was found; look at ``problems``.

    Raises:
        StateError: A prune is under way.
        BackupError: There is no such directory.
    """
    with directory.reading():
        work = _Verify(directory, progress)
        names = directory.point_names() if points is None else list(points)
        await work.run(names)
    return Verified(points=names, files=work.files, blocks=work.blocks, problems=work.problems)


class _Verify:
    """A verification under way."""

    def __init__(self, directory: BackupDirectory, progress: ReportProgress | None) -> None:
        self._directory = directory
        self._progress = progress
        self._points: dict[str, Point | None] = {}
        self._done_bytes = 0
        self._total_bytes = 0
        self.files = 0
        self.blocks = 0
        self.problems: list[str] = []

    async def run(self, names: Sequence[str]) -> None:
        """Check points, and what they stand on, each once."""
        for name in names:
            self._load(name)
        points = [point for point in self._points.values() if point is not None]
        self._total_bytes = sum(disk.file_size for point in points for disk in point.disks)
        for point in points:
            for entry in point.disks:
                await self._check_disk(point, entry)

    def _load(self, first: str) -> None:
        """Load a point and its parents; what cannot be loaded is a problem."""
        names: list[str | None] = [first]
        while names:
            name = names.pop()
            if name is None or name in self._points:
                continue
            point = self._points[name] = self._catch(partial(self._directory.point, name))
            if point is not None:
                names += [disk.parent for disk in point.disks]

    def _catch(self, action: Callable[[], _Result]) -> _Result | None:
        try:
            return action()
        except (NbdfleeceError, OSError) as error:
            self.problems.append(str(error))
            return None

    async def _check_disk(self, point: Point, entry: DiskEntry) -> None:
        found = await asyncio.to_thread(self._catch, partial(self._check_file, entry))
        self._done_bytes += entry.file_size
        if self._progress is not None:
            self._progress(Progress(entry.name, self._done_bytes, self._total_bytes))
        if found is None:
            return
        try:
            content = await DiskContent.open(self._directory, point, entry.name)
        except (NbdfleeceError, OSError) as error:
            self.problems.append(str(error))
            return
        try:
            await self._check_blocks(content.layers[0])
        finally:
            await content.close()

    def _check_file(self, entry: DiskEntry) -> bool:
        """Whether there is a file to look into; what is wrong with its bytes is noted."""
        path = self._directory.file_path(entry)
        size = path.stat().st_size
        if size != entry.file_size:
            self.problems.append(f"{path}: has {size} bytes instead of {entry.file_size}")
        elif file_checksum(path) != entry.file_blake2b:
            self.problems.append(f"{path}: the checksum of the file is wrong")
        self.files += 1
        return True

    async def _check_blocks(self, layer: Layer) -> None:
        self._catch(layer.check_complete)
        async with Crew(IN_FLIGHT_BYTES_MAX, BLOCK_COST_MIN) as crew:
            for number, block in layer.blocks.items():
                await crew.start(block.data_bytes, partial(self._check_block, layer, number))

    async def _check_block(self, layer: Layer, number: int) -> None:
        try:
            await layer.read(number)
        except (NbdfleeceError, OSError) as error:
            self.problems.append(str(error))
        self.blocks += 1


async def compare(
    directory: BackupDirectory,
    point: Point,
    disk: str,
    uri: str,
    *,
    connections: int = CONNECTIONS_DEFAULT,
    timeout_seconds: float | None = TIMEOUT_SECONDS,
    progress: ReportProgress | None = None,
) -> Difference:
    """Compare a disk of a restore point with an export, byte by byte.

    What both sides know to be zero is not read; the restore point's bytes are checked.

    Args:
        directory: The backup.
        point: The restore point.
        disk: The disk's name.
        uri: The export; a snapshot, or something else that holds still.
        connections: To the server, at most.
        timeout_seconds: How long it may be silent while it owes answers; None for ever.
        progress: Called after every block.

    Returns:
        Where they differ.

    Raises:
        BackupError: The chain is broken, or a checksum is wrong.
        ServerError: The server fails, or its export has another size.
    """
    with directory.reading():
        content = await DiskContent.open(directory, point, disk)
        try:
            source = await Source.open(
                uri, connections=connections, timeout_seconds=timeout_seconds
            )
            try:
                if source.size != content.size:
                    raise ServerError(
                        f"{uri}: has {source.size} bytes, disk {disk!r} {content.size}"
                    )
                return await _Comparison(content, source, progress).run()
            finally:
                await source.close()
        finally:
            await content.close()


class _Comparison:
    """A comparison under way."""

    def __init__(
        self, content: DiskContent, source: Source, progress: ReportProgress | None
    ) -> None:
        self._content = content
        self._source = source
        self._progress = progress
        self._different: list[tuple[int, int]] = []
        self._compared = 0
        self._total = 0

    async def run(self) -> Difference:
        there = layer_extents(await self._source.extents(), is_full=True)
        here, there = overlay(self._content.extents, there)
        is_any = (here.status | there.status) != 0
        self._total = int(here.lengths[is_any].sum())
        both = here.with_status(is_any.astype(np.uint32))
        mine = {block.number: block for block in self._content.blocks()}
        async with Crew(IN_FLIGHT_BYTES_MAX, BLOCK_COST_MIN) as crew:
            for block in cut_blocks(both):
                here_too = mine.get(block.number)
                cost = 2 * BLOCK_BYTES
                if here_too is not None:
                    cost += self._content.read_bytes(here_too)
                await crew.start(cost, partial(self._compare, block, here_too))
        ranges = _joined(sorted(self._different))
        return Difference(
            disk=self._content.name,
            bytes_compared=self._compared,
            ranges=ranges[:_DIFFERENCES_MAX],
            bytes_different=sum(length for _, length in ranges),
        )

    async def _compare(self, block: Block, mine: Block | None) -> None:
        begin = block.number * BLOCK_BYTES
        length = sum(part.length for part in block.ranges)
        here, there = bytearray(length), bytearray(length)
        for piece in await self._content.read(mine) if mine is not None else []:
            here[piece.offset - begin : piece.offset - begin + len(piece.data)] = piece.data
        view = memoryview(there)
        await gather(
            self._source.read_into(part.offset, view[part.offset - begin :][: part.length])
            for part in block.ranges
            if part.status
        )
        if here != there:
            self._different += _differing(begin, here, there)
        self._compared += block.data_bytes
        if self._progress is not None:
            self._progress(Progress(self._content.name, self._compared, self._total))


def _differing(begin: int, here: bytearray, there: bytearray) -> list[tuple[int, int]]:
    """The clusters that differ."""
    return [
        (begin + start, len(here[start : start + _CLUSTER_BYTES]))
        for start in range(0, len(here), _CLUSTER_BYTES)
        if here[start : start + _CLUSTER_BYTES] != there[start : start + _CLUSTER_BYTES]
    ]


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours joined."""
    joined: list[tuple[int, int]] = []
    for offset, length in ranges:
        if joined and joined[-1][0] + joined[-1][1] == offset:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((offset, length))
    return joined
