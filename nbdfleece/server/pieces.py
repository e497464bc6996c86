"""What a READ is cut into: data and holes, or smaller parts where a disk is bad."""

from __future__ import annotations

from typing import Final

import numpy as np

from ..block.node import BlockNode, BlockStatus

_PIECES_MAX: Final = 32
"""Pieces of data and holes that a part of a READ is cut into; "as few chunks as possible"."""

_ZEROES: Final = bytes(16)
_ZERO: Final = np.uint32(BlockStatus.ZERO)


def ends_in_zeroes(data: memoryview) -> bool:
    """Whether data that were read begin or end with zeroes, as holes in them do, mostly."""
    return data[:16] == _ZEROES or data[-16:] == _ZEROES


async def find_holes(node: BlockNode, offset: int, length: int) -> list[tuple[int, bool]]:
    """Cut a range that was read into pieces that read as zeroes and others, if these are few.

    Returns:
        The pieces' lengths in bytes, and whether they read as zeroes.
    """
    try:
        found = await node.block_status(offset, length, extents_max=_PIECES_MAX)
    except OSError:  # the data is here: where its holes are need not be known
        return [(length, False)]
    pieces = found.with_status(found.status & _ZERO).clipped(length).pairs()
    left = length - sum(piece for piece, _ in pieces)
    if left:
        pieces.append((left, 0))
    return [(piece, bool(zero)) for piece, zero in pieces]


def halve(begin: int, end: int, block_size: int) -> list[tuple[int, int]]:
    """Both halves of a range, the first one last, cut at a block; nothing if it lies in one."""
    if begin // block_size == (end - 1) // block_size:
        return []
    middle = max((begin + end) // 2 // block_size, begin // block_size + 1) * block_size
    return [(middle, end), (begin, middle)]
