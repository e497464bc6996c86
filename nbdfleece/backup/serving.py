"""Restore points as block nodes: to boot or mount from a backup at once, without restoring it.

A disk of a restore point is read as its manifests say: which layer's file has each byte, and
what is zero. Every file is opened once, whatever number of points stand on it. Before the
first byte of a block is served, the block's checksum is compared; a damaged one is an error
for ever, the rest of the disk is served all the same.

The difference between two points is known from their manifests: what the layers say that
only one of them stands on. Points without a layer in common differ wherever one has data.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from functools import cached_property, partial
from typing import Final, NamedTuple

import numpy as np

from ..block.file import FileNode
from ..block.node import BlockNode, BlockStatus, block_status_word
from ..block.single_flight import SingleFlight
from ..errors import NbdfleeceError
from ..extents import Extents
from ..qcow2.header import Header
from ..qcow2.image import Qcow2Image
from .block_status import DIRTY_PREFIX, overlay
from .blocks import ABSENT
from .content import DiskContent, Layer
from .directory import BackupDirectory
from .errors import BackupError
from .manifest import BLOCK_BYTES, DiskEntry, Point

_HOLE: Final = block_status_word(BlockStatus.HOLE | BlockStatus.ZERO, 0)

_log = logging.getLogger(__name__)


class Index:
    """Extents of a whole disk, of which any part can be looked at."""

    def __init__(self, extents: Extents) -> None:
        self._extents = extents
        self._ends = np.cumsum(extents.lengths)

    def window(self, offset: int, length: int, extents_max: int) -> Extents:
        """What is said of a range, from its beginning on; at most so many extents."""
        first = int(np.searchsorted(self._ends, offset, side="right"))
        last = int(np.searchsorted(self._ends, offset + length, side="left")) + 1
        last = min(last, first + extents_max)
        lengths = self._extents.lengths[first:last].copy()
        lengths[0] = self._ends[first] - offset
        return Extents(lengths, self._extents.status[first:last]).clipped(length)


class CheckedLayer:
    """A file of a restore point whose blocks are checked before they are first used."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._checked: set[int] = set()
        self._checking = SingleFlight()

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with data of this layer.

        Raises:
            OSError: They cannot be read, or are not what was pulled.
        """
        for number in range(offset // BLOCK_BYTES, (offset + len(view) - 1) // BLOCK_BYTES + 1):
            while number not in self._checked:
                await self._checking.run(number, partial(self._check, number))
        await self.layer.image.read_into(offset, view)

    async def _check(self, number: int) -> None:
        try:
            await self.layer.read(number)
        except NbdfleeceError as error:
            _log.error("%s", error)
            raise OSError(errno.EIO, str(error)) from error
        self._checked.add(number)


class PointNode(BlockNode):
    """A disk of a restore point, read-only.

    Args:
        layers: Its files, newest first.
        extents: Which of them has which part, numbered from 1; 0 for none.
        size: Bytes of the disk.
    """

    read_only = True

    def __init__(self, layers: Sequence[CheckedLayer], extents: Extents, size: int) -> None:
        self.size = size
        self._layers = layers
        self._extents = Index(extents)

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Read each part from the layer that has it."""
        while len(view):
            found = self._extents.window(offset, len(view), 1 << 10)
            for length, status in found.pairs():
                part = view[:length]
                if status:
                    await self._layers[status - 1].read_into(offset, part)
                else:
                    part[:] = bytes(length)
                offset += length
                view = view[length:]

    async def block_status(
        self, offset: int, length: int, *, extents_max: int = 1 << 20
    ) -> Extents:
        """Data, or holes that read as zeroes; the depth is the layer's."""
        found = self._extents.window(offset, length, extents_max)
        words = block_status_word(BlockStatus.DATA, 1) * found.status
        return found.with_status(np.where(found.status, words, _HOLE).astype(np.uint32))

    async def close(self) -> None:
        """The files are those of all points."""


class PointDifference:
    """``qemu:dirty-bitmap:POINT``: where a disk differs from what it was at an earlier point.

    It may say too much, never too little.

    Args:
        earlier: The earlier point's name.
        chain: The disk's layers, newest first.
        earlier_chain: Those of the earlier point's.
    """

    def __init__(
        self, earlier: str, chain: Sequence[DiskEntry], earlier_chain: Sequence[DiskEntry]
    ) -> None:
        self.name = DIRTY_PREFIX + earlier
        self._chain = chain
        self._earlier = earlier_chain

    @cached_property
    def _index(self) -> Index:
        return Index(difference(self._chain, self._earlier))

    async def extents(self, offset: int, length: int, *, extents_max: int) -> Extents:
        """Status 1 where they may differ."""
        return self._index.window(offset, length, extents_max)


def difference(chain: Sequence[DiskEntry], earlier: Sequence[DiskEntry]) -> Extents:
    """Where a disk of a restore point may differ from that of another one.

    Args:
        chain: The disk's layers, newest first.
        earlier: Those of the other point.

    Returns:
        Status 1 where it may, else 0; as many bytes as the disk.
    """
    files, others = [each.file for each in chain], [each.file for each in earlier]
    only = [each for each in chain if each.file not in others]
    only += [each for each in earlier if each.file not in files]
    size = chain[0].size
    found = Extents.single(size, 0) if size else Extents.from_pairs([])
    for layer in [*(each.layer() for each in only), Extents.single(earlier[0].size, ABSENT)]:
        inside = layer.clipped(size)
        if inside.total() < size:  # past its end there is not what is below
            inside = Extents.concatenate([inside, Extents.single(size - inside.total(), 1)])
        found, said = overlay(found, inside)
        found = found.with_status(found.status | (said.status != ABSENT).astype(np.uint32))
    return found


class ServedDisk(NamedTuple):
    """A disk of a restore point that can be read.

    Attributes:
        point: The restore point.
        disk: The disk's name.
        node: Its bytes.
        differences: To each earlier point that has the disk, newest first.
    """

    point: str
    disk: str
    node: PointNode
    differences: list[PointDifference]


class ServedPoints:
    """Restore points of a directory, opened for reading; no prune runs meanwhile.

    Use it with ``async with``.

    Args:
        directory: The backup.
        names: Which points; None for all that there are now.
    """

    def __init__(self, directory: BackupDirectory, names: Sequence[str] | None = None) -> None:
        self._directory = directory
        self._names = names
        self._opened = AsyncExitStack()
        self._layers: dict[str, CheckedLayer] = {}
        self.disks: list[ServedDisk] = []

    async def __aenter__(self) -> ServedPoints:
        """Open the files.

        Raises:
            BackupError: A point is not there, or its chain is broken.
            StateError: A prune is under way.
        """
        async with AsyncExitStack() as opened:
            opened.enter_context(self._directory.reading())
            points = self._directory.points()
            wanted = None if self._names is None else set(map(self._find, self._names))
            for number, point in enumerate(points):
                if wanted is None or point.name in wanted:
                    for entry in point.disks:
                        disk = await self._open(opened, point, entry, points[:number])
                        self.disks.append(disk)
            self._opened = opened.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._opened.aclose()

    def _find(self, name: str) -> str:
        return self._directory.find(name).name

    async def _open(
        self, opened: AsyncExitStack, point: Point, entry: DiskEntry, earlier: Sequence[Point]
    ) -> ServedDisk:
        chain = [each for _, each in self._directory.chain(point, entry.name)]
        layers = [await self._layer(opened, each) for each in chain]
        content = DiskContent(entry.name, [each.layer for each in layers])
        node = PointNode(layers, content.extents, entry.size)
        differences = list(self._differences(chain, entry.name, earlier))
        return ServedDisk(point.name, entry.name, node, differences)

    def _differences(
        self, chain: Sequence[DiskEntry], disk: str, earlier: Sequence[Point]
    ) -> Iterator[PointDifference]:
        for point in reversed(earlier):
            if any(each.name == disk for each in point.disks):
                other = [each for _, each in self._directory.chain(point, disk)]
                yield PointDifference(point.name, chain, other)

    async def _layer(self, opened: AsyncExitStack, entry: DiskEntry) -> CheckedLayer:
        """A file, opened the first time that it is asked for."""
        found = self._layers.get(entry.file)
        if found is None:
            path = self._directory.file_path(entry)
            try:
                file = FileNode.open(path, read_only=True)
                image = await Qcow2Image.from_file(file, open_backing=_no_backing)
            except (OSError, NbdfleeceError) as error:
                raise BackupError(f"{path}: cannot be read: {error}") from error
            opened.push_async_callback(image.close)
            layer = Layer(entry, image)
            layer.check_complete()
            found = self._layers[entry.file] = CheckedLayer(layer)
        return found


async def _no_backing(_file: FileNode, _header: Header, _chain: frozenset[object]) -> None:
    """What is below a layer is found by the manifests."""
