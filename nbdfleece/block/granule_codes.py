"""Codes of granules: where a snapshot finds what a guest write displaced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from ..extents import Extents, Status
from .granule_map import Codes
from .node import DEPTH_SHIFT, BlockStatus, block_status_word
from .scratch import Scratch

Mask = npt.NDArray[np.bool_]

UNTOUCHED: Final = 0
"""Not written since: as a newer layer says, or as the disk is."""
ZERO_DATA: Final = 1
ZERO_HOLE: Final = 2
UNALLOCATED: Final = 3
"""Read as zeroes, by kind of block status; never copied."""
FORGOTTEN: Final = 4
"""Overwritten when nobody needed it."""
COPIED: Final = 16
"""This and all above: granule ``code - COPIED`` of the scratch."""

_ZERO: Final = int(BlockStatus.ZERO)
_HOLE: Final = int(BlockStatus.HOLE)

_ASK_BASE: Final = np.uint32(1 << 31)
"""In place of a status word: the base knows."""

_STATUS_OF_CODE: Final = np.zeros(COPIED + 1, dtype=np.uint32)
_STATUS_OF_CODE[ZERO_DATA] = block_status_word(BlockStatus.ZERO, 1)
_STATUS_OF_CODE[ZERO_HOLE] = block_status_word(BlockStatus.ZERO | BlockStatus.HOLE, 1)
_STATUS_OF_CODE[UNALLOCATED] = block_status_word(BlockStatus.ZERO | BlockStatus.HOLE, 0)
_STATUS_OF_CODE[FORGOTTEN] = block_status_word(BlockStatus.DATA, 1)
_STATUS_OF_CODE[COPIED] = block_status_word(BlockStatus.DATA, 1)


def free_copies(scratch: Scratch, codes: Codes) -> None:
    """Give back the granules of a scratch among ``codes``."""
    copies = np.sort(codes[codes >= COPIED].astype(np.int64) - COPIED)
    if len(copies):
        for start, stop in runs(np.diff(copies) == 1):
            scratch.free(int(copies[start]), stop - start)


def status_of_codes(codes: Codes) -> Status:
    """Status words of granules that the guest has written since the snapshot; shape (n,)."""
    return _STATUS_OF_CODE[np.minimum(codes, COPIED)]


def code_of_status(status: int) -> int:
    """The code of a granule that has this status word all over."""
    if not status & _ZERO:
        return UNTOUCHED
    if not status & _HOLE:
        return ZERO_DATA
    return ZERO_HOLE if status >> DEPTH_SHIFT else UNALLOCATED


def with_displaced(base: Extents, codes: Codes, lead: int, shift: int) -> Extents:
    """Block status of a range some granules of which lie elsewhere.

    Args:
        base: What the base says of the range.
        codes: Of the granules that it touches, shape (granules,).
        lead: Bytes of the first granule that lie before the range.
        shift: Bits of an offset within a granule.
    """
    status = np.where(codes == UNTOUCHED, _ASK_BASE, status_of_codes(codes))
    bounds = np.flatnonzero(status[1:] != status[:-1]) + 1
    ends = np.append((bounds << shift) - lead, base.total())
    own = status[np.append(bounds - 1, len(codes) - 1)]
    below = base.status
    if len(below) > 1:
        base_ends = np.cumsum(base.lengths)
        all_ends = np.sort(np.concatenate([ends, base_ends]), kind="stable")
        all_ends = all_ends[np.append(all_ends[1:] > all_ends[:-1], True)]
        own = own[np.searchsorted(ends, all_ends)]
        below = below[np.searchsorted(base_ends, all_ends)]
        ends = all_ends
    status = np.where(own == _ASK_BASE, below, own)
    return Extents(np.diff(ends, prepend=0), status).merged()


def continues(codes: Codes) -> Mask:
    """Whether granule ``i + 1`` can be read together with granule ``i``; shape (n - 1,)."""
    before, after = codes[:-1], codes[1:]
    return np.equal(after, before + (before >= COPIED))


def runs(joined: Mask) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of runs of n items, where ``joined[i]`` ties item i + 1 to item i."""
    start = 0
    for cut in (np.flatnonzero(~joined) + 1).tolist():
        yield start, cut
        start = cut
    yield start, len(joined) + 1


def true_runs(mask: Mask) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of the runs of True."""
    if len(mask):
        for start, stop in runs(mask[1:] == mask[:-1]):
            if mask[start]:
                yield start, stop
