"""Host clusters: their refcounts, finding free ones, and the tables' growth.

Refcounts live in blocks of one cluster, found through the refcount table, which is
held whole. Blocks are loaded when first needed. All changes happen in memory; a
flush writes them (:mod:`nbdfleece.qcow2.epochs`), increments before anything that
relies on them, and decrements whenever it is convenient: a count that is too high
in the file is a leak after a power cut, one that is too low would be corruption.

A part of the file that no block describes is free. When allocation reaches such a
part, the new block takes the first cluster in reach for itself, so it describes
itself; a run of clusters longer than one block can describe gets several at once. When
the table is too short for a new block it grows in memory at once, and gets its new
place in the file before the next flush.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

import numpy as np

from ..block.file import FileNode
from ..block.single_flight import SingleFlight
from .cached_table import CachedTable
from .header import REFCOUNT_TABLE_BYTES_MAX, Header
from .quarantine import Quarantine
from .refcount_codec import (
    Counts,
    counts_per_block,
    empty_counts,
    pack_counts,
    unpack_counts,
)
from .tables import MetadataMap

CACHE_BYTES: Final = 16 << 20
"""Refcount blocks in memory that need not be there."""

_TABLE_OFFSET_MASK: Final = ~0x1FF & (1 << 64) - 1
_SECTOR: Final = 512

_SCALAR_MAX: Final = 32
"""Clusters up to which a loop finds the end of a free run faster than numpy does."""


class Allocation(NamedTuple):
    """Consecutive host clusters with a refcount of one in memory."""

    offset: int
    clusters: int
    is_fresh: bool
    """Nothing was ever written there: the file reads as zeroes."""


class RefcountBlock(CachedTable):
    """One refcount block; ``counts`` is ``array`` for access to single counts."""

    __slots__ = ("array", "counts")

    def __init__(self, host_offset: int, array: Counts) -> None:
        super().__init__(host_offset)
        self.array = array
        self.counts = array.data

    def set_to_one(self, first: int, end: int) -> None:
        """Set counts ``[first, end)`` to one."""
        if end - first > _SCALAR_MAX:
            self.array[first:end] = 1
            return
        for position in range(first, end):
            self.counts[position] = 1


class Refcounts:
    """The refcounts and free clusters of one image open for writing.

    Args:
        file: The image file.
        header: Its header; the place of the refcount table is kept up to date in it.
        table: Host offsets of the blocks, 0 where there is none.
        metadata: Where new blocks and tables are registered.
        quarantine: Takes the old refcount table when it has moved.
        on_damage: Called with a message when the tables contradict themselves.
    """

    def __init__(
        self,
        file: FileNode,
        header: Header,
        table: list[int],
        metadata: MetadataMap,
        quarantine: Quarantine,
        on_damage: Callable[[str], None],
    ) -> None:
        self._file = file
        self._header = header
        self._metadata = metadata
        self._quarantine = quarantine
        self._on_damage = on_damage
        self._cluster_bits = header.cluster_bits
        self._block_counts = counts_per_block(header.cluster_bits, header.refcount_order)
        self._count_max = (1 << header.refcount_bits) - 1
        self._blocks_max = max(
            4, CACHE_BYTES // (self._block_counts * max(1, header.refcount_bits // 8))
        )
        self._loads = SingleFlight()
        self._cursor = 0
        self._fresh_from = -(-file.size // header.cluster_size)
        self.table = table
        self.blocks: dict[int, RefcountBlock] = {}
        """Blocks in memory by index into the table."""
        self.dirty: set[int] = set()
        """Indices of blocks that differ from the file."""
        self.urgent: set[int] = set()
        """Those of them with increments, which a flush must not leave behind."""
        self.dirty_table: set[int] = set()
        """Indices of table entries that differ from the file."""
        self.table_is_homeless = False
        """The table has outgrown its place in the file."""
        self.table_has_moved = False
        """The table's new place in the file does not have its content."""
        self.switch_is_due = False
        """The header in the file does not name the table's new place."""

    @property
    def needs_flush(self) -> bool:
        """Whether something must reach the file before what relies on it may."""
        return bool(self.urgent or self.dirty_table or self.table_is_homeless or self.switch_is_due)

    @property
    def end(self) -> int:
        """Bytes that the file must have to hold all clusters ever allocated."""
        return self._fresh_from << self._cluster_bits

    async def allocate(self, count: int) -> int:
        """Take ``count`` consecutive clusters.

        Returns:
            Their host offset.

        Raises:
            OSError: EFBIG: the refcount table cannot grow any more; or a block is unreadable.
        """
        return (await self._allocate(count, count)).offset

    async def allocate_up_to(self, count: int) -> Allocation:
        """Take the first free clusters, up to ``count``, all fresh or none of them."""
        return await self._allocate(1, count)

    def first_free(self, count: int) -> int | None:
        """The first free clusters, if that is known without waiting and ``count`` are in a row.

        Returns:
            Their host offset, for :meth:`take_first`; None where :meth:`allocate_up_to` will do.
        """
        index, position = divmod(self._cursor, self._block_counts)
        block = self.blocks.get(index)
        end = position + count
        if block is None or end > self._block_counts or _free_end(block, position, end) < end:
            return None
        block.is_recent = True
        return self._cursor << self._cluster_bits

    def take_first(self, count: int) -> None:
        """Take what :meth:`first_free` has just found."""
        self._set_allocated(self._cursor, count)

    def spoil_first(self, count: int) -> None:
        """Note that what :meth:`first_free` has just found is not taken, but not fresh any more."""
        self._fresh_from = max(self._fresh_from, self._cursor + count)

    async def _allocate(self, minimum: int, maximum: int) -> Allocation:
        while True:
            found = self._find(minimum, maximum)
            if isinstance(found, int):
                await self._load_block(found)
                await asyncio.sleep(0)  # many may be full: others have turns
                continue
            first, count = found
            is_fresh = first >= self._fresh_from
            if not is_fresh and first + count > self._fresh_from >= first + minimum:
                count = self._fresh_from - first
            self._set_allocated(first, count)
            return Allocation(first << self._cluster_bits, count, is_fresh)

    def _find(self, minimum: int, maximum: int) -> tuple[int, int] | int:
        """The first free run of ``minimum`` to ``maximum`` clusters.

        Returns:
            ``(first cluster, count)``, or the index of a block that must be loaded first.
        """
        cluster = self._cursor
        is_first_free = True
        first, count = cluster, 0
        while True:
            index = cluster // self._block_counts
            if not self._has_block(index):
                if count >= minimum:
                    return first, count
                cluster, count = cluster + self._create_blocks(index, cluster, minimum), 0
                continue
            block = self.blocks.get(index)
            if block is None:
                return index
            block.is_recent = True
            base = index * self._block_counts
            position = cluster - base
            if not count:
                position = _first_free(block, position)
                first = base + position
                if position < self._block_counts and is_first_free:
                    self._cursor, is_first_free = first, False
            end = _free_end(block, position, min(self._block_counts, position + maximum - count))
            count += end - position
            if count == maximum or (count >= minimum and end < self._block_counts):
                return first, count
            if end < self._block_counts:
                end, count = end + 1, 0
            cluster = base + end

    def _create_blocks(self, index: int, cluster: int, minimum: int) -> int:
        """Describe a new part of the file, long enough for ``minimum`` clusters in a row.

        The new blocks take the clusters from ``cluster`` on. One block alone describes
        itself. Several describe one another, so they must come into force together: the
        table moves, and one write of the header switches to all of them.

        Returns:
            How many blocks there are.
        """
        count = 1
        while cluster + count + minimum > (index + count) * self._block_counts:
            following = index + count
            if minimum < self._block_counts or self._has_block(following):
                break
            count += 1
        if index + count > len(self.table):
            self._extend_table(index + count - 1)
        for number in range(count):
            self._create_block(index + number, cluster + number)
        self._set_allocated(cluster, count)
        self.table_is_homeless |= count > 1
        return count

    def _has_block(self, index: int) -> bool:
        return index < len(self.table) and bool(self.table[index])

    def _create_block(self, index: int, cluster: int) -> None:
        """Make an empty block that lies in ``cluster``."""
        offset = cluster << self._cluster_bits
        block = RefcountBlock(offset, empty_counts(self._block_counts, self._header.refcount_bits))
        self.table[index] = offset
        block.mark_dirty(0, self._block_counts)
        self.dirty.add(index)
        self.urgent.add(index)
        self.dirty_table.add(index)
        self._metadata.add(offset, 1)
        self._add_block(index, block)

    def _extend_table(self, index: int) -> None:
        """Make room in the table for a block, half as much again at least."""
        per_cluster = self._header.cluster_size // 8
        entries = max(index + 1, len(self.table) * 3 // 2)
        entries = -(-entries // per_cluster) * per_cluster
        entries = min(entries, REFCOUNT_TABLE_BYTES_MAX // 8)
        if index >= entries:
            raise OSError(errno.EFBIG, "the image's refcount table is full", self._file.path)
        self.table.extend([0] * (entries - len(self.table)))
        self.table_is_homeless = True

    async def place_table(self) -> None:
        """Give a table that has outgrown its place a new one, and free the old.

        Placing it may need a block for which it must grow again: then it is still homeless.
        """
        header = self._header
        clusters = len(self.table) * 8 // header.cluster_size
        offset = await self.allocate(clusters)
        if len(self.table) * 8 // header.cluster_size != clusters:
            await self.release(offset, clusters << self._cluster_bits)
            return
        old = header.refcount_table_offset
        old_length = header.refcount_table_clusters << self._cluster_bits
        self._metadata.remove(old, old_length)
        self._quarantine.add(old, old_length)
        self._metadata.add(offset, clusters << self._cluster_bits)
        header.refcount_table_offset = offset
        header.refcount_table_clusters = clusters
        self.table_is_homeless = False
        self.table_has_moved = self.switch_is_due = True

    def _set_allocated(self, first: int, count: int) -> None:
        """Set the refcounts of free clusters to one."""
        cluster, end = first, first + count
        while cluster < end:
            index = cluster // self._block_counts
            base = index * self._block_counts
            stop = min(end, base + self._block_counts)
            block = self.blocks[index]
            block.set_to_one(cluster - base, stop - base)
            block.mark_dirty(cluster - base, stop - base)
            self.dirty.add(index)
            self.urgent.add(index)
            cluster = stop
        if first == self._cursor:
            self._cursor = end
        self._fresh_from = max(self._fresh_from, end)

    async def release(self, offset: int, length: int) -> None:
        """Take one reference away from every cluster that the range touches.

        Nothing in the file may refer to them any more (see :mod:`nbdfleece.qcow2.quarantine`).
        """
        cluster = offset >> self._cluster_bits
        end = (offset + length - 1 >> self._cluster_bits) + 1
        while cluster < end:
            index = cluster // self._block_counts
            base = index * self._block_counts
            stop = min(end, base + self._block_counts)
            block = await self._block(index)
            if block is None or not block.array[cluster - base : stop - base].all():
                self._on_damage(f"clusters at {cluster << self._cluster_bits:#x} are free twice")
                return
            part = block.array[cluster - base : stop - base]
            part -= 1
            block.mark_dirty(cluster - base, stop - base)
            self.dirty.add(index)
            if not part.all():
                self._cursor = min(self._cursor, cluster + int((part == 0).argmax()))
            cluster = stop

    async def share(self, offset: int) -> bool:
        """Add one reference to the cluster that an offset is in.

        Returns:
            False, with nothing changed, if the cluster is free or has as many as it can have.
        """
        index, position = divmod(offset >> self._cluster_bits, self._block_counts)
        block = await self._block(index)
        if block is None or not 0 < block.counts[position] < self._count_max:
            return False
        block.counts[position] += 1
        block.mark_dirty(position, position + 1)
        self.dirty.add(index)
        self.urgent.add(index)
        return True

    async def count(self, cluster: int) -> int:
        """The refcount of a host cluster."""
        block = await self._block(cluster // self._block_counts)
        return 0 if block is None else int(block.counts[cluster % self._block_counts])

    async def _block(self, index: int) -> RefcountBlock | None:
        """The block, loaded; None where there is none."""
        while index < len(self.table) and self.table[index]:
            block = self.blocks.get(index)
            if block is not None:
                block.is_recent = True
                return block
            await self._load_block(index)
        return None

    async def _load_block(self, index: int) -> None:
        await self._loads.run(index, partial(self._read_block, index))

    async def _read_block(self, index: int) -> None:
        offset = self.table[index]
        raw = await self._file.read(offset, self._header.cluster_size)
        counts = unpack_counts(raw, self._header.refcount_bits)
        self._add_block(index, RefcountBlock(offset, counts))

    def _add_block(self, index: int, block: RefcountBlock) -> None:
        """Put a block into memory, and make room."""
        if len(self.blocks) >= self._blocks_max:
            self._evict()
        self.blocks[index] = block

    def _evict(self) -> None:
        """Give up clean blocks that were not used since the last time."""
        for index, block in list(self.blocks.items()):
            if block.is_dirty or block.pins:
                continue
            if block.is_recent:
                block.is_recent = False
            else:
                del self.blocks[index]

    def pack_block(self, block: RefcountBlock) -> tuple[int, bytes]:
        """The sectors of a block that differ from the file, as ``(host offset, bytes)``."""
        bits = self._header.refcount_bits
        per_sector = _SECTOR * 8 // bits
        first = block.dirty_first // per_sector
        end = -(-block.dirty_end // per_sector)
        data = pack_counts(block.array[first * per_sector : end * per_sector], bits)
        return block.host_offset + first * _SECTOR, data


def _first_free(block: RefcountBlock, position: int) -> int:
    """The first position from ``position`` on with a count of zero, or the block's end."""
    if not block.counts[position]:
        return position
    free = block.array[position:] == 0
    index = int(free.argmax())
    return position + index if free[index] else len(block.array)


def _free_end(block: RefcountBlock, position: int, limit: int) -> int:
    """Where the free run that begins at ``position`` ends, at most ``limit``."""
    if limit - position <= _SCALAR_MAX:
        for at in range(position, limit):
            if block.counts[at]:
                return at
        return limit
    used = block.array[position:limit] != 0
    index = int(used.argmax()) if len(used) else 0
    return position + index if len(used) and used[index] else limit


def unpack_refcount_table(raw: bytes | bytearray) -> list[int]:
    """Decode the refcount table to host offsets of blocks."""
    words = np.frombuffer(raw, dtype=">u8").astype(np.uint64)
    offsets: list[int] = (words & np.uint64(_TABLE_OFFSET_MASK)).tolist()
    return offsets
