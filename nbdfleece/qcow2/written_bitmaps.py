"""Bitmaps and their directory in clusters of their own, to which nothing need lead yet.

Spec: qcow2.txt, "Bitmap directory", "Bitmap table", "Bitmap data".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .bitmap_bits import PackedBits, data_clusters, span_clusters
from .bitmap_directory import (
    BitmapEntry,
    BitmapFlags,
    BitmapsExtension,
    Table,
    directory_size,
    entry_size,
    pack_directory,
    pack_table,
)
from .directory_switch import NO_DIRECTORY, BitmapImage


class HeldBitmap(NamedTuple):
    """A bitmap as it is on disk."""

    entry: BitmapEntry
    position: int
    """Of its entry, in bytes from the directory's beginning."""
    table: Table | None
    """None if it is in use and its table does not fit the disk."""
    inconsistent: bool


class PlannedBitmap(NamedTuple):
    """A bitmap that is to be in a directory."""

    name: str
    granularity: int
    """Bytes per bit."""
    flags: BitmapFlags
    bits: PackedBits | None
    """To be written anew; None keeps what is ``held``."""
    held: HeldBitmap | None


class WrittenBitmaps(NamedTuple):
    """A directory and what it holds, complete; whether in force or not is the header's to say."""

    directory: BitmapsExtension
    held: list[HeldBitmap]
    new_offset: int
    """Of the clusters that were allocated for it, in one piece."""
    new_clusters: int

    def clusters(self, cluster_size: int) -> Table:
        """The offsets of all its clusters."""
        return all_clusters(self.directory, self.held, cluster_size)


NOTHING_WRITTEN = WrittenBitmaps(NO_DIRECTORY, [], 0, 0)
"""No directory."""


async def write_bitmaps(image: BitmapImage, planned: Sequence[PlannedBitmap]) -> WrittenBitmaps:
    """Write a directory, and the tables and bits that are not kept, to new clusters.

    Raises:
        OSError: They could not be written, and are given up.
    """
    size = image.cluster_size
    directory_clusters = _clusters(directory_size(item.name for item in planned), size)
    count = directory_clusters + sum(
        _clusters(8 * len(item.bits.uniform), size) + len(item.bits.data)
        for item in planned
        if item.bits is not None
    )
    offset = await image.allocate_clusters(count) if count else 0
    try:
        held = await _write_tables(image, planned, offset + directory_clusters * size)
        directory = NO_DIRECTORY
        if held:
            data = pack_directory([item.entry for item in held])
            await image.file.write(offset, memoryview(data))
            directory = BitmapsExtension(len(held), len(data), offset)
    except BaseException:
        if count:
            image.free_clusters(offset, count)
        raise
    return WrittenBitmaps(directory, held, offset, count)


async def _write_tables(
    image: BitmapImage, planned: Sequence[PlannedBitmap], table_offset: int
) -> list[HeldBitmap]:
    """Write new tables and bits from an offset on.

    Returns:
        What the directory shall hold; the entries' positions are in it.
    """
    size = image.cluster_size
    position = 0
    result = []
    for name, granularity, flags, bits, held in planned:
        if bits is not None:
            entries = len(bits.uniform)
            data_offset = table_offset + _clusters(8 * entries, size) * size
            table = bits.table(data_offset)
            await image.file.write(table_offset, memoryview(pack_table(table)))
            if bits.data.size:
                await image.file.write(data_offset, memoryview(bits.data.tobytes()))
            entry = BitmapEntry(name, granularity, BitmapFlags.NONE, table_offset, entries)
            held = HeldBitmap(entry, 0, table, inconsistent=False)
            table_offset = data_offset + bits.data.size
        assert held is not None, "it is kept, so it is there"
        entry = held.entry._replace(flags=flags)
        result.append(held._replace(entry=entry, position=position))
        position += entry_size(name)
    return result


def all_clusters(
    directory: BitmapsExtension, held: Iterable[HeldBitmap], cluster_size: int
) -> Table:
    """The offsets of all clusters of a directory and of what it holds."""
    _, size, offset = directory
    own = span_clusters(offset, size, cluster_size)
    return np.concatenate([own, *(clusters_of(item, cluster_size) for item in held)])


def clusters_of(held: HeldBitmap, cluster_size: int) -> Table:
    """The offsets of all clusters of a bitmap."""
    entry = held.entry
    own = span_clusters(entry.table_offset, 8 * entry.table_entries, cluster_size)
    return own if held.table is None else np.concatenate([own, data_clusters(held.table)])


def _clusters(size: int, cluster_size: int) -> int:
    return -(-size // cluster_size)
