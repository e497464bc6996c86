"""The units of a pull: blocks of the disk with what is to be done in each.

A disk is cut into blocks of :data:`~nbdfleece.backup.manifest.BLOCK_BYTES`. A block's
ranges are read, looked through for zeroes, hashed and written together, and are done
together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np

from ..extents import Extents
from .block_status import DIRTY, ZERO, overlay
from .manifest import BLOCK_BYTES, checksum

ABSENT: Final = 0
DATA: Final = 1
ZEROES: Final = 3
"""What a layer says of a range: nothing, data, zeroes."""

CLUSTER_BYTES: Final = 65536
"""Of the images: zeroes are looked for, and data compressed, in clusters, as they are stored."""


class Range(NamedTuple):
    """Bytes of the disk."""

    offset: int
    length: int
    status: int


class Block(NamedTuple):
    """A block with something to do in it.

    Attributes:
        number: It begins at ``number * BLOCK_BYTES``.
        ranges: All of the block, in order, each with a layer's status.
    """

    number: int
    ranges: list[Range]

    @property
    def data_bytes(self) -> int:
        """What is to be read."""
        return sum(part.length for part in self.ranges if part.status == DATA)


class Piece(NamedTuple):
    """Bytes of the disk whose content is known.

    Attributes:
        offset: Where on the disk, in bytes.
        length: How much, in bytes.
        status: A layer's status.
        position: Where in the block's content, if they were read.
    """

    offset: int
    length: int
    status: int
    position: int


class Digest(NamedTuple):
    """A block that has been read.

    Attributes:
        pieces: All of the block, in order; data that are zeroes are zeroes now.
        checksum: That of the data, None if there are none.
    """

    pieces: list[Piece]
    checksum: str | None


def layer_extents(merged: Extents, *, is_full: bool) -> Extents:
    """What a pull writes, from what the server says: data, zeroes, or nothing.

    Args:
        merged: What is dirty and what is zero.
        is_full: There is nothing below, so that zeroes need not be said.
    """
    status = np.where(merged.status & ZERO, ABSENT if is_full else ZEROES, DATA)
    return merged.with_status(np.where(merged.status & DIRTY, status, ABSENT).astype(np.uint32))


def cut_blocks(layer: Extents) -> Iterator[Block]:
    """The blocks in which a layer says anything."""
    size = layer.total()
    if not size:
        return
    edges = np.append(np.arange(0, size, BLOCK_BYTES, dtype=np.int64), size)
    numbers = Extents(np.diff(edges), np.arange(len(edges) - 1, dtype=np.uint32))
    cut, blocks = overlay(layer, numbers)
    first = np.flatnonzero(np.diff(blocks.status, prepend=-1))
    is_wanted = np.add.reduceat(cut.status != ABSENT, first) > 0
    ends = np.append(first[1:], len(cut.lengths))
    for start, stop in zip(first[is_wanted].tolist(), ends[is_wanted].tolist(), strict=True):
        number = int(blocks.status[start])
        part = Extents(cut.lengths[start:stop], cut.status[start:stop])
        yield Block(number, ranges_of(number * BLOCK_BYTES, part))


def ranges_of(offset: int, extents: Extents) -> list[Range]:
    """Extents that begin at ``offset`` as ranges."""
    ranges = []
    for length, status in extents.pairs():
        ranges.append(Range(offset, length, status))
        offset += length
    return ranges


def digest(block: Block, content: memoryview, libnbd_buffer: Any) -> Digest:
    """Find what is zero in a block's data, and hash the rest.

    Args:
        block: The block.
        content: The bytes of its data ranges, one after another.
        libnbd_buffer: ``nbd.Buffer`` over ``content``, which can tell zeroes fast.
    """
    pieces: list[Piece] = []
    parts: list[memoryview] = []
    position = 0
    for whole in block.ranges:
        if whole.status != DATA:
            pieces.append(Piece(*whole, position))
            continue
        for piece in _split_zeroes(whole, position, libnbd_buffer):
            pieces.append(piece)
            if piece.status == DATA:
                parts.append(content[piece.position : piece.position + piece.length])
        position += whole.length
    return Digest(pieces, checksum(parts) if parts else None)


def _split_zeroes(whole: Range, position: int, libnbd_buffer: Any) -> list[Piece]:
    """A data range cut where clusters that are all zero begin and end."""
    found: list[Piece] = []
    offset, end = whole.offset, whole.offset + whole.length
    while offset < end:
        stop = min(end, (offset // CLUSTER_BYTES + 1) * CLUSTER_BYTES)
        length = stop - offset
        status = ZEROES if libnbd_buffer.is_zero(position, length) else DATA
        if found and found[-1].status == status:
            found[-1] = found[-1]._replace(length=found[-1].length + length)
        else:
            found.append(Piece(offset, length, status, position))
        offset = stop
        position += length
    return found
