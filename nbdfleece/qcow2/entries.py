"""L2 tables in memory: entries, their kinds, and runs of clusters.

In memory an L2 table is a native-endian array of 64-bit entries. An entry keeps
the on-disk bits (COPIED 63, COMPRESSED 62, ZERO 0, host offset 9 to 55) without the
reserved ones, and has two bits more that exist only here, so that one ``&`` tells the
plain case, a whole cluster of data, from all others:

* SUBCLUSTERS: the subclusters of an extended L2 entry are not all alike, its bitmap tells;
* INVALID: the entry cannot be meant; it is never followed, and its table never written.

Spec: qcow2.txt, "Cluster mapping", "Extended L2 Entries".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ..block.host_file import ELSEWHERE, ZEROES, Places
from .cached_table import CachedTable

Entries = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]

COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62
OFFSET_MASK: Final = 0x00FFFFFFFFFFFE00
ZERO: Final = 1 << 0
SUBCLUSTERS: Final = 1 << 1
INVALID: Final = 1 << 2

SPECIAL: Final = COMPRESSED | ZERO | SUBCLUSTERS | INVALID
"""None of these set: a cluster of data, or unallocated if the offset is 0."""

IN_PLACE: Final = SPECIAL | COPIED
"""``entry & IN_PLACE == COPIED``: may be overwritten where it is."""

SUBCLUSTERS_PER_CLUSTER: Final = 32
ALL_ALLOCATED: Final = 0xFFFFFFFF
"""An extended entry's bitmap with every subcluster allocated and none zero."""

_SCALAR_MAX: Final = 64
"""Entries up to which a loop finds runs faster than numpy does."""


class Kind(IntEnum):
    """What an L2 entry says of its guest cluster."""

    UNALLOCATED = 0
    """Reads as the backing file, or as zeroes."""
    NORMAL = 1
    ZERO_PLAIN = 2
    """Reads as zeroes, no host cluster."""
    ZERO_ALLOC = 3
    """Reads as zeroes, the host cluster is kept."""
    COMPRESSED = 4
    SUBCLUSTERS = 5
    INVALID = 6


class Layout(NamedTuple):
    """What of an image's format the tables depend on."""

    cluster_bits: int
    version: int
    has_extended_l2: bool
    has_data_file: bool

    @property
    def cluster_size(self) -> int:
        """Bytes per cluster."""
        return 1 << self.cluster_bits

    @property
    def l2_entries(self) -> int:
        """Entries per L2 table."""
        return self.cluster_size >> (4 if self.has_extended_l2 else 3)


class Run(NamedTuple):
    """Consecutive guest clusters of one kind, their host clusters consecutive as well."""

    kind: Kind
    clusters: int
    """Always 1 for COMPRESSED, SUBCLUSTERS and INVALID."""
    entry: int
    """The first cluster's entry."""


class L2Table(CachedTable):
    """One L2 table of the guest's mapping.

    Invariants: ``entries`` is ``array`` and ``bitmaps`` ``bitmap_array`` (None without
    extended L2), as memoryviews for access to single entries. Only the methods here change them.
    """

    __slots__ = (
        "array",
        "before_change",
        "bitmap_array",
        "bitmaps",
        "entries",
        "is_invalid",
        "is_new",
    )

    def __init__(self, host_offset: int, array: Entries, bitmap_array: Entries | None) -> None:
        super().__init__(host_offset)
        self.array = array
        self.entries = array.data
        self.bitmap_array = bitmap_array
        self.bitmaps = None if bitmap_array is None else bitmap_array.data
        self.is_invalid = False
        self.is_new = False
        """No L1 entry in the file leads here yet."""
        self.before_change: Callable[[], None] | None = None
        """Called before the next change, once: a flush has yet to write the table as it is."""

    def bitmap(self, index: int) -> int:
        """The subcluster bitmap stored for an entry with SUBCLUSTERS."""
        assert self.bitmaps is not None
        return int(self.bitmaps[index])

    def set_bitmap(self, index: int, bitmap: int) -> None:
        """Store the subcluster bitmap of an entry."""
        assert self.bitmaps is not None
        if self.before_change is not None:
            self.before_change()
        self.bitmaps[index] = bitmap

    def set_run(self, first: int, count: int, entry: int, step: int) -> None:
        """Set ``count`` entries to ``entry``, ``entry + step``, ``entry + 2 * step`` and so on."""
        if self.before_change is not None:
            self.before_change()
        if count <= _SCALAR_MAX:
            for index in range(first, first + count):
                self.entries[index] = entry
                entry += step
        else:
            steps = np.arange(count, dtype=np.uint64) * np.uint64(step)
            self.array[first : first + count] = np.uint64(entry) + steps


def kind_of(entry: int) -> Kind:
    """The kind of one entry in memory."""
    if not entry & SPECIAL:
        return Kind.NORMAL if entry & (OFFSET_MASK | COPIED) else Kind.UNALLOCATED
    if entry & COMPRESSED:  # first: its offset may use the other bits
        return Kind.COMPRESSED
    if entry & INVALID:
        return Kind.INVALID
    if entry & SUBCLUSTERS:
        return Kind.SUBCLUSTERS
    return Kind.ZERO_ALLOC if entry & (OFFSET_MASK | COPIED) else Kind.ZERO_PLAIN


def find_runs(table: L2Table, first: int, end: int, cluster_size: int) -> list[Run]:
    """The entries ``[first, end)`` as runs.

    NORMAL and ZERO_ALLOC runs have consecutive host clusters and one state of COPIED.
    """
    if end - first <= _SCALAR_MAX:
        return list(_find_runs_one_by_one(table.entries[first:end], cluster_size))
    return _find_runs_at_once(table.array[first:end], cluster_size)


def _step_of(entry: int, cluster_size: int) -> int | None:
    """How the next entry differs in a run with this one; None if runs have one cluster only."""
    if not entry & (SPECIAL ^ ZERO):
        return cluster_size if entry & (OFFSET_MASK | COPIED) else 0
    return None


def _find_runs_one_by_one(entries: memoryview, cluster_size: int) -> Iterator[Run]:
    count = 0
    start = expected = 0
    step: int | None = None
    for entry in entries:
        if count and entry == expected and step is not None:
            count += 1
            expected += step
            continue
        if count:
            yield Run(kind_of(start), count, start)
        start, count = entry, 1
        step = _step_of(entry, cluster_size)
        expected = entry + (step or 0)
    if count:
        yield Run(kind_of(start), count, start)


def _find_runs_at_once(entries: Entries, cluster_size: int) -> list[Run]:
    has_host = (entries & np.uint64(OFFSET_MASK | COPIED)) != 0
    steps = np.where(has_host, np.uint64(cluster_size), np.uint64(0))
    is_single = (entries & np.uint64(SPECIAL ^ ZERO)) != 0
    is_start = (entries[1:] != entries[:-1] + steps[:-1]) | is_single[1:] | is_single[:-1]
    starts = np.concatenate([[0], np.flatnonzero(is_start) + 1])
    counts = np.diff(np.append(starts, len(entries)))
    firsts = entries[starts].tolist()
    return [
        Run(kind_of(entry), count, entry)
        for entry, count in zip(firsts, counts.tolist(), strict=True)
    ]


def host_places(entries: Entries, unallocated: int) -> Places:
    """Where clusters lie that nothing but the disk refers to; shape (n,).

    Args:
        entries: Shape (n,).
        unallocated: What is told of a cluster that has no place.
    """
    kinds = entries & np.uint64(SPECIAL)
    places = np.full(len(entries), ELSEWHERE, dtype=np.uint64)
    places[kinds == ZERO] = ZEROES
    places[entries & np.uint64(SPECIAL | COPIED | OFFSET_MASK) == 0] = unallocated
    is_own = entries & np.uint64(IN_PLACE) == COPIED
    places[is_own] = entries[is_own] & np.uint64(OFFSET_MASK)
    return places
