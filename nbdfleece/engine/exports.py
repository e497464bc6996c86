"""What of disks and snapshots is exported, and with which metadata contexts."""

from __future__ import annotations

from collections.abc import Mapping

from ..bitmaps.bitmap import Bitmap
from ..block.node import BlockNode
from ..export.contexts import AllocationDepth, BaseAllocation, DirtyBitmap, MetadataContext
from ..export.export import Export
from .disk import Disk
from .snapshot import Release, Snapshot


def live_export(disk: Disk) -> Export:
    """The disk itself, for the guest."""
    return writable_export(disk.name, disk.node, f"disk {disk.name}")


def writable_export(name: str, node: BlockNode, description: str) -> Export:
    """A node for reading and writing."""
    return Export(
        name=name,
        node=node,
        description=description,
        read_only=False,
        can_trim=True,
        contexts=(BaseAllocation(node), AllocationDepth(node)),
    )


def snapshot_export(
    snapshot: Snapshot,
    disk: str,
    name: str | None,
    bitmaps: Mapping[str, Bitmap],
    *,
    allocation_depth: bool,
) -> Export:
    """One disk of a snapshot, read-only; called ``SNAPSHOT/DISK`` unless named."""
    node = snapshot.disks[disk].node
    contexts: list[MetadataContext] = [BaseAllocation(node)]
    if allocation_depth:
        contexts.append(AllocationDepth(node))
    contexts += [DirtyBitmap(leaf, bitmap) for leaf, bitmap in bitmaps.items()]
    return Export(
        name=f"{snapshot.name}/{disk}" if name is None else name,
        node=node,
        description=f"disk {disk} as of snapshot {snapshot.name}",
        can_trim=snapshot.release is Release.ON_TRIM,
        contexts=tuple(contexts),
    )
