"""Internal snapshots: the table of them, to read their disks and to leave them alone.

Spec: qcow2.txt, "Snapshots".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from ..block.file import FileNode
from ..errors import ImageError, StateError, UsageError
from .header import L1_BYTES_MAX, Header

TABLE_BYTES_MAX: Final = 64 << 20
EXTRA_BYTES_MAX: Final = 1024
"""QEMU's limits (block/qcow2.h, block/qcow2-snapshot.c)."""

_ENTRY: Final = struct.Struct(">QIHHIIQII")
_EXTRA: Final = struct.Struct(">QQ")
_ENTRY_BYTES_USUAL: Final = 512
_ENTRY_BYTES_MAX: Final = _ENTRY.size + EXTRA_BYTES_MAX + 2 * 65535 + 8


@dataclass(slots=True)
class InternalSnapshot:
    """One internal snapshot; offsets and sizes in bytes, ``l1_size`` in entries."""

    snapshot_id: str
    name: str
    l1_table_offset: int
    l1_size: int
    disk_size: int
    date_seconds: int
    date_nanoseconds: int
    vm_clock_nanoseconds: int
    vm_state_size: int
    instruction_count: int | None
    """Of a guest that counts instructions; None where the entry does not say."""
    extra_length: int
    """Bytes of extra data in the entry; version 3 has 16 at least."""


async def read_snapshots(
    file: FileNode, header: Header, *, strict: bool = True
) -> tuple[list[InternalSnapshot], int]:
    """Read the snapshot table.

    Args:
        file: The image file.
        header: Its header.
        strict: Refuse L1 tables that cannot be where the entries say.

    Returns:
        The snapshots in the table's order, and the table's length in bytes.

    Raises:
        ImageError: An entry is damaged or reaches past a limit or the end of the file.
    """
    snapshots: list[InternalSnapshot] = []
    offset = header.snapshots_offset
    for _ in range(header.snapshot_count):
        if offset + _ENTRY.size > file.size or offset - header.snapshots_offset > TABLE_BYTES_MAX:
            raise ImageError(file.path, "the snapshot table has no end", offset=offset)
        raw = await file.read(offset, min(_ENTRY_BYTES_USUAL, file.size - offset))
        *_, id_bytes, name_bytes, _, _, _, _, extra = _ENTRY.unpack_from(raw)
        if _ENTRY.size + extra + id_bytes + name_bytes > len(raw):
            raw = await file.read(offset, min(_ENTRY_BYTES_MAX, file.size - offset))
        snapshot, length = _unpack_snapshot(raw, header, file.path, offset)
        if strict:
            _check_l1_table(snapshot, header, file)
        snapshots.append(snapshot)
        offset += length
    return snapshots, offset - header.snapshots_offset


def _unpack_snapshot(
    raw: bytearray, header: Header, path: str, offset: int
) -> tuple[InternalSnapshot, int]:
    """One entry and its length with padding."""
    fields = _ENTRY.unpack_from(raw)
    l1_offset, l1_size, id_bytes, name_bytes, seconds, nanoseconds, clock, state, extra = fields
    end = _ENTRY.size + extra + id_bytes + name_bytes
    if extra > EXTRA_BYTES_MAX or end > len(raw):
        raise ImageError(path, "damaged snapshot table", offset=offset)
    disk_size = header.size
    if extra >= _EXTRA.size:
        state, disk_size = _EXTRA.unpack_from(raw, _ENTRY.size)
    names = _ENTRY.size + extra
    snapshot = InternalSnapshot(
        snapshot_id=raw[names : names + id_bytes].decode("utf-8", "replace"),
        name=raw[names + id_bytes : end].decode("utf-8", "replace"),
        l1_table_offset=l1_offset,
        l1_size=l1_size,
        disk_size=disk_size,
        date_seconds=seconds,
        date_nanoseconds=nanoseconds,
        vm_clock_nanoseconds=clock,
        vm_state_size=state,
        instruction_count=_instruction_count(raw, extra),
        extra_length=extra,
    )
    return snapshot, -(-end // 8) * 8


def _instruction_count(raw: bytearray, extra: int) -> int | None:
    """The third field of the extra data, all ones where it does not apply."""
    if extra < _EXTRA.size + 8:
        return None
    count = int.from_bytes(raw[_ENTRY.size + 16 : _ENTRY.size + 24], "big")
    return None if count == (1 << 64) - 1 else count


def _check_l1_table(snapshot: InternalSnapshot, header: Header, file: FileNode) -> None:
    """A snapshot's L1 table is aligned, inside the file and large enough for its disk."""
    offset, length = snapshot.l1_table_offset, snapshot.l1_size * 8
    end = -(-file.size // header.cluster_size) * header.cluster_size
    if offset % header.cluster_size or length > L1_BYTES_MAX or offset + length > end:
        raise ImageError(
            file.path, f"snapshot {snapshot.name!r} has a damaged L1 table", offset=offset
        )
    if snapshot.l1_size * header.l2_entries << header.cluster_bits < snapshot.disk_size:
        raise ImageError(
            file.path, f"the L1 table of snapshot {snapshot.name!r} is too small", offset=offset
        )


def find_snapshot(snapshots: list[InternalSnapshot], wanted: str, path: str) -> InternalSnapshot:
    """The snapshot with an id, or else with a name, as qemu-img's ``-l`` finds it.

    Raises:
        StateError: There is none.
    """
    for snapshot in snapshots:
        if snapshot.snapshot_id == wanted:
            return snapshot
    for snapshot in snapshots:
        if snapshot.name == wanted:
            return snapshot
    raise StateError(f"{path}: no internal snapshot {wanted!r}")


class ShownDisk(NamedTuple):
    """The L1 table and size of the disk to show: the image's own or a snapshot's."""

    l1_table_offset: int
    l1_size: int
    size: int


def choose_disk(
    file: FileNode, header: Header, snapshots: list[InternalSnapshot], wanted: str | None
) -> ShownDisk:
    """The disk to show: the image's own, or that of the snapshot that is wanted by id or name.

    Raises:
        StateError: There is no such snapshot.
        UsageError: It is to be written.
    """
    if wanted is None:
        return ShownDisk(header.l1_table_offset, header.l1_size, header.size)
    if not file.read_only:
        raise UsageError(f"{file.path}: an internal snapshot can only be read")
    found = find_snapshot(snapshots, wanted, file.path)
    return ShownDisk(found.l1_table_offset, found.l1_size, found.disk_size)
