"""L2 tables between the file and memory; what cannot be meant in them is marked.

Spec: qcow2.txt, "Cluster mapping".
"""

from __future__ import annotations

import numpy as np

from ..bitmaps.memory import zeroed_memory
from .entries import (
    COMPRESSED,
    COPIED,
    INVALID,
    OFFSET_MASK,
    SUBCLUSTERS,
    ZERO,
    Entries,
    Flags,
    L2Table,
    Layout,
)
from .subclusters import pack_bitmaps, unpack_subclusters


def empty_table(host_offset: int, layout: Layout) -> L2Table:
    """A new table that maps nothing."""
    entries = np.frombuffer(zeroed_memory(8 * layout.l2_entries), dtype=np.uint64)
    return L2Table(host_offset, entries, entries.copy() if layout.has_extended_l2 else None)


def copied_table(table: L2Table, host_offset: int) -> L2Table:
    """A copy of a table for another place in the file."""
    bitmaps = None if table.bitmap_array is None else table.bitmap_array.copy()
    return L2Table(host_offset, table.array.copy(), bitmaps)


def unpack_table(
    raw: bytes | bytearray, host_offset: int, layout: Layout, host_end: int, guest_offset: int
) -> L2Table:
    """Decode an L2 table and mark what cannot be meant in it.

    Args:
        raw: One cluster.
        host_offset: Where it lies.
        layout: The image's.
        host_end: Host offsets from here on are past the end of the file.
        guest_offset: Of the table's first cluster.
    """
    words = np.frombuffer(raw, dtype=">u8").astype(np.uint64)
    bitmaps = words[1::2].copy() if layout.has_extended_l2 else None
    stored = words[::2] if layout.has_extended_l2 else words
    is_compressed = (stored & np.uint64(COMPRESSED)) != 0
    keep = OFFSET_MASK | COPIED | (0 if layout.has_extended_l2 else ZERO)
    entries = np.where(is_compressed, stored & ~np.uint64(COPIED), stored & np.uint64(keep))
    invalid = ~is_compressed & _is_invalid(entries, layout, host_end)
    if layout.has_data_file:
        invalid |= is_compressed | _is_elsewhere(entries, layout, guest_offset)
    else:  # offset 0 is unallocated; only an external data file has a cluster there
        entries[(entries & np.uint64(OFFSET_MASK | COMPRESSED)) == 0] &= np.uint64(ZERO)
    if bitmaps is not None:
        invalid |= unpack_subclusters(entries, bitmaps, is_compressed)
    entries[invalid] = np.uint64(INVALID)
    table = L2Table(host_offset, entries, bitmaps)
    table.is_invalid = bool(invalid.any())
    return table


def _is_invalid(entries: Entries, layout: Layout, host_end: int) -> Flags:
    """Offsets off a cluster's start or past the file's end; version 2's reserved bit 0."""
    offsets = entries & np.uint64(OFFSET_MASK)
    invalid: Flags = (offsets & np.uint64(layout.cluster_size - 1)) != 0
    if not layout.has_data_file:
        invalid |= offsets >= np.uint64(host_end)
    if layout.version < 3:
        invalid |= (entries & np.uint64(ZERO)) != 0
    return invalid


def _is_elsewhere(entries: Entries, layout: Layout, guest_offset: int) -> Flags:
    """Host offsets that are not the guest offset, as they must be in an external data file."""
    steps = np.arange(len(entries), dtype=np.uint64) << np.uint64(layout.cluster_bits)
    offsets = entries & np.uint64(OFFSET_MASK)
    has_host = (entries & np.uint64(OFFSET_MASK | COPIED)) != 0
    elsewhere: Flags = has_host & (offsets != steps + np.uint64(guest_offset))
    return elsewhere


def pack_table(table: L2Table, first: int, end: int) -> bytes:
    """Encode entries ``[first, end)`` as they lie in the file."""
    entries = table.array[first:end]
    is_compressed = (entries & np.uint64(COMPRESSED)) != 0
    flags = SUBCLUSTERS | INVALID
    if table.bitmap_array is None:
        plain = entries & ~np.uint64(flags)
        return np.where(is_compressed, entries, plain).astype(">u8").tobytes()
    plain = entries & ~np.uint64(flags | ZERO)
    words = np.empty(2 * (end - first), dtype=">u8")
    words[::2] = np.where(is_compressed, entries, plain)
    words[1::2] = pack_bitmaps(entries, table.bitmap_array[first:end])
    return words.tobytes()
