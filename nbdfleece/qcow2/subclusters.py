"""Extended L2 entries: clusters whose 32 subclusters have states of their own.

In memory only entries with SUBCLUSTERS have a bitmap that counts; all others say by
themselves what all their subclusters are, and get their bitmap when they are packed.

Spec: qcow2.txt, "Extended L2 Entries": bit x of the bitmap says that subcluster x is
allocated, bit 32 + x that it reads as zeroes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .entries import (
    ALL_ALLOCATED,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    SUBCLUSTERS,
    SUBCLUSTERS_PER_CLUSTER,
    ZERO,
    Entries,
    Flags,
    Kind,
    kind_of,
)


class SubclusterRun(NamedTuple):
    """Consecutive subclusters of one kind: NORMAL, ZERO_PLAIN or UNALLOCATED."""

    kind: Kind
    first: int
    end: int


def bitmap_of(entry: int, bitmap: int) -> int:
    """The bitmap of an entry in memory, given what is stored beside it."""
    if entry & SUBCLUSTERS:
        return bitmap
    kind = kind_of(entry)
    if kind is Kind.NORMAL:
        return ALL_ALLOCATED
    if kind in (Kind.ZERO_PLAIN, Kind.ZERO_ALLOC):
        return ALL_ALLOCATED << SUBCLUSTERS_PER_CLUSTER
    return 0


def entry_with_bitmap(host_and_copied: int, bitmap: int) -> int:
    """The entry in memory for a host cluster (with COPIED), or none, and a bitmap."""
    if bitmap == ALL_ALLOCATED:
        return host_and_copied
    if bitmap == ALL_ALLOCATED << SUBCLUSTERS_PER_CLUSTER:
        return host_and_copied | ZERO
    if not bitmap and not host_and_copied:
        return 0
    return host_and_copied | SUBCLUSTERS


def kind_of_subcluster(bitmap: int, index: int) -> Kind:
    """What one subcluster reads as."""
    if bitmap >> index & 1:
        return Kind.NORMAL
    if bitmap >> SUBCLUSTERS_PER_CLUSTER + index & 1:
        return Kind.ZERO_PLAIN
    return Kind.UNALLOCATED


def subcluster_runs(bitmap: int, first: int, end: int) -> Iterator[SubclusterRun]:
    """The subclusters ``[first, end)`` as runs of one kind."""
    while first < end:
        kind = kind_of_subcluster(bitmap, first)
        stop = first + 1
        while stop < end and kind_of_subcluster(bitmap, stop) is kind:
            stop += 1
        yield SubclusterRun(kind, first, stop)
        first = stop


def unpack_subclusters(entries: Entries, bitmaps: Entries, is_compressed: Flags) -> Flags:
    """Turn entries as stored, without ZERO, into entries in memory.

    Returns:
        Whether each entry and its bitmap cannot be meant, as bool of shape (n,).
    """
    allocated = bitmaps & np.uint64(ALL_ALLOCATED)
    zero = bitmaps >> np.uint64(SUBCLUSTERS_PER_CLUSTER)
    has_host = (entries & np.uint64(OFFSET_MASK | COPIED)) != 0
    is_zero = bitmaps == np.uint64(ALL_ALLOCATED << SUBCLUSTERS_PER_CLUSTER)
    is_plain = np.where(has_host, bitmaps == np.uint64(ALL_ALLOCATED), bitmaps == 0)
    entries[~is_compressed & is_zero] |= np.uint64(ZERO)
    entries[~is_compressed & ~is_zero & ~is_plain] |= np.uint64(SUBCLUSTERS)
    invalid: Flags = ((allocated & zero) != 0) | ((allocated != 0) & ~has_host)
    invalid |= is_compressed & (bitmaps != 0)
    return invalid


def pack_bitmaps(entries: Entries, bitmaps: Entries) -> Entries:
    """The bitmaps to store for entries in memory."""
    is_compressed = (entries & np.uint64(COMPRESSED)) != 0
    has_own = ~is_compressed & ((entries & np.uint64(SUBCLUSTERS)) != 0)
    is_zero = ~is_compressed & ((entries & np.uint64(ZERO)) != 0)
    has_host = ~is_compressed & ((entries & np.uint64(OFFSET_MASK | COPIED)) != 0)
    packed = np.where(has_host, np.uint64(ALL_ALLOCATED), np.uint64(0))
    packed[is_zero] = np.uint64(ALL_ALLOCATED << SUBCLUSTERS_PER_CLUSTER)
    packed[has_own] = bitmaps[has_own]
    return packed
