"""Checking an image: its refcounts against what refers to its clusters, as ``qemu-img check``.

The references are counted (:mod:`.check_references`), the refcounts of the file compared with
them, and the copied flags of the disk's tables with the refcounts:

=================================  ============
a cluster has                      it is
=================================  ============
more refcount than references      a leak
less                               a corruption
=================================  ============

A repair (:mod:`.check_repair`) is followed by a second check, whose findings count.

Deviations from QEMU: an image whose bitmap directory is damaged is checked, each damaged
entry being a corruption (QEMU cannot open such an image); external data files are not opened.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from ..block.file import FileNode
from ..errors import ImageError
from .bitmap_directory import (
    BitmapEntry,
    BitmapGeometry,
    find_directory,
    list_directory,
)
from .check_references import (
    MESSAGES_MAX,
    REFCOUNT_TABLE_RESERVED,
    CheckResult,
    L2Batch,
    References,
    TableUse,
)
from .entries import COPIED, OFFSET_MASK
from .header import (
    HEADER_BYTES_MAX,
    Header,
    unpack_header,
)
from .refcount_codec import Counts, counts_per_block, unpack_counts
from .snapshots import read_snapshots

CLUSTERS_MAX: Final = (1 << 31) - 1
"""Host clusters of a file that is checked; QEMU's limit too."""

_BLOCKS_BYTES: Final = 64 << 20
"""Decoded refcount blocks that are kept."""

_TABLE_ENTRY_RESERVED: Final = 0xFF000000000001FE

U64 = npt.NDArray[np.uint64]


class Repair(IntEnum):
    """What a check may put right."""

    NOTHING = 0
    LEAKS = 1
    ALL = 2


class RefcountBlocks:
    """The refcounts as they are in the file.

    Args:
        file: The image file.
        header: Its header.
        table: The refcount table, shape (entries,).
    """

    def __init__(self, file: FileNode, header: Header, table: U64) -> None:
        self.table = table
        self.per_block = counts_per_block(header.cluster_bits, header.refcount_order)
        self._file = file
        self._header = header
        self._kept: OrderedDict[int, Counts] = OrderedDict()

    @classmethod
    async def read(cls, file: FileNode, header: Header) -> RefcountBlocks:
        """Read the table."""
        length = header.refcount_table_clusters << header.cluster_bits
        raw = await file.read(header.refcount_table_offset, length)
        return cls(file, header, np.frombuffer(raw, dtype=">u8").astype(np.uint64))

    def is_readable(self, index: int) -> bool:
        """Whether the table's entry leads to where a block can be, or nowhere."""
        return not self.offset(index) % self._header.cluster_size

    def offset(self, index: int) -> int:
        """Where a block lies; 0 where there is none."""
        return int(self.table[index]) & ~REFCOUNT_TABLE_RESERVED if index < len(self.table) else 0

    async def block(self, index: int) -> Counts | None:
        """The counts of one block; None where there is none, so that all are 0."""
        offset = self.offset(index)
        if not offset or offset >= self._file.size:
            return None
        kept = self._kept.pop(offset, None)
        if kept is None:
            raw = await self._file.read(offset, self._header.cluster_size)
            kept = unpack_counts(raw, self._header.refcount_bits)
            while len(self._kept) >= max(4, _BLOCKS_BYTES // kept.nbytes):
                self._kept.popitem(last=False)
        self._kept[offset] = kept
        return kept

    async def lookup(self, clusters: npt.NDArray[np.int64]) -> tuple[U64, npt.NDArray[np.bool_]]:
        """The refcounts of some clusters, and whether each can be read."""
        found = np.zeros(len(clusters), dtype=np.uint64)
        known = np.ones(len(clusters), dtype=np.bool_)
        indices = clusters // self.per_block
        for index in np.unique(indices).tolist():
            mine = indices == index
            if not self.is_readable(index):
                known[mine] = False
                continue
            block = await self.block(index)
            if block is not None:
                found[mine] = block[clusters[mine] % self.per_block]
        return found, known


@dataclass(slots=True)
class Findings:
    """What a check learnt of an image beyond its result, for the repair.

    Attributes:
        references: How many there are to each cluster.
        blocks: The refcounts in the file.
        must_rebuild: The refcount structures cannot be put right where they are.
        wrong_copied: File offsets of L1 and L2 entries, each with its copied flag put right.
        copied_corruptions: What they count for among the corruptions.
    """

    references: References
    blocks: RefcountBlocks
    must_rebuild: bool
    wrong_copied: list[tuple[int, int]]
    copied_corruptions: int = 0


async def check_image(
    path: str | os.PathLike[str],
    *,
    repair: Repair = Repair.NOTHING,
    force_share: bool = False,
) -> CheckResult:
    """Check an image, and repair it if asked.

    Args:
        path: The image file; of its chain only this one is looked at.
        repair: What may be put right.
        force_share: Check even while another program writes; not with a repair.

    Raises:
        OSError: The file cannot be opened, read or written.
        ImageLockedError: Another program uses the image.
        ImageError: The header is damaged, so that nothing can be checked.
    """
    file = FileNode.open(
        path, read_only=repair is Repair.NOTHING, force_share=force_share and not repair
    )
    try:
        result, findings = await examine(file)
        if repair:
            from .check_repair import repair_image

            result = await repair_image(file, result, findings, repair)
    finally:
        await file.close()
    return result


async def read_header(file: FileNode) -> Header:
    """Decode the header of an open file; errors as for :func:`check_image`."""
    raw = await file.read(0, min(file.size, HEADER_BYTES_MAX))
    return unpack_header(raw, file.path, file.size)


async def examine(file: FileNode) -> tuple[CheckResult, Findings]:
    """Check the image in an open file, changing nothing; errors as for :func:`check_image`."""
    header = await read_header(file)
    result = CheckResult()
    if file.size >> header.cluster_bits > CLUSTERS_MAX:
        raise ImageError(file.path, f"more than {CLUSTERS_MAX} clusters: too many to check")
    result.total_clusters = -(-header.size // header.cluster_size)
    references = References(file, header, result)
    blocks = await RefcountBlocks.read(file, header)
    await count_references(references)
    must_rebuild = _count_blocks(references, blocks.table)
    findings = Findings(references, blocks, must_rebuild, [])
    await _compare(findings)
    await _check_copied(findings)
    return result, findings


async def count_references(references: References, *, refcount_table: bool = True) -> None:
    """Count everything but the refcount blocks, and the table if asked; errors are findings.

    Raises:
        OSError: The file cannot be read.
        ImageError: There is too much to count, or the snapshot table has no end.
    """
    file, header, result = references.file, references.header, references.result
    references.add_range(0, header.cluster_size)
    snapshots, table_length = await read_snapshots(file, header, strict=False)
    if header.has_data_file and snapshots:
        result.corrupt(f"{len(snapshots)} internal snapshots in an image with a data file")
    sound = []
    for each in snapshots:
        if header.version >= 3 and each.extra_length < 16:
            result.corrupt(f"the entry of snapshot {each.name!r} is incomplete")
        if each.l1_table_offset % header.cluster_size or each.l1_size * 8 > 32 << 20:
            result.corrupt(f"the L1 table of snapshot {each.name!r} cannot be where it is said")
        else:
            sound.append(each)
    await references.add_l1_tables(sound)
    references.add_range(header.snapshots_offset, table_length)
    if refcount_table:
        references.add_range(
            header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits
        )
    await _count_bitmaps(references)


async def _count_bitmaps(references: References) -> None:
    file, header, result = references.file, references.header, references.result
    geometry = BitmapGeometry(header.size, header.cluster_size, file.size)
    try:
        directory = find_directory(header, geometry, file.path)
    except ImageError as error:
        result.corrupt(str(error))
        return
    if directory is None:
        return
    count, size, offset = directory
    references.add_range(offset, size)
    listing = list_directory(await file.read(offset, size), count, geometry)
    for damaged in listing.damaged:
        result.corrupt(f"bitmap {damaged.name or '?'} {damaged.reason}")
    for entry in listing.entries:
        await _count_bitmap(references, entry)


async def _count_bitmap(references: References, entry: BitmapEntry) -> None:
    header, result = references.header, references.result
    references.add_range(entry.table_offset, 8 * entry.table_entries)
    raw = await references.file.read(entry.table_offset, 8 * entry.table_entries)
    for value in np.frombuffer(raw, dtype=">u8").tolist():
        offset = value & OFFSET_MASK
        if value & _TABLE_ENTRY_RESERVED or offset % header.cluster_size or (value & 1 and offset):
            result.corrupt(f"bitmap {entry.name!r} has the impossible table entry {value:#x}")
        elif offset:
            references.add_range(offset, header.cluster_size)


def _count_blocks(references: References, table: U64) -> bool:
    """Count the refcount blocks; return whether the structures must be built anew."""
    size, found = references.header.cluster_size, references.result.corruptions
    values = table[table != 0]
    offsets = values & ~np.uint64(REFCOUNT_TABLE_RESERVED)
    is_odd = (values & np.uint64(REFCOUNT_TABLE_RESERVED)) != 0
    is_unaligned = ~is_odd & (offsets % np.uint64(size) != 0)
    is_outside = ~is_odd & ~is_unaligned & (offsets >= np.uint64(references.clusters * size))
    references.count_damage(is_odd, values, "refcount table entry {:#x} has reserved bits set")
    references.count_damage(is_unaligned, offsets, "refcount block at {:#x}, not at a cluster")
    references.count_damage(is_outside, offsets, "refcount block at {:#x}, outside the file")
    places, repeats = np.unique(offsets[~is_odd & ~is_unaligned & ~is_outside], return_counts=True)
    before = references.counts[(places >> np.uint64(references.cluster_bits)).astype(np.int64)]
    weights = repeats.astype(np.uint32)
    references.add_spans(places, np.full(len(places), size, dtype=np.uint64), weights)
    if references.count_max > 1:  # else the count stays 1, and the excess is damage already
        weights[before == 0] -= 1
        text = "refcount block at {:#x} is something else too"
        references.count_damage(weights != 0, places, text, weights)
    return references.result.corruptions > found


async def _compare(findings: Findings) -> None:
    """Compare refcounts with references."""
    references, blocks = findings.references, findings.blocks
    result, per_block = references.result, blocks.per_block
    highest = 0
    for index in range(-(-references.clusters // per_block)):
        first = index * per_block
        wanted = references.counts[first : min(first + per_block, references.clusters)]
        if not blocks.is_readable(index):
            result.check_errors += len(wanted)
            result.tell(f"ERROR the refcounts of clusters from {first} on cannot be read")
            continue
        block = await blocks.block(index)
        counts = np.zeros_like(wanted) if block is None else block[: len(wanted)]
        used = np.flatnonzero((wanted != 0) | (counts != 0))
        if len(used):
            highest = first + int(used[-1])
        _note_differences(findings, first, counts, wanted)
    result.image_end_offset = highest + 1 << references.cluster_bits


def _note_differences(
    findings: Findings, first: int, counts: Counts, wanted: npt.NDArray[np.uint32]
) -> None:
    """Note refcounts that are not what the references say, of the clusters from ``first`` on."""
    result = findings.references.result
    places = np.flatnonzero(wanted != counts)
    leaks = int((counts[places] > wanted[places]).sum())
    result.leaks += leaks
    result.corruptions += len(places) - leaks
    findings.must_rebuild |= bool((counts[places] == 0).any())
    for place in places[: MESSAGES_MAX + 1].tolist():
        kind = "Leaked" if counts[place] > wanted[place] else "ERROR"
        text = f"cluster {first + place} refcount={counts[place]} reference={wanted[place]}"
        result.tell(f"{kind} {text}")


async def _check_copied(findings: Findings) -> None:
    """Compare the copied flags of the disk's L1 and L2 entries with the refcounts."""
    references, blocks = findings.references, findings.blocks
    header, file = references.header, references.file
    raw = await file.read(header.l1_table_offset, header.l1_size * 8)
    l1 = np.frombuffer(raw, dtype=">u8").astype(np.uint64)
    places = np.flatnonzero(l1 & np.uint64(OFFSET_MASK))
    clusters = (l1[places] & np.uint64(OFFSET_MASK)) >> np.uint64(header.cluster_bits)
    counts, known = await blocks.lookup(clusters.astype(np.int64))
    wrong = known & ((counts == 1) != ((l1[places] & np.uint64(COPIED)) != 0))
    for place in places[wrong].tolist():
        _note_copied(findings, header.l1_table_offset + 8 * place, int(l1[place]), 1)
    active = [use for use in references.looked_into if use.active and use.offset]
    for start in range(0, len(active), 16):
        await _check_copied_l2(findings, active[start : start + 16])


async def _check_copied_l2(findings: Findings, uses: list[TableUse]) -> None:
    header, file = findings.references.header, findings.references.file
    tables = await L2Batch.read(file, header, uses)
    index = np.flatnonzero(tables.is_standard)
    entries = tables.entries[index]
    clusters = (entries & np.uint64(OFFSET_MASK)) >> np.uint64(header.cluster_bits)
    if header.has_data_file:
        counts, known = np.ones(len(index), dtype=np.uint64), np.ones(len(index), dtype=np.bool_)
    else:
        counts, known = await findings.blocks.lookup(clusters.astype(np.int64))
    wrong = known & ((counts == 1) != ((entries & np.uint64(COPIED)) != 0))
    for place in index[wrong].tolist():
        weight = int(tables.active[place])
        _note_copied(findings, tables.place(place), int(tables.entries[place]), weight)


def _note_copied(findings: Findings, place: int, entry: int, weight: int) -> None:
    text = f"copied flag of entry {entry:#x} at {place:#x} contradicts the refcount"
    findings.references.result.corrupt(text, weight)
    findings.wrong_copied.append((place, entry ^ COPIED))
    findings.copied_corruptions += weight
