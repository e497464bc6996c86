"""Bits of a bitmap as clusters of a file: which are stored, which a table entry stands for.

Pure. A part of the bits that fills one cluster and is all zeroes or all ones takes
no space: its table entry says so.

Spec: qcow2.txt, "Bitmap table", "Bitmap data".
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..bitmaps.bitmap import Bitmap
from .bitmap_directory import (
    TABLE_ENTRY_ALL_ONES,
    TABLE_ENTRY_ALL_ZEROES,
    Table,
    table_entries_needed,
)

_ALL_ONES = (1 << 64) - 1

Bytes = npt.NDArray[np.uint8]


class PackedBits(NamedTuple):
    """Bits ready to be stored."""

    uniform: Table
    """Shape (table_entries,): the entry of a part that is all zeroes or all ones."""
    stored: npt.NDArray[np.bool_]
    """Shape (table_entries,): which parts are neither."""
    data: Bytes
    """Shape (parts stored, cluster_size): their bits."""

    def table(self, data_offset: int) -> Table:
        """The bitmap table if ``data`` is stored in the clusters from ``data_offset`` on."""
        count, cluster_size = self.data.shape
        table = self.uniform.copy()
        table[self.stored] = data_offset + np.arange(count, dtype=np.uint64) * cluster_size
        return table


def pack_bits(bits: bytes | memoryview, bit_count: int, cluster_size: int) -> PackedBits:
    """Cut packed bits into clusters, and copy those that must be stored.

    Args:
        bits: Least significant first, ``ceil(bit_count / 8)`` bytes, those past the end zero.
        bit_count: How many bits there are, more than none.
        cluster_size: Bytes of a cluster.
    """
    entries = table_entries_needed(bit_count, 1, cluster_size)
    array = np.frombuffer(bits, dtype=np.uint8)
    if len(array) < entries * cluster_size:
        array = np.pad(array, (0, entries * cluster_size - len(array)))
    parts = array.reshape(entries, cluster_size)
    words = array.view(np.uint64).reshape(entries, cluster_size // 8)
    is_zeroes = words.max(axis=1) == 0
    is_ones = words.min(axis=1) == np.uint64(_ALL_ONES)
    last_bits = bit_count - (entries - 1) * cluster_size * 8
    # For "all ones" QEMU sets whole 64-bit words, so none may reach past the end of the disk.
    ones = int.from_bytes(parts[-1].tobytes(), "little").bit_count()
    is_ones[-1] = last_bits % 64 == 0 and ones == last_bits
    uniform = np.where(is_ones, TABLE_ENTRY_ALL_ONES, TABLE_ENTRY_ALL_ZEROES).astype(np.uint64)
    stored = ~(is_zeroes | is_ones)
    return PackedBits(uniform, stored, parts[stored])


def pack_content(content: Bitmap | None, cluster_size: int) -> PackedBits | None:
    """The bits of a bitmap, if there are any, as :func:`pack_bits` cuts them."""
    if content is None or not content.bit_count:
        return None
    return pack_bits(content.data, content.bit_count, cluster_size)


def packed_elsewhere(table: Table, cluster_size: int) -> PackedBits:
    """Bits that are in the clusters of ``table`` already: only the table is to be stored."""
    nothing = np.zeros((0, cluster_size), dtype=np.uint8)
    return PackedBits(table, np.zeros(len(table), dtype=np.bool_), nothing)


def data_clusters(table: Table) -> Table:
    """The offsets of the clusters that a table points to, in its order."""
    return table[table > TABLE_ENTRY_ALL_ONES]


def cluster_runs(offsets: Table, cluster_size: int) -> Iterator[tuple[int, int]]:
    """Cluster offsets, in any order and each once, as ascending runs ``(offset, count)``."""
    ordered = np.sort(offsets)
    breaks = np.flatnonzero(np.diff(ordered) != cluster_size) + 1
    for run in np.split(ordered, breaks):
        if len(run):
            yield int(run[0]), len(run)


def span_clusters(offset: int, length: int, cluster_size: int) -> Table:
    """The offsets of the clusters that ``length`` bytes from the cluster at ``offset`` take."""
    count = -(-length // cluster_size)
    return np.uint64(offset) + np.arange(count, dtype=np.uint64) * np.uint64(cluster_size)


def contains_any(ordered: Table, values: Table) -> bool:
    """Whether any of ``values`` is in ``ordered``, which is ascending."""
    if not len(ordered):
        return False
    nearest = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return bool((ordered[nearest] == values).any())


def stored_runs(table: Table, cluster_size: int, needed: int) -> Iterator[tuple[int, int, int]]:
    """What of a bitmap is not all zeroes, as few runs as possible.

    Args:
        table: Shape (n,).
        cluster_size: Bytes of a cluster.
        needed: Bytes of bits that there are.

    Yields:
        ``(offset, start, end)``: where in the file the bytes ``[start, end)`` of the bits
        begin, or 1 if they are all ones.
    """
    goes_on = np.where(table > TABLE_ENTRY_ALL_ONES, table + np.uint64(cluster_size), table)
    starts = np.flatnonzero(table[1:] != goes_on[:-1]) + 1
    bounds = [0, *starts.tolist(), len(table)]
    for first, end in pairwise(bounds):
        if table[first]:
            yield int(table[first]), first * cluster_size, min(end * cluster_size, needed)
