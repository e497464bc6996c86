"""New images whose guest clusters all have their place already: their L1 and L2 tables.

Behind the L1 table lie all L2 tables, and behind them the guest clusters in their order, or
these lie in the external data file. What they contain is left to holes (``metadata``), to
reserved space (``falloc``) or to zeroes that are written (``full``).

With extended L2 no subcluster is marked allocated, so that a backing file shines through.
"""

from __future__ import annotations

import errno
import os
from enum import StrEnum
from typing import Final, NamedTuple

import numpy as np

from ..block.file import FileNode
from ..block.linux import fallocate
from ..block.threads import in_thread
from ..errors import UsageError
from .entries import COPIED
from .header import Header

CLUSTERS_MAX: Final = 1 << 28
"""Clusters that are given a place: their refcounts are packed in memory (16 TiB of 64 KiB)."""

_BATCH_TABLES_BYTES: Final = 1 << 20
_ZEROES: Final = bytes(1 << 20)


class Preallocation(StrEnum):
    """qemu-img's modes of preallocation."""

    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


class Places(NamedTuple):
    """How much a preallocated image has behind its L1 table, in clusters."""

    l2_tables: int
    guest_clusters: int
    """Of the image file: 0 with an external data file."""


NO_PLACES: Final = Places(0, 0)


def plan(header: Header, mode: Preallocation) -> Places:
    """What a new image needs.

    Raises:
        UsageError: The disk is too large, or the mode does not go with a backing file.
    """
    if mode is Preallocation.OFF:
        return NO_PLACES
    if header.backing_file is not None and not header.has_extended_l2:
        raise UsageError("preallocation hides the backing file unless extended_l2 is on")
    clusters = -(-header.size // header.cluster_size)
    if clusters > CLUSTERS_MAX:
        raise UsageError(
            f"preallocation of {clusters} clusters: {CLUSTERS_MAX} at most, use larger clusters"
        )
    return Places(-(-clusters // header.l2_entries), 0 if header.has_data_file else clusters)


async def write_tables(file: FileNode, header: Header, places: Places) -> None:
    """Write the L1 table and the L2 tables behind it."""
    size = header.cluster_size
    l1_clusters = max(1, -(-header.l1_size * 8 // size))
    l2_offset = header.l1_table_offset + l1_clusters * size
    count = places.l2_tables
    l1 = (l2_offset + size * np.arange(count, dtype=np.uint64)) | np.uint64(COPIED)
    await file.write(header.l1_table_offset, memoryview(l1.astype(">u8").tobytes()))
    clusters = -(-header.size // size)
    base = 0 if header.has_data_file else l2_offset + count * size
    step = max(1, _BATCH_TABLES_BYTES // size)
    for table in range(0, count, step):
        tables = min(step, count - table)
        first = table * header.l2_entries
        index = np.arange(first, first + tables * header.l2_entries, dtype=np.uint64)
        entries = (np.uint64(base) + index * np.uint64(size)) | np.uint64(COPIED)
        entries[index >= np.uint64(clusters)] = 0
        if header.has_extended_l2:
            entries = np.column_stack([entries, np.zeros_like(entries)]).reshape(-1)
        await file.write(l2_offset + table * size, memoryview(entries.astype(">u8").tobytes()))


async def reserve(file: FileNode, offset: int, length: int, mode: Preallocation) -> None:
    """Make the file long enough for guest clusters, with space behind them if asked.

    Raises:
        OSError: There is no space, or the file system cannot reserve it (EOPNOTSUPP).
    """
    await file.grow(offset + length)
    if mode is Preallocation.FALLOC and length:
        await in_thread(fallocate, file.fileno(), 0, offset, length)
    elif mode is Preallocation.FULL:
        for start in range(offset, offset + length, len(_ZEROES)):
            part = memoryview(_ZEROES)[: offset + length - start]
            await file.write(start, part)


def check_data_file(name: str | None, raw: bool, version: int, backing_file: str | None) -> None:
    """Refuse options of external data files that do not go together.

    Raises:
        UsageError: They do not.
    """
    if raw and name is None:
        raise UsageError("data_file_raw needs data_file")
    if name is not None and version < 3:
        raise UsageError("an external data file needs version 3")
    if raw and backing_file is not None:
        raise UsageError("a raw external data file cannot have a backing file")


def has_data_file(path: str, size: int) -> bool:
    """Whether there is a raw file already that can become the data file.

    Raises:
        OSError: EEXIST: there is one of another size than the disk's.
    """
    try:
        existing = os.stat(path).st_size
    except FileNotFoundError:
        return False
    if existing != size:
        reason = f"exists with {existing} bytes, not the disk's {size}"
        raise OSError(errno.EEXIST, reason, path)
    return True
