"""What the engine tells about itself: plain records that become JSON as they are."""

from __future__ import annotations

import asyncio

import msgspec

from ..errors import StateError
from .chain import Checkpoint, CheckpointState
from .disk import Disk
from .engine import Engine
from .transaction import BitmapNode


class BitmapInfo(msgspec.Struct, kw_only=True, rename="kebab"):
    """A dirty bitmap, in QEMU's terms; ``count`` is dirty bytes, None where it is not known."""

    name: str
    granularity: int
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool
    count: int | None


class LinkInfo(msgspec.Struct, kw_only=True, rename="kebab"):
    """A checkpoint on one disk.

    Attributes:
        size: Bytes of the disk when it was made.
        changed: Bytes changed from it to the next checkpoint, or to now; None if not known.
        problem: Why the changes are not known; None if they are.
    """

    size: int
    changed: int | None
    problem: str | None


class CheckpointInfo(msgspec.Struct, kw_only=True, rename="kebab"):
    """A checkpoint; ``created`` is seconds since the epoch, ``parent`` the one before it."""

    name: str
    parent: str | None
    created: float
    owner: str
    state: str
    disks: dict[str, LinkInfo]

    @classmethod
    def of(cls, record: Checkpoint, parent: str | None) -> CheckpointInfo:
        """Describe a checkpoint, on no disk yet."""
        return cls(
            name=record.name,
            parent=parent,
            created=record.created_ns / 1e9,
            owner=record.owner,
            state=CheckpointState(record.state).name.lower(),
            disks={},
        )


class DiskInfo(msgspec.Struct, kw_only=True, rename="kebab"):
    """A disk; sizes are bytes, ``chain_problem`` says why its chain record is not usable."""

    name: str
    file: str
    size: int
    cluster_size: int
    bitmaps: list[BitmapInfo]
    checkpoints: list[str]
    chain_problem: str | None
    scratch_bytes: int


class SnapshotInfo(msgspec.Struct, kw_only=True, rename="kebab"):
    """A snapshot; ``error`` says why it is broken."""

    name: str
    created: float
    disks: list[str]
    checkpoint: str | None
    pending: bool
    exports: list[str]
    error: str | None


class ExportInfo(msgspec.Struct, kw_only=True, rename="kebab"):
    """An export and how many clients have it open."""

    name: str
    description: str
    size: int
    read_only: bool
    contexts: list[str]
    connections: int


async def bitmap_infos(node: BitmapNode) -> list[BitmapInfo]:
    """Describe the bitmaps of a disk or of another node that has some."""
    found = []
    for each in node.state.bitmaps.values():
        await asyncio.sleep(0)  # to count takes a millisecond: a guest's write comes between
        count = await _dirty_bytes(node, each.name)
        if each.name not in node.state.bitmaps:
            continue
        info = BitmapInfo(
            name=each.name,
            granularity=each.granularity,
            recording=each.recording,
            busy=bool(node.busy[each.name]),
            persistent=each.persistent,
            inconsistent=each.inconsistent,
            count=count,
        )
        found.append(info)
    return found


async def _dirty_bytes(node: BitmapNode, name: str) -> int | None:
    """Bytes that a bitmap marks; None if it is inconsistent, or gone by now."""
    try:
        return (await node.bits(name)).dirty_bytes()
    except StateError:
        return None


async def disk_info(disk: Disk) -> DiskInfo:
    """Describe a disk."""
    return DiskInfo(
        name=disk.name,
        file=str(disk.image.path),
        size=disk.size,
        cluster_size=disk.cluster_size,
        bitmaps=await bitmap_infos(disk),
        checkpoints=[each.name for each in disk.state.chain.checkpoints],
        chain_problem=disk.chain_problem,
        scratch_bytes=disk.copies.scratch_bytes,
    )


async def checkpoint_infos(engine: Engine) -> list[CheckpointInfo]:
    """Describe all checkpoints, oldest first, while none is made or deleted."""
    found: dict[str, CheckpointInfo] = {}
    async with engine.changing:
        for disk in engine.disks.values():
            parent = None
            for each in disk.state.chain.checkpoints:
                await asyncio.sleep(0)  # as for bitmaps
                info = found.setdefault(each.name, CheckpointInfo.of(each, parent))
                problem = disk.state.problem(each)
                changed = None if problem else await _dirty_bytes(disk, each.bitmap_name)
                info.disks[disk.name] = LinkInfo(size=each.size, changed=changed, problem=problem)
                parent = each.name
    return sorted(found.values(), key=lambda info: info.created)


def snapshot_infos(engine: Engine) -> list[SnapshotInfo]:
    """Describe all snapshots, oldest first."""
    return [
        SnapshotInfo(
            name=each.name,
            created=each.created_ns / 1e9,
            disks=list(each.disks),
            checkpoint=each.checkpoint,
            pending=each.is_pending,
            exports=list(each.exports),
            error=each.error,
        )
        for each in engine.snapshots.values()
    ]


def export_infos(engine: Engine) -> list[ExportInfo]:
    """Describe all exports."""
    return [
        ExportInfo(
            name=each.name,
            description=each.description,
            size=each.size,
            read_only=each.read_only,
            contexts=[context.name for context in each.contexts],
            connections=each.connections,
        )
        for each in engine.exports
    ]
