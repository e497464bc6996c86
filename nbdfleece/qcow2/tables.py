"""The guest's mapping: the L1 table and the L2 tables that are in memory.

The L1 table is held whole. L2 tables are loaded when first needed, kept under a
limit of bytes, and given up by a clock: a table used since the hand last came by
stays. A table that is dirty or pinned is never given up; dirty ones are bounded by
the writer, which starts a flush when :attr:`Mapping.dirty_bytes` passes its limit.

What the file says is checked when it is loaded. A table with an entry that cannot
be meant makes the mapping *damaged*: the image is not written from then on.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np

from ..block.file import FileNode
from ..block.single_flight import SingleFlight
from .entries import COPIED, OFFSET_MASK, Entries, L2Table, Layout
from .table_codec import unpack_table

CACHE_BYTES: Final = 32 << 20
"""Default limit of L2 tables in memory: enough for 256 GiB at 64 KiB clusters."""


class MetadataMap:
    """The host clusters that hold metadata: no guest write may go there (rule 4)."""

    def __init__(self, cluster_bits: int) -> None:
        self._cluster_bits = cluster_bits
        self.clusters: set[int] = set()
        """Host cluster numbers."""

    def add(self, offset: int, length: int) -> None:
        """Register the clusters that ``[offset, offset + length)`` touches."""
        self.clusters.update(self._span(offset, length))

    def remove(self, offset: int, length: int) -> None:
        """Forget the clusters that ``[offset, offset + length)`` touches."""
        self.clusters.difference_update(self._span(offset, length))

    def overlaps(self, offset: int, length: int) -> bool:
        """Whether any of the range is metadata."""
        return not self.clusters.isdisjoint(self._span(offset, length))

    def _span(self, offset: int, length: int) -> range:
        if not length:
            return range(0)
        bits = self._cluster_bits
        return range(offset >> bits, (offset + length - 1 >> bits) + 1)


class Mapping:
    """L1 and L2 tables of one image.

    Args:
        file: The image file.
        layout: What the tables depend on.
        l1: The L1 table's entries, native-endian, shape (l1_size,).
        cache_bytes: Limit of L2 tables in memory that need not be there.
        on_damage: Called with a message when an entry in the file cannot be meant.
    """

    def __init__(
        self,
        file: FileNode,
        layout: Layout,
        l1: Entries,
        *,
        cache_bytes: int,
        on_damage: Callable[[str], None],
    ) -> None:
        self._file = file
        self._layout = layout
        self._on_damage = on_damage
        self._loads = SingleFlight()
        self._tables_max = max(4, cache_bytes // layout.cluster_size)
        self.l1 = l1
        self.tables: dict[int, L2Table] = {}
        """Tables in memory by L1 index."""
        self.dirty: set[int] = set()
        """L1 indices of tables whose content the file does not have."""
        self.dirty_l1: set[int] = set()
        """L1 indices whose entry the file does not have."""

    @property
    def dirty_bytes(self) -> int:
        """Bytes of tables that cannot be given up before a flush."""
        return len(self.dirty) * self._layout.cluster_size

    def has_table(self, l1_index: int) -> bool:
        """Whether there is an L2 table for this part of the disk."""
        return bool(int(self.l1[l1_index]) & OFFSET_MASK)

    def is_shared(self, l1_index: int) -> bool:
        """Whether the L2 table must be copied before it is changed."""
        return not int(self.l1[l1_index]) & COPIED

    async def table(self, l1_index: int) -> L2Table | None:
        """The L2 table, or None where the L1 table has none.

        Raises:
            OSError: EIO: the table cannot be read, or the L1 entry cannot be meant.
        """
        while True:
            table = self.tables.get(l1_index)
            if table is not None:
                table.is_recent = True
                return table
            entry = int(self.l1[l1_index])
            if not entry & OFFSET_MASK:
                return None
            await self._loads.run(l1_index, partial(self._load, l1_index, entry & OFFSET_MASK))

    async def _load(self, l1_index: int, host_offset: int) -> None:
        """Bring one table into memory."""
        size = self._layout.cluster_size
        host_end = -(-self._file.size // size) * size
        if host_offset % size or host_offset >= host_end:
            self._on_damage(f"L1 entry {l1_index} leads to {host_offset:#x}")
            raise OSError(errno.EIO, f"damaged L1 entry {l1_index}", self._file.path)
        raw = await self._file.read(host_offset, size)
        first_guest_offset = l1_index * self._layout.l2_entries * size
        table = unpack_table(raw, host_offset, self._layout, host_end, first_guest_offset)
        if table.is_invalid:
            self._on_damage(f"the L2 table at {host_offset:#x} has impossible entries")
        self.add(l1_index, table)

    def add(self, l1_index: int, table: L2Table) -> None:
        """Put a table into memory, and make room."""
        if len(self.tables) >= self._tables_max:
            self._evict()
        self.tables[l1_index] = table

    def _evict(self) -> None:
        """Give up clean tables that were not used since the last time, a quarter at least."""
        wanted = max(1, self._tables_max // 4)
        for l1_index, table in list(self.tables.items()):
            if table.is_dirty or table.pins:
                continue
            if table.is_recent:
                table.is_recent = False
                continue
            del self.tables[l1_index]
            wanted -= 1
            if not wanted:
                return

    def link(self, l1_index: int, table: L2Table) -> None:
        """Let the L1 entry lead to a table that is new in the file."""
        table.is_new = True
        self.l1[l1_index] = np.uint64(table.host_offset | COPIED)
        self.tables.pop(l1_index, None)
        self.add(l1_index, table)
        self.dirty_l1.add(l1_index)
        self.touch(l1_index, table, 0, len(table.entries))

    def unlink(self, l1_index: int) -> None:
        """Let the L1 entry lead nowhere; its table is clean, or no flush is under way."""
        self.l1[l1_index] = 0
        self.tables.pop(l1_index, None)
        self.dirty.discard(l1_index)
        self.dirty_l1.add(l1_index)

    def touch(self, l1_index: int, table: L2Table, first: int, end: int) -> None:
        """Entries ``[first, end)`` of a table have changed: it waits for the next flush."""
        table.mark_dirty(first, end)
        self.dirty.add(l1_index)
