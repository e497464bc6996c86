"""Counting who refers to each host cluster, as ``qemu-img check`` does.

The header, L1 and L2 tables, internal snapshots, bitmaps and the refcount structures are
walked, and every reference adds one to its host cluster's count, up to what the image's
refcounts can hold. What cannot be on the way is a finding; QEMU's findings are found under
QEMU's counts.

An L2 table that several L1 entries lead to is looked at once and counts as often as it is
led to, so that the work is bounded by the file's size and not by what it claims. Memory is
4 bytes per host cluster of the file, untouched where nothing is referred to.

Spec: qcow2.txt, "Host cluster management", "Cluster mapping".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ..block.file import FileNode
from ..errors import ImageError
from .entries import ALL_ALLOCATED, COMPRESSED, COPIED, OFFSET_MASK, ZERO, Entries, Flags
from .header import Header
from .snapshots import InternalSnapshot

MESSAGES_MAX: Final = 1000
"""Findings that are told in words; further ones are only counted."""

L1_RESERVED: Final = 0x7F000000000001FF
L2_RESERVED: Final = 0x3F000000000001FE
REFCOUNT_TABLE_RESERVED: Final = 0x1FF

_BATCH_BYTES: Final = 4 << 20
"""L2 tables looked at together."""

_UNALIGNED_TABLES_MAX: Final = 1024
"""L2 tables that do not begin at a cluster may overlap: more of them are not looked into."""

_L1_ENTRIES_MAX: Final = 1 << 24
"""L1 entries of the disk and all snapshots together: 128 MiB, 32 GiB of L2 tables at least."""

Counts32 = npt.NDArray[np.uint32]


@dataclass(slots=True)
class CheckResult:
    """What a check found, under QEMU's names; sizes in bytes, the rest are numbers.

    Attributes:
        messages: Findings in words, in the order in which they were made.
    """

    check_errors: int = 0
    corruptions: int = 0
    leaks: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    image_end_offset: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    messages: list[str] = field(default_factory=list)

    def tell(self, message: str) -> None:
        """Note a finding in words, as long as they are not too many."""
        if len(self.messages) < MESSAGES_MAX:
            self.messages.append(message)
        elif len(self.messages) == MESSAGES_MAX:
            self.messages.append("there are more findings, which are only counted")

    def corrupt(self, message: str, count: int = 1) -> None:
        """Note damage."""
        self.corruptions += count
        self.tell(f"ERROR {message}")


class TableUse(NamedTuple):
    """An L2 table and how many L1 entries lead to it."""

    offset: int
    active: int
    """Of the disk."""
    total: int
    """Of the disk and of internal snapshots."""


class References:
    """The counts of one image, while they are made.

    Args:
        file: The image file.
        header: Its header.
        result: Where findings go.
    """

    def __init__(self, file: FileNode, header: Header, result: CheckResult) -> None:
        self.file = file
        self.header = header
        self.result = result
        self.cluster_bits = header.cluster_bits
        self.clusters = -(-file.size // header.cluster_size)
        """Clusters that are compared; one more if something reaches into it."""
        self.counts: Counts32 = np.zeros(self.clusters + 1, dtype=np.uint32)
        self.count_max = min((1 << header.refcount_bits) - 1, (1 << 32) - 1)
        self.uses: list[TableUse] = []
        self.looked_into: list[TableUse] = []
        """Those of the L2 tables that were read."""
        self.overflowed: set[int] = set()
        """Clusters with more references than can be counted."""
        self.misplaced_zeroes: list[tuple[int, int]] = []
        """``(file offset, subcluster bitmap)`` of L2 entries off a cluster that hold no data."""

    # Adding

    def add_range(self, offset: int, length: int) -> None:
        """Count one reference to every cluster that a range touches."""
        if not length:
            return
        if offset + length - self.file.size >= self.header.cluster_size:
            self.result.corrupt(
                f"reference to {offset:#x}, {length} bytes: past the end of the file"
            )
            return
        first = offset >> self.cluster_bits
        end = (offset + length - 1 >> self.cluster_bits) + 1
        self.clusters = max(self.clusters, end)
        self.counts[first:end] += np.uint32(1)
        self._limit(first, end)

    def _limit(self, first: int, end: int) -> None:
        """Keep counts within what a refcount can say; beyond it is damage."""
        part = self.counts[first:end]
        over = np.flatnonzero(part > self.count_max)
        for index in over.tolist():
            excess = int(part[index]) - self.count_max
            place = first + index << self.cluster_bits
            self.result.corrupt(f"more references to {place:#x} than refcounts can say", excess)
            self.overflowed.add(first + index)
        part[over] = self.count_max

    def add_spans(self, offsets: Entries, lengths: Entries, weights: Counts32) -> None:
        """Count references to many ranges of at most a few clusters each."""
        size, bits = self.header.cluster_size, np.uint64(self.cluster_bits)
        limit = self.file.size + size
        beyond = offsets + lengths >= np.uint64(limit)
        if beyond.any():
            place = int(offsets[beyond][0])
            count = int(weights[beyond].sum())
            self.result.corrupt(f"reference to {place:#x}: past the end of the file", count)
            offsets, lengths, weights = offsets[~beyond], lengths[~beyond], weights[~beyond]
        if not len(offsets):
            return
        first = (offsets >> bits).astype(np.int64)
        last = (offsets + lengths - np.uint64(1) >> bits).astype(np.int64)
        self.clusters = max(self.clusters, int(last.max()) + 1)
        for step in range(int((last - first).max()) + 1):
            inside = first + step <= last
            np.add.at(self.counts, first[inside] + step, weights[inside])
        low, high = int(first.min()), int(last.max()) + 1
        self._limit(low, high)

    # Tables

    async def add_l1_tables(self, snapshots: list[InternalSnapshot]) -> None:
        """Count the disk's and the snapshots' L1 tables, their L2 tables and clusters."""
        header = self.header
        if header.l1_size + sum(each.l1_size for each in snapshots) > _L1_ENTRIES_MAX:
            raise ImageError(self.file.path, f"more than {_L1_ENTRIES_MAX} L1 entries to check")
        active = await self._l1_offsets(header.l1_table_offset, header.l1_size)
        inactive = [
            await self._l1_offsets(each.l1_table_offset, each.l1_size) for each in snapshots
        ]
        offsets, index = np.unique(np.concatenate([active, *inactive]), return_inverse=True)
        total = np.bincount(index, minlength=len(offsets))
        mine = np.bincount(index[: len(active)], minlength=len(offsets))
        self.uses = [
            TableUse(*use)
            for use in zip(offsets.tolist(), mine.tolist(), total.tolist(), strict=True)
        ]
        if not self.uses:
            return
        spans = np.full(len(offsets), header.cluster_size, dtype=np.uint64)
        self.add_spans(offsets, spans, total.astype(np.uint32))
        for batch in self._batches():
            await self._add_l2_tables(batch)

    async def _l1_offsets(self, offset: int, size: int) -> Entries:
        """The offsets of the L2 tables that an L1 table leads to, with repetitions."""
        self.add_range(offset, 8 * size)
        if offset >= self.file.size:  # a snapshot's may be anywhere, even where no file can reach
            size = 0
        raw = await self.file.read(offset, 8 * size) if size else b""
        entries = np.frombuffer(raw, dtype=">u8").astype(np.uint64)
        entries = entries[entries != 0]
        self.count_damage(
            (entries & np.uint64(L1_RESERVED)) != 0, entries, "L1 entry {:#x} has reserved bits set"
        )
        offsets: Entries = entries & np.uint64(OFFSET_MASK)
        unaligned = (offsets & np.uint64(self.header.cluster_size - 1)) != 0
        self.count_damage(unaligned, offsets, "L2 table at {:#x} is not at a cluster's start")
        return offsets

    def count_damage(
        self, bad: Flags, values: Entries, text: str, weights: Counts32 | None = None
    ) -> None:
        """Note damage of some of many values; ``text`` tells of the first."""
        if bad.any():
            count = int(bad.sum()) if weights is None else int(weights[bad].sum())
            message = text.format(int(values[bad][0]))
            self.result.corrupt(message + (f" (and {count - 1} more)" if count > 1 else ""), count)

    def _batches(self) -> Iterator[list[TableUse]]:
        """The L2 tables that can be looked into, some megabytes at a time."""
        size = self.header.cluster_size
        inside = [use for use in self.uses if use.offset < self.file.size]
        unaligned = [use for use in inside if use.offset % size]
        if len(unaligned) > _UNALIGNED_TABLES_MAX:
            self.result.check_errors += 1
            self.result.tell(f"ERROR {len(unaligned)} L2 tables off clusters: not all looked into")
        uses = [use for use in inside if not use.offset % size]
        uses += unaligned[:_UNALIGNED_TABLES_MAX]
        self.looked_into = uses
        step = max(1, _BATCH_BYTES // size)
        return (uses[start : start + step] for start in range(0, len(uses), step))

    async def _add_l2_tables(self, uses: list[TableUse]) -> None:
        tables = await L2Batch.read(self.file, self.header, uses)
        result, header = self.result, self.header
        entries, weights = tables.entries, tables.weights
        compressed = tables.is_compressed
        self.count_damage(
            ~compressed & ((entries & np.uint64(L2_RESERVED)) != 0),
            entries,
            "L2 entry {:#x} has reserved bits set",
            weights,
        )
        self.count_damage(
            compressed & ((entries & np.uint64(COPIED)) != 0),
            entries,
            "L2 entry {:#x} of a compressed cluster has the copied flag",
            weights,
        )
        self._add_compressed(tables)
        self.count_damage(
            tables.is_unallocated & ((tables.bitmaps & np.uint64(ALL_ALLOCATED)) != 0),
            entries,
            "L2 entry {:#x} without a cluster has allocated subclusters",
            weights,
        )
        self._check_standard(tables)
        if not header.has_data_file:
            offsets = entries[tables.is_standard] & np.uint64(OFFSET_MASK)
            lengths = np.full(len(offsets), header.cluster_size, dtype=np.uint64)
            self.add_spans(offsets, lengths, weights[tables.is_standard])
        active = tables.active
        result.allocated_clusters += int(active[tables.is_standard | tables.is_counted].sum())
        result.compressed_clusters += int(active[tables.is_counted].sum())
        result.fragmented_clusters += int(active[tables.is_counted].sum()) + tables.fragments()

    def _add_compressed(self, tables: L2Batch) -> None:
        """Count compressed clusters' hosts; those that cannot be are not counted, as in QEMU."""
        bad_bitmap = tables.is_compressed & (tables.bitmaps != 0)
        if self.header.has_data_file:
            text = "compressed L2 entry {:#x} in an image with a data file"
            self.count_damage(tables.is_compressed, tables.entries, text, tables.weights)
            return
        text = "compressed L2 entry {:#x} has subclusters"
        self.count_damage(bad_bitmap, tables.entries, text, tables.weights)
        tables.is_counted = tables.is_compressed & ~bad_bitmap
        entries = tables.entries[tables.is_counted]
        offset_bits = 62 - (self.cluster_bits - 8)
        offsets = entries & np.uint64((1 << offset_bits) - 1)
        sectors = entries >> np.uint64(offset_bits) & np.uint64((1 << self.cluster_bits - 8) - 1)
        lengths = (sectors + np.uint64(1)) * np.uint64(512) - (offsets & np.uint64(511))
        self.add_spans(offsets, lengths, tables.weights[tables.is_counted])

    def _check_standard(self, tables: L2Batch) -> None:
        """What cannot be in entries with a host cluster."""
        standard, entries, bitmaps = tables.is_standard, tables.entries, tables.bitmaps
        overlap = (bitmaps >> np.uint64(32)) & bitmaps & np.uint64(ALL_ALLOCATED)
        self.count_damage(
            standard & (overlap != 0),
            entries,
            "L2 entry {:#x} has subclusters both allocated and zero",
            tables.weights,
        )
        offsets = entries & np.uint64(OFFSET_MASK)
        unaligned = standard & ((offsets & np.uint64(self.header.cluster_size - 1)) != 0)
        text = "cluster at {:#x} is not at a cluster's start"
        self.count_damage(unaligned, offsets, text, tables.weights)
        if self.header.has_extended_l2:
            empty = (bitmaps & np.uint64(ALL_ALLOCATED)) == 0
        else:
            empty = (entries & np.uint64(ZERO)) != 0
        for index in np.flatnonzero(unaligned & empty).tolist():
            self.misplaced_zeroes.append((tables.place(index), int(bitmaps[index])))


class L2Batch:
    """Some L2 tables as they are in the file, one behind the other; arrays of shape (n,).

    Attributes:
        entries: Entries, in the machine's byte order.
        bitmaps: Subcluster bitmaps; zeroes without extended L2.
        weights: How many L1 entries lead to each entry's table.
        active: Those of them of the disk.
        is_counted: Compressed entries that can be.
    """

    def __init__(self, words: Entries, header: Header, uses: list[TableUse]) -> None:
        per_table = header.l2_entries
        self.uses = uses
        self.entry_bytes = 16 if header.has_extended_l2 else 8
        self.cluster_size = header.cluster_size
        self.entries: Entries = words[::2].copy() if header.has_extended_l2 else words
        self.bitmaps: Entries = (
            words[1::2].copy() if header.has_extended_l2 else np.zeros_like(words)
        )
        totals = np.array([use.total for use in uses], dtype=np.uint32)
        actives = np.array([use.active for use in uses], dtype=np.uint32)
        self.weights: Counts32 = np.repeat(totals, per_table)
        self.active: Counts32 = np.repeat(actives, per_table)
        self.table_index = np.repeat(np.arange(len(uses)), per_table)
        self.is_compressed: Flags = (self.entries & np.uint64(COMPRESSED)) != 0
        has_host = (self.entries & np.uint64(OFFSET_MASK)) != 0
        if header.has_data_file:
            is_zero = (self.entries & np.uint64(ZERO)) != 0
            is_data = ~is_zero if not header.has_extended_l2 else np.ones_like(is_zero)
            has_host |= is_data & ((self.entries & np.uint64(COPIED)) != 0)
        self.is_standard: Flags = ~self.is_compressed & has_host
        plain_zero = (self.entries & np.uint64(ZERO)) != 0
        if header.has_extended_l2:
            plain_zero = np.zeros_like(plain_zero)
        self.is_unallocated: Flags = ~self.is_compressed & ~has_host & ~plain_zero
        self.is_counted: Flags = np.zeros_like(self.is_compressed)

    @classmethod
    async def read(cls, file: FileNode, header: Header, uses: list[TableUse]) -> L2Batch:
        """Read tables."""
        raw = b"".join([bytes(await file.read(use.offset, header.cluster_size)) for use in uses])
        return cls(np.frombuffer(raw, dtype=">u8").astype(np.uint64), header, uses)

    def place(self, index: int) -> int:
        """Where an entry lies in the file."""
        table, within = divmod(index, self.cluster_size // self.entry_bytes)
        return self.uses[table].offset + within * self.entry_bytes

    def fragments(self) -> int:
        """Clusters of the disk that do not lie behind the one before them in the same table."""
        index = np.flatnonzero(self.is_standard)
        offsets = self.entries[index] & np.uint64(OFFSET_MASK)
        tables = self.table_index[index]
        behind = offsets[1:] == offsets[:-1] + np.uint64(self.cluster_size)
        broken = (tables[1:] == tables[:-1]) & ~behind
        return int(self.active[index][1:][broken].sum())
