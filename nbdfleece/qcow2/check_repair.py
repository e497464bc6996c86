"""Putting right what a check found, so that a crash in between leaves nothing worse.

1. L2 entries that keep a host cluster off a cluster's start and hold no data lose it.
2. Refcounts become what the references say. Each one is either as wrong as before or right,
   whatever a crash leaves of a write. Where the blocks themselves cannot be trusted, a new
   table with new blocks is written behind everything, made durable, and then put in force by
   the 12 bytes of the header that lie in one sector.
3. Copied flags become what the refcounts say, which are durable by then.
4. The dirty and corrupt bits are cleared if nothing is wrong any more.

Guest data are never written. An L2 table that lies over other metadata is not written either.
Leaked clusters are given free; unlike QEMU we do not punch them out of the file.
"""

from __future__ import annotations

import numpy as np

from ..block.file import FileNode
from ..errors import ImageError
from .check import Findings, Repair, count_references, examine, read_header
from .check_references import CheckResult, References
from .entries import ALL_ALLOCATED, ZERO
from .header import (
    AUTOCLEAR_FIELD,
    INCOMPATIBLE_FIELD,
    REFCOUNT_TABLE_BYTES_MAX,
    REFCOUNT_TABLE_FIELD,
    Autoclear,
    Header,
    Incompatible,
)
from .refcount_codec import empty_counts, pack_counts

_AUTOCLEAR_KNOWN = int(Autoclear.BITMAPS | Autoclear.DATA_FILE_RAW | Autoclear.PRIVATE)


async def repair_image(
    file: FileNode, first: CheckResult, findings: Findings, repair: Repair
) -> CheckResult:
    """Repair the image in a file open for writing.

    Args:
        file: The image file.
        first: What a check found.
        findings: Likewise.
        repair: Leaks, or all.

    Returns:
        What a check finds now, with what was fixed.

    Raises:
        OSError: The file could not be read or written; what was repaired until then stays.
        ImageError: There is no room for new refcount structures.
    """
    if first.check_errors:
        first.tell("ERROR not repaired: the check is not complete")
        return first
    if repair is Repair.LEAKS and findings.must_rebuild:
        first.check_errors += 1
        first.tell("ERROR the refcount structures must be rebuilt: repair all, not only leaks")
        return first
    if not (first.corruptions or first.leaks):
        await _clear_marks(file, findings.references.header)
        return first
    await _clear_unknown_autoclear_bits(file, findings.references.header)
    last = await _repair_steps(file, findings, repair)
    last.corruptions_fixed = max(0, first.corruptions - last.corruptions)
    last.leaks_fixed = max(0, first.leaks - last.leaks)
    return last


async def _repair_steps(file: FileNode, findings: Findings, repair: Repair) -> CheckResult:
    refused: list[str] = []
    if repair is Repair.ALL and findings.references.misplaced_zeroes:
        await _drop_misplaced_zeroes(findings, refused)
        _, findings = await examine(file)
    if findings.must_rebuild:
        await _rebuild_refcounts(findings)
    else:
        await _write_refcounts(findings, repair)
    result, findings = await examine(file)
    only_flags = result.corruptions == findings.copied_corruptions and not result.leaks
    if findings.wrong_copied and (repair is Repair.ALL or only_flags):
        await _write_copied(findings, refused)
        result, findings = await examine(file)
    for message in refused:
        result.check_errors += 1
        result.tell(f"ERROR {message}")
    if not (result.corruptions or result.check_errors):
        await _clear_marks(file, findings.references.header)
    return result


async def _drop_misplaced_zeroes(findings: Findings, refused: list[str]) -> None:
    """Let entries that hold no data read as zeroes without a host cluster."""
    references = findings.references
    writable = _writable_tables(references)
    for place, bitmap in references.misplaced_zeroes:
        if not _may_write(references, place, writable, refused):
            continue
        if references.header.has_extended_l2:
            zero = (bitmap >> 32 | bitmap) & ALL_ALLOCATED
            data = bytes(8) + (zero << 32).to_bytes(8, "big")
        else:
            data = ZERO.to_bytes(8, "big")
        await references.file.write(place, memoryview(data))
    await references.file.flush()


def _writable_tables(references: References) -> set[int]:
    """The clusters of the disk's L1 and L2 tables that nothing else lies over."""
    header, counts = references.header, references.counts
    bits = header.cluster_bits
    first = header.l1_table_offset >> bits
    expected = dict.fromkeys(range(first, first - (-header.l1_size * 8 >> bits)), 1)
    for use in references.looked_into:
        if not use.offset % header.cluster_size:
            # An L2 table over the L1 table makes two references where each expects its own.
            expected[use.offset >> bits] = use.total
    return {
        cluster
        for cluster, count in expected.items()
        if counts[cluster] == count and cluster not in references.overflowed
    }


def _may_write(references: References, place: int, writable: set[int], refused: list[str]) -> bool:
    """Whether the table with the entry at ``place`` lies over nothing else."""
    if place >> references.cluster_bits in writable:
        return True
    refused.append(f"the table with the entry at {place:#x} lies over something else: not written")
    return False


async def _write_refcounts(findings: Findings, repair: Repair) -> None:
    """Put refcounts right where they are."""
    references, blocks = findings.references, findings.blocks
    file, bits = references.file, references.header.refcount_bits
    for index in range(-(-references.clusters // blocks.per_block)):
        block = await blocks.block(index)
        if block is None:
            continue
        first = index * blocks.per_block
        wanted = references.counts[first : min(first + blocks.per_block, references.clusters)]
        part = block[: len(wanted)]
        wrong = part > wanted if repair is Repair.LEAKS else part != wanted
        if wrong.any():
            part[wrong] = wanted[wrong]
            await file.write(blocks.offset(index), memoryview(pack_counts(block, bits)))
    await file.flush()


async def _rebuild_refcounts(findings: Findings) -> None:
    """Write new blocks and a new table behind everything, and switch to them."""
    header, file = findings.references.header, findings.references.file
    bare = References(file, header, CheckResult())
    await count_references(bare, refcount_table=False)
    start = max(findings.references.clusters, bare.clusters, -(-file.size // header.cluster_size))
    per_block = findings.blocks.per_block
    indices, table_clusters = _plan(bare, start, per_block, header)
    end = start + len(indices) + table_clusters
    table = np.zeros(table_clusters * header.cluster_size // 8, dtype=">u8")
    for number, index in enumerate(indices):
        counts = empty_counts(per_block, header.refcount_bits)
        known = bare.counts[index * per_block : min((index + 1) * per_block, bare.clusters)]
        counts[: len(known)] = known
        counts[max(0, start - index * per_block) : max(0, end - index * per_block)] = 1
        table[index] = start + number << header.cluster_bits
        packed = pack_counts(counts, header.refcount_bits)
        await file.write(int(table[index]), memoryview(packed))
    table_offset = start + len(indices) << header.cluster_bits
    await file.write(table_offset, memoryview(table.tobytes()))
    await file.flush()
    field = table_offset.to_bytes(8, "big") + table_clusters.to_bytes(4, "big")
    await file.write(REFCOUNT_TABLE_FIELD, memoryview(field))
    await file.flush()


def _plan(bare: References, start: int, per_block: int, header: Header) -> tuple[list[int], int]:
    """The indices of the blocks that are needed, and how many clusters their table takes."""
    used = np.flatnonzero(bare.counts[: bare.clusters])
    needed = set(np.unique(used // per_block).tolist())
    table_clusters = 1
    while True:
        end = start + len(needed) + table_clusters
        wider = needed | set(range(start // per_block, (end - 1) // per_block + 1))
        clusters = -(-(max(wider) + 1) * 8 // header.cluster_size)
        if wider == needed and clusters == table_clusters:
            break
        needed, table_clusters = wider, max(clusters, table_clusters)
    if table_clusters * header.cluster_size > REFCOUNT_TABLE_BYTES_MAX:
        raise ImageError(bare.file.path, "no refcount table is large enough for the file")
    return sorted(needed), table_clusters


async def _write_copied(findings: Findings, refused: list[str]) -> None:
    references = findings.references
    writable = _writable_tables(references)
    for place, entry in findings.wrong_copied:
        if _may_write(references, place, writable, refused):
            await references.file.write(place, memoryview(entry.to_bytes(8, "big")))
    await references.file.flush()


async def _clear_unknown_autoclear_bits(file: FileNode, header: Header) -> None:
    """Whoever writes clears the bits of features that he does not know."""
    if header.autoclear_features & ~_AUTOCLEAR_KNOWN:
        bits = header.autoclear_features & _AUTOCLEAR_KNOWN
        await file.write(AUTOCLEAR_FIELD, memoryview(bits.to_bytes(8, "big")))
        await file.flush()


async def _clear_marks(file: FileNode, header: Header) -> None:
    """Clear the dirty and the corrupt bit."""
    marks = int(Incompatible.DIRTY | Incompatible.CORRUPT)
    features = (await read_header(file)).incompatible_features
    if header.version >= 3 and features & marks:
        await file.flush()
        await file.write(INCOMPATIBLE_FIELD, memoryview((features & ~marks).to_bytes(8, "big")))
        await file.flush()
