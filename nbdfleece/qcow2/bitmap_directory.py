"""Packing and unpacking of what qcow2 stores about dirty bitmaps: extension, directory, tables.

Pure: bytes in, values out. Nothing here is believed before it has been checked
against the size of the file, the disk and QEMU's limits, so that a damaged
image costs no more memory than a sound one. QEMU refuses a whole image for one
bad directory entry; :func:`list_directory` therefore lists what is good and says of
each entry that is not what is wrong with it, which is enough to drop it.

Spec: qcow2.txt, "Bitmaps extension" and "Bitmaps".
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import IntFlag
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ImageError
from .header import EXTENSION_BITMAPS, Autoclear, Header

EXTENSION_SIZE: Final = 24
"""Bytes of the bitmaps extension's data."""

BITMAPS_MAX: Final = 65535
DIRECTORY_SIZE_MAX: Final = 1024 * BITMAPS_MAX
NAME_BYTES_MAX: Final = 1023
TABLE_ENTRIES_MAX: Final = 0x8000000
BITMAP_BYTES_MAX: Final = 0x20000000
"""QEMU's limits (block/qcow2-bitmap.c, BME_MAX_*); beyond one of them it refuses the image."""

TABLES_BYTES_MAX: Final = 32 << 20
"""What the tables of all bitmaps may take together, because every cluster they point to is
remembered: two thousand bitmaps of 64 KiB granularity of a 64 TiB disk."""

GRANULARITY_BITS_MIN: Final = 9
GRANULARITY_BITS_MAX: Final = 31

TYPE_DIRTY_TRACKING: Final = 1
ENTRY_FLAGS_POSITION: Final = 12
"""Where in a directory entry its flags lie, in bytes."""

TABLE_ENTRY_ALL_ZEROES: Final = 0
TABLE_ENTRY_ALL_ONES: Final = 1

_EXTENSION: Final = struct.Struct(">IIQQ")
_ENTRY: Final = struct.Struct(">QIIBBHI")
_TABLE_RESERVED: Final = np.uint64(0xFF000000000001FE)

Data = bytes | bytearray | memoryview

Table = npt.NDArray[np.uint64]
"""A bitmap table of shape (table_entries,), in the machine's byte order."""


class BitmapFlags(IntFlag):
    """Flags of a directory entry."""

    NONE = 0
    IN_USE = 1 << 0
    """The bitmap was not stored properly: it may miss changes."""
    AUTO = 1 << 1
    """The bitmap records the disk's changes."""
    EXTRA_DATA_COMPATIBLE = 1 << 2
    """Never valid here: QEMU refuses images with it."""


class BitmapGeometry(NamedTuple):
    """What entries are checked against, all in bytes."""

    disk_size: int
    cluster_size: int
    file_size: int


class BitmapsExtension(NamedTuple):
    """The bitmaps header extension: where the directory is. Sizes and offsets are bytes."""

    bitmap_count: int
    directory_size: int
    directory_offset: int


class BitmapEntry(NamedTuple):
    """One entry of the bitmap directory."""

    name: str
    granularity: int
    """Bytes per bit."""
    flags: BitmapFlags
    table_offset: int
    table_entries: int

    @property
    def in_use(self) -> bool:
        """The stored bits may miss changes."""
        return bool(self.flags & BitmapFlags.IN_USE)

    @property
    def auto(self) -> bool:
        """The bitmap is recording."""
        return bool(self.flags & BitmapFlags.AUTO)


class DamagedEntry(NamedTuple):
    """What cannot be believed in a directory, and why."""

    position: int
    """Where it begins, in bytes from the directory's beginning."""
    name: str | None
    """Its name, if that much can be read."""
    reason: str


class DirectoryListing(NamedTuple):
    """All that could be made out of a directory, in its order."""

    entries: list[BitmapEntry]
    positions: list[int]
    """Where each of ``entries`` begins, in bytes from the directory's beginning."""
    damaged: list[DamagedEntry]


def stored_bitmap_bytes(disk_size: int, granularity: int) -> int:
    """Bytes that the bits of a bitmap take up in the file: a multiple of 8.

    Args:
        disk_size: Bytes of the disk.
        granularity: Bytes per bit.
    """
    bit_count = -(-disk_size // granularity)
    return -(-bit_count // 64) * 8


def size_fault(disk_size: int, granularity: int) -> str | None:
    """Why no bitmap of such a disk can be stored, or None."""
    if not disk_size:
        return "cannot be stored: the disk has no bytes"
    if stored_bitmap_bytes(disk_size, granularity) > BITMAP_BYTES_MAX:
        return f"would take more than {BITMAP_BYTES_MAX} bytes; use a larger granularity"
    return None


def table_entries_needed(disk_size: int, granularity: int, cluster_size: int) -> int:
    """How many entries the table of a bitmap has, no more and no less."""
    return -(-stored_bitmap_bytes(disk_size, granularity) // cluster_size)


def tables_fault(entries: int) -> str | None:
    """Why not all bitmaps can be in one image whose tables have so many entries, or None."""
    if 8 * entries > TABLES_BYTES_MAX:
        return f"the tables of all bitmaps would take more than {TABLES_BYTES_MAX} bytes"
    return None


def pack_extension(extension: BitmapsExtension) -> bytes:
    """Encode the data of the bitmaps extension.

    Wire:
        0 - 3: number of bitmaps
        4 - 7: reserved, zero
        8 - 15: directory size in bytes
        16 - 23: directory offset, cluster-aligned
    """
    count, size, offset = extension
    return _EXTENSION.pack(count, 0, size, offset)


def unpack_extension(
    data: Data, geometry: BitmapGeometry, path: str | os.PathLike[str]
) -> BitmapsExtension:
    """Decode the data of the bitmaps extension and check it against the file.

    Args:
        data: The extension's data, without its type and length.
        geometry: Sizes of the disk, a cluster and the file.
        path: The image's name, for errors.

    Raises:
        ImageError: A field is impossible.
    """
    if len(data) != EXTENSION_SIZE:
        raise ImageError(
            path, "the bitmaps extension has a wrong size", expected=EXTENSION_SIZE, found=len(data)
        )
    count, reserved, size, offset = _EXTENSION.unpack(data)
    if reason := _extension_fault(count, reserved, size, offset, geometry):
        raise ImageError(path, f"the bitmaps extension {reason}")
    return BitmapsExtension(count, size, offset)


def find_directory(
    header: Header, geometry: BitmapGeometry, path: str | os.PathLike[str]
) -> BitmapsExtension | None:
    """What an image's bitmaps extension says; None if it has none, or the header disowns it.

    Raises:
        ImageError: As of :func:`unpack_extension`.
    """
    extension = header.extension(EXTENSION_BITMAPS)
    if extension is None or not header.autoclear_features & Autoclear.BITMAPS:
        return None
    return unpack_extension(extension.data, geometry, path)


def _extension_fault(
    count: int, reserved: int, size: int, offset: int, geometry: BitmapGeometry
) -> str | None:
    """Why the extension cannot be believed, or None."""
    if not 1 <= count <= BITMAPS_MAX:
        return f"counts {count} bitmaps, not 1 to {BITMAPS_MAX}"
    if reserved:
        return "has reserved bits set"
    if not count * (_ENTRY.size + 8) <= size <= min(DIRECTORY_SIZE_MAX, count * 1048):
        return f"gives {count} bitmaps a directory of {size} bytes"
    if not offset or offset % geometry.cluster_size:
        return f"has the directory at {offset:#x}, not at a cluster"
    if offset + size > geometry.file_size:
        return f"has the directory at {offset:#x}, past the end of the file"
    return None


def entry_size(name: str) -> int:
    """Bytes that the entry of a bitmap takes in the directory."""
    return _ENTRY.size + -(-len(name.encode()) // 8) * 8


def directory_size(names: Iterable[str]) -> int:
    """Bytes of a directory of bitmaps of these names."""
    return sum(map(entry_size, names))


def pack_directory(entries: Sequence[BitmapEntry]) -> bytes:
    """Encode a bitmap directory.

    Wire:
        0 - 7: table offset
        8 - 11: table entries
        12 - 15: flags
        16: type, 1
        17: granularity bits
        18 - 19: name length
        20 - 23: extra data length, 0
        then the name, padded with zeroes to a multiple of 8
    """
    return b"".join(map(_pack_entry, entries))


def _pack_entry(entry: BitmapEntry) -> bytes:
    name = entry.name.encode()
    packed = _ENTRY.pack(
        entry.table_offset,
        entry.table_entries,
        int(entry.flags),
        TYPE_DIRTY_TRACKING,
        entry.granularity.bit_length() - 1,
        len(name),
        0,
    )
    return packed + name + bytes(-len(name) % 8)


def list_directory(data: Data, bitmap_count: int, geometry: BitmapGeometry) -> DirectoryListing:
    """Decode a bitmap directory as far as it can be, and say what is wrong with the rest.

    Args:
        data: The whole directory.
        bitmap_count: How many entries the extension promises.
        geometry: Sizes of the disk, a cluster and the file.

    Returns:
        The entries that satisfy every constraint, and each one that does not with the
        first constraint that it breaks. After an entry whose length is impossible the
        rest of the directory cannot be told apart and is one damaged entry.
    """
    listing = DirectoryListing([], [], [])
    names: set[str] = set()
    for position, outcome in _scan_directory(data, bitmap_count, geometry):
        if isinstance(outcome, BitmapEntry) and outcome.name in names:
            outcome = DamagedEntry(position, outcome.name, "is there twice")
        if isinstance(outcome, DamagedEntry):
            listing.damaged.append(outcome)
            continue
        names.add(outcome.name)
        listing.entries.append(outcome)
        listing.positions.append(position)
    return listing


def _scan_directory(
    data: Data, bitmap_count: int, geometry: BitmapGeometry
) -> Iterator[tuple[int, BitmapEntry | DamagedEntry]]:
    """Each entry, or what is wrong with it, with its position."""
    position = 0
    for index in range(bitmap_count):
        end = _entry_end(data, position)
        if end is None:
            missing = bitmap_count - index
            reason = f"and {missing - 1} after it do not fit into the directory"
            yield position, DamagedEntry(position, None, reason)
            return
        yield position, _unpack_entry(data, position, geometry)
        position = end
    if position != len(data):
        reason = f"is not counted: {len(data) - position} bytes follow the last one"
        yield position, DamagedEntry(position, None, reason)


def _entry_end(data: Data, position: int) -> int | None:
    """Where the entry at ``position`` ends, or None if it reaches over the directory's end."""
    if position + _ENTRY.size > len(data):
        return None
    *_, name_size, extra_size = _ENTRY.unpack_from(data, position)
    end = position + -(-(_ENTRY.size + extra_size + name_size) // 8) * 8
    return end if end <= len(data) else None


def _unpack_entry(
    data: Data, position: int, geometry: BitmapGeometry
) -> BitmapEntry | DamagedEntry:
    """Decode the entry at ``position``, of which it is known that it lies within ``data``."""
    fields = _ENTRY.unpack_from(data, position)
    table_offset, table_entries, flags, kind, granularity_bits, name_size, extra_size = fields
    start = position + _ENTRY.size + extra_size
    name = _decode_name(bytes(data[start : start + name_size]))
    reason = (
        _kind_fault(flags, kind, extra_size, granularity_bits)
        or _name_fault(name, name_size)
        or _table_fault(flags, table_offset, table_entries, granularity_bits, geometry)
    )
    if reason is not None or name is None:
        return DamagedEntry(position, name, reason or "has no name")
    return BitmapEntry(name, 1 << granularity_bits, BitmapFlags(flags), table_offset, table_entries)


def _decode_name(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _name_fault(name: str | None, name_size: int) -> str | None:
    if not 1 <= name_size <= NAME_BYTES_MAX:
        return f"has a name of {name_size} bytes, not 1 to {NAME_BYTES_MAX}"
    if name is None:
        return "has a name that is not UTF-8"
    return "has a NUL in its name" if "\0" in name else None


def _kind_fault(flags: int, kind: int, extra_size: int, granularity_bits: int) -> str | None:
    """What is wrong with the fields that stand for themselves."""
    if flags & ~int(BitmapFlags.IN_USE | BitmapFlags.AUTO):
        return f"has unknown flags {flags:#x}"
    if kind != TYPE_DIRTY_TRACKING:
        return f"is of the unknown type {kind}"
    if extra_size:
        return f"has {extra_size} bytes of extra data of an unknown kind"
    if not GRANULARITY_BITS_MIN <= granularity_bits <= GRANULARITY_BITS_MAX:
        return f"has granularity bits {granularity_bits}, not {GRANULARITY_BITS_MIN} to 31"
    return None


def _table_fault(
    flags: int, offset: int, entries: int, granularity_bits: int, geometry: BitmapGeometry
) -> str | None:
    """What is wrong with the place and size of the table.

    A bitmap in use may have the table of a disk of another size, as in QEMU: a
    crash may have followed a resize, and its bits are worth nothing anyway.
    """
    disk_size, cluster_size, file_size = geometry
    if not offset or offset % cluster_size:
        return f"has its table at {offset:#x}, not at a cluster"
    if not 1 <= entries <= TABLE_ENTRIES_MAX or entries * cluster_size > BITMAP_BYTES_MAX:
        return f"has an impossible table of {entries} entries"
    if offset + 8 * entries > file_size:
        return f"has its table at {offset:#x}, past the end of the file"
    needed = table_entries_needed(disk_size, 1 << granularity_bits, cluster_size)
    if entries != needed and not flags & BitmapFlags.IN_USE:
        return f"has a table of {entries} entries where {needed} are needed"
    return None


def pack_table(table: Table) -> bytes:
    """Encode a table: 64 bits per cluster of bits, 0 all zeroes, 1 all ones, or its offset."""
    return table.astype(">u8").tobytes()


def unpack_table(
    data: Data,
    entry: BitmapEntry,
    geometry: BitmapGeometry,
    path: str | os.PathLike[str],
) -> Table:
    """Decode the table of the bitmap ``entry`` and check it against the file.

    Args:
        data: The table, ``8 * entry.table_entries`` bytes.
        entry: The directory entry that it belongs to.
        geometry: Sizes of the disk, a cluster and the file.
        path: The image's name, for errors.

    Raises:
        ImageError: The table does not fit the disk, has reserved bits set, or points to
            something that is no cluster of the file.
    """
    needed_bytes = stored_bitmap_bytes(geometry.disk_size, entry.granularity)
    needed = -(-needed_bytes // geometry.cluster_size)
    if entry.table_entries != needed:
        raise ImageError(
            path,
            f"the table of bitmap {entry.name!r} does not fit the disk",
            offset=entry.table_offset,
            expected=f"{needed} entries",
            found=entry.table_entries,
        )
    table: Table = np.frombuffer(data, dtype=">u8").astype(np.uint64)
    bad = np.flatnonzero(_bad_table_entries(table, needed_bytes, geometry))
    if len(bad):
        index = int(bad[0])
        raise ImageError(
            path,
            f"the table of bitmap {entry.name!r} has the impossible entry {int(table[index]):#x}",
            offset=entry.table_offset + 8 * index,
        )
    return table


def _bad_table_entries(
    table: Table, needed_bytes: int, geometry: BitmapGeometry
) -> npt.NDArray[np.bool_]:
    """Which entries are neither 0 nor 1 nor the offset of a cluster in the file; shape (n,)."""
    cluster_size = np.uint64(geometry.cluster_size)
    part_bytes = np.full(len(table), cluster_size, dtype=np.uint64)
    part_bytes[-1] = needed_bytes - (len(table) - 1) * geometry.cluster_size
    beyond = table > np.uint64(geometry.file_size) - np.minimum(part_bytes, geometry.file_size)
    misplaced = (table > 1) & ((table % cluster_size != 0) | beyond)
    bad: npt.NDArray[np.bool_] = (table & _TABLE_RESERVED != 0) | misplaced
    return bad
