"""QEMU's own queries: our disks, snapshots and exports as block nodes.

A disk is the node and the device of its name; a snapshot of a disk is the node
``SNAPSHOT/DISK``; nodes that were added are listed after them. The shapes are QEMU's; of what
is optional there, what we have is given.

Spec: QEMU qapi/block-core.json, qapi/block-export.json.
"""

from __future__ import annotations

import os
from typing import Any, Final

import msgspec

from ...engine.disk import Disk
from ...engine.engine import Engine
from ...engine.graph import GraphNode
from ...engine.info import BitmapInfo, bitmap_infos, disk_info
from ...engine.snapshot import Snapshot
from ..command import Command
from ..controlled import Controlled

_STAT_BLOCK_BYTES: Final = 512

_UNUSED: Final = {
    "backing_file_depth": 0,
    "encrypted": False,
    "detect_zeroes": "off",
    "bps": 0,
    "bps_rd": 0,
    "bps_wr": 0,
    "iops": 0,
    "iops_rd": 0,
    "iops_wr": 0,
    "write_threshold": 0,
    "cache": {"writeback": True, "direct": False, "no-flush": False},
}
"""What QEMU's schema demands and what can be set for its nodes, but not for ours."""


class BlockExportInfo(msgspec.Struct, kw_only=True, rename="kebab"):
    """An export in QEMU's shape; ``id`` of one that was not added is its name."""

    id: str
    type: str = "nbd"
    node_name: str
    shutting_down: bool = False


class QueryBlockExports(Command):
    """List all exports in QEMU's shape."""

    async def run(self, server: Controlled) -> list[BlockExportInfo]:
        """Carry it out."""
        added = {id(each.export): each for each in server.node_exports}
        names = _node_names(server.engine)
        return [
            BlockExportInfo(id=each.id, node_name=each.node.name, shutting_down=each.is_ending)
            for each in added.values()
        ] + [
            BlockExportInfo(id=export.name, node_name=names.get(id(export.node), export.name))
            for export in server.engine.exports
            if id(export) not in added
        ]


class QueryNamedBlockNodes(Command):
    """Describe all disks and snapshots as block nodes, in QEMU's shape.

    ``flat`` leaves backing images out in QEMU; ours are never listed.
    """

    flat: bool = False

    async def run(self, server: Controlled) -> list[dict[str, Any]]:
        """Carry it out."""
        engine = server.engine
        added = {node.name for node in server.graph}
        disks = [disk for disk in engine.disks.values() if disk.name not in added]
        nodes = [await _disk_node(disk) for disk in disks]
        for snapshot in engine.snapshots.values():
            nodes += [_snapshot_node(snapshot, disk) for disk in snapshot.disks]
        return nodes + [await _added_node(node) for node in server.graph]


class QueryBlock(Command):
    """Describe all disks as block devices, in QEMU's shape."""

    async def run(self, server: Controlled) -> list[dict[str, Any]]:
        """Carry it out."""
        return [
            {
                "device": disk.name,
                "type": "unknown",
                "removable": False,
                "locked": False,
                "inserted": await _disk_node(disk),
            }
            for disk in list(server.engine.disks.values())
        ]


def snapshot_node_name(snapshot: str, disk: str) -> str:
    """The name of the node that shows a disk of a snapshot."""
    return f"{snapshot}/{disk}"


def _node_names(engine: Engine) -> dict[int, str]:
    """Names of nodes by the nodes' identity."""
    names = {id(disk.node): disk.name for disk in engine.disks.values()}
    for snapshot in engine.snapshots.values():
        for disk, part in snapshot.disks.items():
            names[id(part.node)] = snapshot_node_name(snapshot.name, disk)
    return names


async def _disk_node(disk: Disk) -> dict[str, Any]:
    """BlockDeviceInfo of a disk."""
    info = await disk_info(disk)
    image = {
        "filename": info.file,
        "format": disk.format,
        "virtual-size": info.size,
        "actual-size": _file_sizes(info.file)[1],
        "cluster-size": info.cluster_size,
        "dirty-flag": False,
    }
    return {
        **_UNUSED,
        "detect_zeroes": disk.policy.detect_zeroes.value,
        "node-name": disk.name,
        "drv": disk.format,
        "ro": False,
        "file": info.file,
        "image": image,
        "dirty-bitmaps": [_dirty_bitmap(bitmap) for bitmap in info.bitmaps],
    }


async def _added_node(node: GraphNode) -> dict[str, Any]:
    """BlockDeviceInfo of a node that was added."""
    if isinstance(node.opened, Disk):
        return await _disk_node(node.opened)
    size = _file_sizes(node.filename)[0] if node.view is None else node.view.size
    found: dict[str, Any] = {
        **_UNUSED,
        "node-name": node.name,
        "drv": node.driver,
        "ro": node.read_only,
        "file": node.filename,
        "image": {"filename": node.filename, "format": node.driver, "virtual-size": size},
    }
    if node.bitmaps and (bitmaps := await bitmap_infos(node.bitmaps[0])):
        found["dirty-bitmaps"] = [_dirty_bitmap(bitmap) for bitmap in bitmaps]
    return found


def _file_sizes(path: str) -> tuple[int, int]:
    """Bytes of a file, and those that it takes; zeroes if nothing has that name any more."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return 0, 0
    return found.st_size, found.st_blocks * _STAT_BLOCK_BYTES


def _dirty_bitmap(bitmap: BitmapInfo) -> dict[str, Any]:
    """BlockDirtyInfo; of an inconsistent bitmap QEMU tells no count either."""
    found = {
        "name": bitmap.name,
        "count": bitmap.count or 0,
        "granularity": bitmap.granularity,
        "recording": bitmap.recording,
        "busy": bitmap.busy,
        "persistent": bitmap.persistent,
    }
    return {**found, "inconsistent": True} if bitmap.inconsistent else found


def _snapshot_node(snapshot: Snapshot, disk: str) -> dict[str, Any]:
    """BlockDeviceInfo of a disk as of a snapshot."""
    part = snapshot.disks[disk]
    file = str(part.disk.image.path)
    return {
        **_UNUSED,
        "node-name": snapshot_node_name(snapshot.name, disk),
        "drv": "snapshot-access",
        "ro": True,
        "file": file,
        "image": {"filename": file, "format": "snapshot-access", "virtual-size": part.node.size},
    }


COMMANDS: Final = (QueryBlockExports, QueryNamedBlockNodes, QueryBlock)
