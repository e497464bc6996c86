"""Block nodes as QEMU's commands name them, over disks and snapshots.

A disk is a node of its name, and so is a disk of a snapshot (``SNAPSHOT/DISK``). Clients of
QEMU's commands add nodes of their own:

=====================  ====================================================================
driver                 what it is here
=====================  ====================================================================
``file``               a file, for a scratch image; it is not written
``raw``                another name for what is under it: a disk or a file
``qcow2``              a scratch image, the target of a backup job or of copy-before-write;
                       with a disk as its backing node it shows the disk, and from the
                       instant of a backup job on the disk as it was then
``copy-before-write``  a snapshot of the node's name, from the moment at which it is added:
                       the guest's node is above it already, so nothing has to be reopened
``snapshot-access``    what that snapshot shows
=====================  ====================================================================

Old data goes to the scratch of the disk, which all its snapshots share, and never to the
scratch images: these are only names.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ..bitmaps.bitmap import Bitmap
from ..block.node import BlockNode
from ..block.switchable import SwitchableView
from ..errors import StateError
from .chain import Chain, check_name
from .disk import Disk
from .disk_state import DiskState
from .engine import Engine
from .snapshot import Snapshot
from .transaction import BitmapNode, Freeze

SCRATCH_GRANULARITY = 65536
"""Bytes per bit of a bitmap of a scratch image: what QEMU takes for clusters of the usual size."""


class ScratchImage:
    """The bitmaps of a scratch image over a disk: transient, and marked by nobody.

    What the image shows changes only when its guest's does, and from a backup's instant on
    not at all.
    """

    can_persist = False
    default_granularity = SCRATCH_GRANULARITY

    def __init__(self, name: str, disk: Disk) -> None:
        self.name = name
        self.size = disk.size
        self.state = DiskState({}, Chain())
        self.busy: Counter[str] = Counter()

    async def bits(self, name: str) -> Bitmap:
        """The bits of a bitmap."""
        bits = self.state.bitmaps[name].bits
        assert bits is not None, "transient bitmaps are in memory"
        return bits

    async def drain(self) -> None:
        """Nobody writes to it."""

    def resume(self) -> None:
        """Likewise."""

    def stage(self, state: DiskState) -> None:
        """Nothing records."""

    def unstage(self) -> None:
        """Likewise."""

    async def store(self, state: DiskState) -> None:
        """There is no image; never asked for, because no bitmap is persistent."""
        raise AssertionError("a scratch image stores nothing")

    def install(self, state: DiskState) -> None:
        """Put a state in its place."""
        self.state = state


@dataclass(eq=False, slots=True, kw_only=True)
class GraphNode:
    """A node.

    Attributes:
        name: Unique in the graph.
        driver: QEMU's name for its kind.
        filename: The file that is under it.
        view: Its bytes; None for what cannot be read here.
        bitmaps: What has the bitmaps that are found by their names only, in this order.
        disk: The disk that it is, filters or shows.
        snapshot: The snapshot that it shows or keeps.
        children: Names of the nodes under it.
        read_only: It cannot be exported for writing.
        can_trim: A client may say by TRIM what it is done with.
    """

    name: str
    driver: str
    filename: str
    view: BlockNode | None = None
    bitmaps: tuple[BitmapNode, ...] = ()
    disk: Disk | None = None
    snapshot: Snapshot | None = None
    children: tuple[str, ...] = ()
    read_only: bool = True
    can_trim: bool = False


class Graph:
    """All nodes.

    Args:
        engine: Has the disks and the snapshots.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._nodes: dict[str, GraphNode] = {}

    def __iter__(self) -> Iterator[GraphNode]:
        """The nodes that were added."""
        return iter(list(self._nodes.values()))

    def find(self, name: str, device: str = "") -> GraphNode:
        """The node of that name.

        Args:
            name: Its name.
            device: What QEMU's message is to call it as a device.

        Raises:
            StateError: There is none.
        """
        node = self._nodes.get(name) or self._engines_node(name)
        if node is None:
            raise StateError(f"Cannot find device='{device}' nor node-name='{name}'")
        return node

    def _engines_node(self, name: str) -> GraphNode | None:
        """A disk, or a disk of a snapshot."""
        disk = self._engine.disks.get(name)
        if disk is not None:
            return GraphNode(
                name=name,
                driver="qcow2",
                filename=str(disk.image.path),
                view=disk.node,
                bitmaps=(disk,),
                disk=disk,
                read_only=False,
            )
        snapshot = self._engine.snapshots.get(name.rpartition("/")[0])
        part = None if snapshot is None else snapshot.disks.get(name.rpartition("/")[2])
        if snapshot is None or part is None:
            return None
        return GraphNode(
            name=name,
            driver="snapshot-access",
            filename=str(part.disk.image.path),
            view=part.node,
            disk=part.disk,
            snapshot=snapshot,
        )

    def find_bitmaps(self, name: str) -> BitmapNode:
        """The node of that name, which must be one that has bitmaps.

        Raises:
            StateError: There is none, or it has none.
        """
        node = self._nodes.get(name) or self._engines_node(name)
        if node is None:
            raise StateError(f"Node '{name}' not found")
        if not node.bitmaps:
            raise StateError(f"node '{name}' ({node.driver}) has no bitmaps: name the disk")
        return node.bitmaps[0]

    # -- adding and removing ------------------------------------------------------

    def _add(self, node: GraphNode) -> None:
        self._check_new(node.name)
        self._nodes[node.name] = node

    def _check_new(self, name: str) -> None:
        check_name(name, "node")
        if name in self._nodes or self._engines_node(name) is not None:
            raise StateError(f"Duplicate nodes with node-name='{name}'")

    def add_file(self, name: str, filename: str) -> None:
        """Add a file that is to be a scratch image.

        Raises:
            StateError: The name is taken, or there is no such file.
        """
        if not os.path.exists(filename):
            raise StateError(f"Could not open '{filename}': No such file or directory")
        self._add(GraphNode(name=name, driver="file", filename=filename))

    def add_raw(self, name: str, file: str) -> None:
        """Add another name for a node.

        Raises:
            StateError: The name is taken, or there is no such node.
        """
        under = self.find(file, file)
        self._add(
            GraphNode(
                name=name,
                driver="raw",
                filename=under.filename,
                view=under.view,
                bitmaps=under.bitmaps,
                disk=under.disk,
                snapshot=under.snapshot,
                children=(file,),
                read_only=under.read_only,
                can_trim=under.can_trim,
            )
        )

    def add_qcow2(self, name: str, file: str, backing: str | None) -> None:
        """Add a scratch image.

        Raises:
            StateError: The name is taken, there is no such file, or the backing node is no disk.
        """
        under = self.find(file, file)
        if under.driver != "file":
            raise StateError(f"node '{file}' is no file for an image")
        node = GraphNode(name=name, driver="qcow2", filename=under.filename, children=(file,))
        if backing is not None:
            behind = self._find_backing(backing)
            if behind.disk is None or behind.view is not behind.disk.node:
                raise StateError(f"backing node '{backing}' is no disk")
            node.disk = behind.disk
            node.view = SwitchableView(behind.disk.node)
            node.bitmaps = (ScratchImage(name, behind.disk), behind.disk)
            node.children = (file, backing)
        self._add(node)

    def _find_backing(self, name: str) -> GraphNode:
        try:
            return self.find(name, name)
        except StateError as error:
            raise StateError(f"Could not open backing file: {error}") from None

    async def add_copy_before_write(
        self, name: str, file: str, target: str, limit: tuple[BitmapNode, str] | None
    ) -> None:
        """Take a snapshot of a disk now.

        Args:
            name: Of the node and of the snapshot.
            file: The disk's node.
            target: A scratch image.
            limit: The bitmap that marks what is to be kept; None for all.

        Raises:
            StateError: A name is taken or unknown, or a node is not of the right kind.
            OSError: The scratch file cannot be made.
        """
        self._check_new(name)
        disk = self.find(file, file).disk
        if disk is None or self.find(file, file).view is not disk.node:
            raise StateError(f"node '{file}' is no disk")
        if self.find(target, target).driver not in ("file", "raw", "qcow2"):
            raise StateError(f"node '{target}' is no scratch image")
        freeze = Freeze(name, [disk], limit=limit)
        await self._engine.transact([freeze])
        freeze.snapshot.users.add(f"node '{name}'")
        self._nodes[name] = GraphNode(
            name=name,
            driver="copy-before-write",
            filename=str(disk.image.path),
            view=disk.node,
            bitmaps=(disk,),
            disk=disk,
            snapshot=freeze.snapshot,
            children=(file, target),
            read_only=False,
        )

    def add_snapshot_access(self, name: str, file: str, *, unmap: bool) -> None:
        """Show the snapshot that a copy-before-write node keeps.

        Args:
            name: Of the node.
            file: The copy-before-write node.
            unmap: TRIM gives ranges up.

        Raises:
            StateError: A name is taken or unknown, or ``file`` is of another kind.
        """
        under = self.find(file, file)
        if under.driver != "copy-before-write" or under.snapshot is None or under.disk is None:
            raise StateError(f"node '{file}' is no copy-before-write node")
        self._add(
            GraphNode(
                name=name,
                driver="snapshot-access",
                filename=under.filename,
                view=under.snapshot.disks[under.disk.name].node,
                disk=under.disk,
                snapshot=under.snapshot,
                children=(file,),
                can_trim=unmap,
            )
        )

    def reopen_raw(self, name: str, file: str) -> None:
        """Put a raw node of a disk over a copy-before-write node of that disk, or back.

        Nothing changes but what is under what: the guest's writes go through copy-before-write
        already.

        Raises:
            StateError: It is anything else.
        """
        node, under = self.find(name, name), self.find(file, file)
        if node.driver != "raw" or node.disk is None or under.view is not node.view:
            raise StateError(
                f"node '{name}' cannot be put over '{file}': only a raw node of a disk over a"
                " copy-before-write node of that disk, or back"
            )
        node.children = (file,)

    async def remove(self, name: str) -> None:
        """Remove a node that was added; a copy-before-write node's snapshot ends.

        Raises:
            StateError: There is none, or it is in use.
        """
        node = self._nodes.get(name)
        if node is None:
            if self._engines_node(name) is not None:
                raise StateError(f"Node {name} is not owned by the monitor")
            raise StateError(f"Failed to find node with node-name='{name}'")
        if any(name in each.children for each in self):
            raise StateError(f"Block device {name} is in use")
        del self._nodes[name]
        if node.driver == "copy-before-write" and node.snapshot is not None:
            try:
                await self.end_snapshot(node.snapshot, f"node '{name}'")
            except StateError:
                self._nodes[name] = node
                raise

    async def end_snapshot(self, snapshot: Snapshot, user: str) -> None:
        """Drop a snapshot on which only ``user`` stands.

        Raises:
            StateError: Something else stands on it, too.
        """
        snapshot.users.discard(user)
        try:
            await self._engine.drop_snapshot(snapshot.name)
        except StateError:
            snapshot.users.add(user)
            raise

    async def close(self) -> None:
        """Remove all nodes, those above others first."""
        while self._nodes:
            used = {child for node in self for child in node.children}
            for name in [name for name in self._nodes if name not in used]:
                await self.remove(name)
