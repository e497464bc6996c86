"""What a disk of a restore point contains: its chain of layers read as one, every byte checked.

The layers' manifests say which layer each byte is in; only that layer is read. A checksum
covers a layer's data of a whole block, so a block is read whole from every layer that it
needs anything of, checked, and then taken apart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

from ..errors import ImageError
from ..extents import Extents
from ..qcow2.image import Qcow2Image
from .block_status import overlay
from .blocks import ABSENT, DATA, ZEROES, Block, cut_blocks
from .directory import BackupDirectory
from .errors import BackupError, ChecksumError
from .manifest import BLOCK_BYTES, DiskEntry, Point, checksum

_HASH_INLINE_BYTES_MAX: Final = 128 << 10
"""Hashed in the loop's thread: 0.2 ms."""

PENDING: Final = (1 << 32) - 1
"""Not yet found in any layer."""


class ContentPiece(NamedTuple):
    """Bytes of the disk that have been read and checked."""

    offset: int
    data: memoryview


class Layer:
    """One file of a chain, read only where its manifest has data.

    Args:
        entry: The disk's entry in the manifest.
        image: The file.
    """

    def __init__(self, entry: DiskEntry, image: Qcow2Image) -> None:
        if entry.block_size != BLOCK_BYTES:
            raise BackupError(f"{image.path}: checksums of {entry.block_size} bytes are not known")
        self.entry = entry
        self.image = image
        self._checksums = dict(entry.blocks)
        self.blocks: dict[int, Block] = {
            block.number: block for block in cut_blocks(_only_data(entry.layer()))
        }

    def check_complete(self) -> None:
        """Whether there is a checksum for each block with data, and no other.

        Raises:
            BackupError: There is not.
        """
        if self.blocks.keys() != self._checksums.keys():
            raise BackupError(f"{self.image.path}: the manifest lacks checksums")

    async def read(self, number: int) -> list[ContentPiece]:
        """All data of a block, checked.

        Raises:
            ChecksumError: They are not what was pulled.
            OSError: They cannot be read.
        """
        block = self.blocks[number]
        content = memoryview(bytearray(block.data_bytes))
        pieces: list[ContentPiece] = []
        position = 0
        for part in block.ranges:
            if part.status == DATA:
                data = content[position : position + part.length]
                pieces.append(ContentPiece(part.offset, data))
                await self._read_into(part.offset, data)
                position += part.length
        await self._check(number, content)
        return pieces

    async def _read_into(self, offset: int, data: memoryview) -> None:
        try:
            await self.image.read_into(offset, data)
        except OSError as error:
            raise ChecksumError(
                f"{self.image.path}: cannot be read at {offset}: {error}"
            ) from error

    async def _check(self, number: int, content: memoryview) -> None:
        if len(content) <= _HASH_INLINE_BYTES_MAX:
            found = checksum([content])
        else:
            found = await asyncio.to_thread(checksum, [content])
        if found != self._checksums.get(number):
            raise ChecksumError(
                f"{self.image.path}: the data between {number * BLOCK_BYTES} and"
                f" {(number + 1) * BLOCK_BYTES} of the disk are not what was pulled"
            )


class DiskContent:
    """A disk of a restore point. Made by :meth:`open`.

    Attributes:
        name: The disk's name.
        size: Bytes of the disk.
        layers: Its files, newest first.
        extents: Status 0 where the disk reads as zeroes, ``n + 1`` where layer ``n`` has it.
    """

    def __init__(self, name: str, layers: list[Layer]) -> None:
        self.name = name
        self.layers = layers
        self.size = layers[0].entry.size
        self.extents = compose([layer.entry.layer() for layer in layers], self.size)

    @classmethod
    async def open(cls, directory: BackupDirectory, point: Point, disk: str) -> DiskContent:
        """Open a disk's chain.

        Raises:
            BackupError: The chain is broken: a file is missing, or is not what its manifest says.
        """
        chain = directory.chain(point, disk)
        try:
            image = await Qcow2Image.open(directory.file_path(chain[0][1]), read_only=True)
        except (OSError, ImageError) as error:
            raise BackupError(f"disk {disk!r} of {point.name!r} cannot be read: {error}") from error
        try:
            layers = [
                Layer(entry, found)
                for (_, entry), found in zip(chain, _files(image, chain, directory), strict=True)
            ]
        except BaseException:
            await image.close()
            raise
        return cls(disk, layers)

    @property
    def data_bytes(self) -> int:
        """What is not zero, in bytes."""
        return int(self.extents.lengths[self.extents.status != 0].sum())

    def blocks(self) -> Iterator[Block]:
        """The blocks that have data; the ranges' status is that of :attr:`extents`."""
        return cut_blocks(self.extents)

    def read_bytes(self, block: Block) -> int:
        """What reading a block takes: all data of it in every layer that it needs."""
        return sum(self.layers[number].blocks[block.number].data_bytes for number in _needed(block))

    async def read(self, block: Block) -> list[ContentPiece]:
        """The data of a block, in order; what is left out is zeroes.

        Raises:
            ChecksumError: They are not what was pulled.
        """
        found = {number: await self.layers[number].read(block.number) for number in _needed(block)}
        pieces: list[ContentPiece] = []
        for part in block.ranges:
            if part.status:
                pieces.extend(_cut(found[part.status - 1], part.offset, part.length))
        return pieces

    async def close(self) -> None:
        """Close the files."""
        await self.layers[0].image.close()  # and with it those below


def _needed(block: Block) -> list[int]:
    """The numbers of the layers that a block has data of."""
    return sorted({part.status - 1 for part in block.ranges if part.status})


def compose(layers: list[Extents], size: int) -> Extents:
    """Where each byte of a chain's topmost disk is, the lowest layer being a full one.

    Args:
        layers: What each layer says, newest first, with the statuses of a manifest.
        size: Bytes of the topmost disk.

    Returns:
        Status 0 for zeroes, ``n + 1`` for data in layer ``n``.
    """
    found = stack(layers, size)
    return found.with_status(np.where(found.status == PENDING, 0, found.status))


def stack(layers: list[Extents], size: int) -> Extents:
    """What some layers one above another say together.

    Past the end of a layer that is shorter than the one above there are zeroes, whatever is
    below it, as in qcow2.

    Args:
        layers: What each layer says, newest first, with the statuses of a manifest.
        size: Bytes of the topmost disk.

    Returns:
        Status 0 for zeroes, ``n + 1`` for data in layer ``n``, PENDING where none says anything.
    """
    if not size:
        return Extents.from_pairs([])
    found = Extents.single(size, PENDING)
    for number, layer in enumerate(layers):
        inside = layer.clipped(size)
        if inside.total() < size:
            inside = Extents.concatenate([inside, Extents.single(size - inside.total(), ZEROES)])
        found, said = overlay(found, inside)
        is_new = (found.status == PENDING) & (said.status != ABSENT)
        value = np.where(said.status == DATA, number + 1, 0)
        found = found.with_status(np.where(is_new, value, found.status).astype(np.uint32))
    return found


def _only_data(layer: Extents) -> Extents:
    return layer.with_status(np.where(layer.status == DATA, DATA, ABSENT).astype(np.uint32))


def _files(
    image: Qcow2Image, chain: list[tuple[Point, DiskEntry]], directory: BackupDirectory
) -> Iterator[Qcow2Image]:
    """The files of a chain, checked to be the ones that the manifests name."""
    below: object = image
    for point, entry in chain:
        path = directory.file_path(entry)
        if not isinstance(below, Qcow2Image) or not path.samefile(below.path):
            raise BackupError(f"{path}: the chain of files leaves the manifest at {point.name!r}")
        yield below
        below = below.backing
    if below is not None:
        raise BackupError(f"{directory.path}: the full file of {chain[-1][0].name!r} has a backing")


def _cut(pieces: list[ContentPiece], offset: int, length: int) -> Iterator[ContentPiece]:
    """What of some pieces lies in a range."""
    for piece in pieces:
        low = max(offset, piece.offset)
        high = min(offset + length, piece.offset + len(piece.data))
        if low < high:
            yield ContentPiece(low, piece.data[low - piece.offset : high - piece.offset])
