"""Block status of a qcow2 image: what is allocated where in the chain, and what is zero.

An image with preallocated metadata calls all of its disk data. As in QEMU, where more
clusters are allocated than the file has space for, the file below is asked for holes, and
data clusters in them are zero. That is true whenever it is said; the guess only spares other
images the question.
"""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Final

import numpy as np

from ..block.node import DEPTH_SHIFT, BlockStatus, block_status_word
from ..extents import Extents, Status
from .check import RefcountBlocks
from .entries import (
    COMPRESSED,
    COPIED,
    INVALID,
    OFFSET_MASK,
    SUBCLUSTERS,
    SUBCLUSTERS_PER_CLUSTER,
    ZERO,
    Entries,
    Kind,
    L2Table,
    find_runs,
    kind_of,
)
from .subclusters import subcluster_runs

if TYPE_CHECKING:
    from .image import Qcow2Image

_TABLES_MAX: Final = 1024
"""L2 tables looked at in one call: some 0.2 s, in turns with others."""

STATUS_DATA: Final = block_status_word(BlockStatus.DATA, 1)
"""Of data in this image."""
_ZERO_ALLOC: Final = block_status_word(BlockStatus.ZERO, 1)
_ZERO_PLAIN: Final = block_status_word(BlockStatus.ZERO | BlockStatus.HOLE, 1)
_NOTHING: Final = block_status_word(BlockStatus.ZERO | BlockStatus.HOLE, 0)
_PAST_BACKING: Final = block_status_word(BlockStatus.ZERO | BlockStatus.HOLE, 2)
"""Zeroes past the end of a shorter backing file count as the backing file's, as in QEMU."""

_STATUS_OF_KIND: Final = {
    Kind.NORMAL: STATUS_DATA,
    Kind.COMPRESSED: STATUS_DATA,
    Kind.ZERO_ALLOC: _ZERO_ALLOC,
    Kind.ZERO_PLAIN: _ZERO_PLAIN,
}
"""Of a whole cluster of a kind that needs no further look."""

_HOLES_MAX: Final = 1 << 14
"""Pieces of one L2 table's clusters that holes are sought in; beyond it is all data."""

_ASK_BACKING: Final = 1 << 31
"""In place of a status word: the backing file knows."""


async def describe(image: Qcow2Image, offset: int, length: int, extents_max: int) -> Extents:
    """The block status of a guest range; see :meth:`BlockNode.block_status`."""
    if image.has_holes_below is None:
        image.has_holes_below = await looks_preallocated(image)
    end = offset + length
    table_bytes = image.layout.l2_entries * image.cluster_size
    parts: list[Extents] = []
    count = 0
    for _ in range(_TABLES_MAX):
        stop = min(end, (offset // table_bytes + 1) * table_bytes)
        own = await _own_status(image, offset, stop - offset)
        if image.backing is not None:
            own = await _with_backing(image, offset, own, extents_max - count)
        parts.append(own)
        offset += own.total()
        count += len(own.lengths)
        if offset < stop or offset == end or count >= extents_max:
            break
        if image.mapping.has_table(offset // table_bytes):
            await asyncio.sleep(0)  # of a thousand tables others must not wait for the end
    return Extents.concatenate(parts).limited(extents_max)


def uniform(image: Qcow2Image, offset: int, length: int) -> int | None:
    """The status word of a range inside one cluster, if its L2 table is in memory and says all."""
    if offset // image.cluster_size != (offset + length - 1) // image.cluster_size:
        return None
    nothing = _NOTHING if image.backing is None else None
    l1_index, index = divmod(offset // image.cluster_size, image.layout.l2_entries)
    table = image.mapping.tables.get(l1_index)
    if table is None:
        return None if image.mapping.has_table(l1_index) else nothing
    kind = kind_of(table.entries[index])
    if kind is Kind.NORMAL and image.has_holes_below is not False:
        return None
    return nothing if kind is Kind.UNALLOCATED else _STATUS_OF_KIND.get(kind)


async def _own_status(image: Qcow2Image, offset: int, length: int) -> Extents:
    """What this image says of a range within one L2 table, with _ASK_BACKING where it is mute."""
    unallocated = _NOTHING if image.backing is None else _ASK_BACKING
    l1_index, first = divmod(offset // image.cluster_size, image.layout.l2_entries)
    table = await image.mapping.table(l1_index)
    if table is None:
        return Extents.single(length, unallocated)
    within = offset % image.cluster_size
    end = first + (within + length - 1) // image.cluster_size + 1
    status = _status_of(table.array[first:end], unallocated)
    unit = image.cluster_size
    if table.bitmap_array is not None:
        unit //= SUBCLUSTERS_PER_CLUSTER
        status = _with_subclusters(table, first, end, status, unallocated)
    bounds = np.arange(len(status) + 1, dtype=np.int64) * unit
    bounds = np.clip(bounds, within, within + length)
    lengths = bounds[1:] - bounds[:-1]
    inside = lengths > 0
    own = Extents(lengths[inside], status[inside]).merged()
    if image.has_holes_below:
        own = _with_holes(own, await _holes_below(image, table, first, offset, length))
    return own


async def _holes_below(
    image: Qcow2Image, table: L2Table, first: int, offset: int, length: int
) -> Extents:
    """Where host clusters lie in holes of the file: status 1; what is said to be no data, any."""
    size = image.cluster_size
    position = -(offset % size)
    end = first + (length - position - 1) // size + 1
    pairs: list[tuple[int, int]] = []
    for run in find_runs(table, first, end, size):
        start, stop = max(position, 0), min(position + run.clusters * size, length)
        host = (run.entry & OFFSET_MASK) + start - position
        position += run.clusters * size
        if run.kind not in (Kind.NORMAL, Kind.SUBCLUSTERS) or len(pairs) > _HOLES_MAX:
            pairs.append((stop - start, 0))
            continue
        while start < stop:
            below = await image.data_file.block_status(host, stop - start)
            is_zero = (below.status & np.uint32(BlockStatus.ZERO)) != 0
            pairs += zip(below.lengths.tolist(), is_zero.tolist(), strict=True)
            start, host = start + below.total(), host + below.total()
    return Extents.from_pairs(pairs)


def _with_holes(own: Extents, holes: Extents) -> Extents:
    """Make data that lie in holes zeroes."""
    own_ends, holes_ends = np.cumsum(own.lengths), np.cumsum(holes.lengths)
    ends = np.union1d(own_ends, holes_ends)
    status = own.status[np.searchsorted(own_ends, ends)]
    is_hole = holes.status[np.searchsorted(holes_ends, ends)] != 0
    status[is_hole & (status == STATUS_DATA)] = _ZERO_ALLOC
    return Extents(np.diff(ends, prepend=0), status).merged()


async def looks_preallocated(image: Qcow2Image) -> bool:
    """Whether more clusters are allocated than the file can have space for."""
    file = image.file
    real = file.allocated_bytes() // image.cluster_size
    threshold = max(real * 10 // 9, real + 2)
    end = -(-file.size // image.cluster_size)
    if end < threshold:
        return False
    blocks = await RefcountBlocks.read(file, image.header)
    allocated = 0
    for index in range(-(-end // blocks.per_block)):
        block = await blocks.block(index) if blocks.is_readable(index) else None
        if block is not None:
            allocated += int(np.count_nonzero(block[: end - index * blocks.per_block]))
        if allocated >= threshold:
            return True
        await asyncio.sleep(0)  # there may be a thousand
    return False


def _with_subclusters(
    table: L2Table, first: int, end: int, status: Status, unallocated: int
) -> Status:
    """The status words of all subclusters, given those of the clusters ``[first, end)``."""
    status = np.repeat(status, SUBCLUSTERS_PER_CLUSTER).reshape(-1, SUBCLUSTERS_PER_CLUSTER)
    entries = table.array[first:end]
    is_compressed = (entries & np.uint64(COMPRESSED)) != 0
    for index in np.flatnonzero(
        ~is_compressed & ((entries & np.uint64(SUBCLUSTERS)) != 0)
    ).tolist():
        entry, bitmap = int(entries[index]), table.bitmap(first + index)
        zero = _ZERO_ALLOC if entry & (OFFSET_MASK | COPIED) else _ZERO_PLAIN
        words = {Kind.NORMAL: STATUS_DATA, Kind.ZERO_PLAIN: zero, Kind.UNALLOCATED: unallocated}
        for run in subcluster_runs(bitmap, 0, SUBCLUSTERS_PER_CLUSTER):
            status[index, run.first : run.end] = words[run.kind]
    return status.reshape(-1)


def _status_of(entries: Entries, unallocated: int) -> Status:
    """The status word of every entry.

    Raises:
        OSError: EIO: an entry cannot be meant.
    """
    has_host = (entries & np.uint64(OFFSET_MASK | COPIED)) != 0
    is_compressed = (entries & np.uint64(COMPRESSED)) != 0
    is_zero = ~is_compressed & ((entries & np.uint64(ZERO)) != 0)
    if (~is_compressed & ((entries & np.uint64(INVALID)) != 0)).any():
        raise OSError(errno.EIO, "damaged L2 entry")
    status = np.where(has_host | is_compressed, np.uint32(STATUS_DATA), np.uint32(unallocated))
    status[is_zero & has_host] = _ZERO_ALLOC
    status[is_zero & ~has_host] = _ZERO_PLAIN
    return status


async def _with_backing(image: Qcow2Image, offset: int, own: Extents, extents_max: int) -> Extents:
    """Put the backing file's answers where this image is mute; cut short where they are."""
    parts: list[Extents] = []
    count = 0
    for length, status in own.pairs():
        part = Extents.single(length, status)
        if status == _ASK_BACKING:
            part = await _backing_status(image, offset, length, extents_max - count)
        parts.append(part)
        offset += length
        count += len(part.lengths)
        if part.total() < length or count >= extents_max:
            break
    return Extents.concatenate(parts)


async def _backing_status(image: Qcow2Image, offset: int, length: int, extents_max: int) -> Extents:
    """A range as the backing file has it, one layer deeper; zeroes past its end."""
    backing = image.backing
    assert backing is not None
    inside = min(length, max(0, backing.size - offset))
    if not inside:
        return Extents.single(length, _PAST_BACKING)
    below = await backing.block_status(offset, inside, extents_max=max(1, extents_max))
    depth = below.status >> np.uint32(DEPTH_SHIFT)
    deeper = np.where(depth > 0, below.status + np.uint32(1 << DEPTH_SHIFT), below.status)
    below = Extents(below.lengths, deeper.astype(np.uint32))
    if below.total() == inside < length:
        return Extents.concatenate([below, Extents.single(length - inside, _PAST_BACKING)])
    return below
