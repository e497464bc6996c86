"""Block nodes as QEMU's commands name them, over disks and snapshots.

A disk is a node of its name, and so is a disk of a snapshot (``SNAPSHOT/DISK``). Clients of
QEMU's commands add nodes of their own:

=====================  ====================================================================
driver                 what it is here
=====================  ====================================================================
``file``               a file for a node above it, by which alone it is opened
``raw``                over a file, a new disk, its bytes the disk's; over another node,
                       another name for that
``qcow2``              a new disk; or, with a disk as its backing node, a scratch image: it
                       shows the disk, and from the instant of a backup job on the disk as it
                       was then
``copy-before-write``  a snapshot of the node's name, from the moment at which it is added:
                       the guest's node is above it already, so nothing has to be reopened
``snapshot-access``    what that snapshot shows
=====================  ====================================================================

A new disk is one like those that the server was started with, but it is not exported, and it is
closed when its node is removed. As long as it is the target of copy-before-write it counts as no
disk. Read-only, it is no disk either but only shown, with its bitmaps; so are the images that the
server was started with for reading only, each of which is a node of its name.

Old data goes to the scratch of the disk, which all its snapshots share, and never to the
scratch images: these are only names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..block.copy_failure import OnCbwError
from ..block.file import FileNode
from ..block.guest_options import DEFAULT_POLICY, DetectZeroes, GuestPolicy
from ..block.node import BlockNode
from ..block.switchable import SwitchableView
from ..errors import StateError
from ..qcow2.image import Qcow2Image
from .chain import check_name
from .disk import Disk
from .engine import Engine
from .snapshot import Snapshot
from .still_nodes import ReadOnlyImage, ScratchImage
from .transaction import BitmapNode, Freeze


def guest_policy(discard: str | None, detect_zeroes: str | None) -> GuestPolicy:
    """What becomes of a guest's discards and zeroes, in QEMU's words; None for the usual.

    Raises:
        UsageError: The words do not go together.
    """
    return GuestPolicy(
        discard=discard != "ignore", detect_zeroes=DetectZeroes(detect_zeroes or "off")
    )


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
        opened: What was opened for it alone, and is closed with it.
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
    opened: Disk | Qcow2Image | FileNode | None = None


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

    @contextmanager
    def _adding(self, node: GraphNode) -> Iterator[None]:
        """Add a node and open what it shows; if that fails, it is gone again."""
        self._add(node)
        try:
            yield
        except BaseException:
            del self._nodes[node.name]
            raise

    def _check_new(self, name: str) -> None:
        check_name(name, "node")
        if name in self._nodes or self._engines_node(name) is not None:
            raise StateError(f"Duplicate nodes with node-name='{name}'")

    def add_file(self, name: str, filename: str, *, read_only: bool = False) -> None:
        """Add a file, which is opened once a node over it needs that.

        Raises:
            StateError: The name is taken, or there is no such file.
        """
        if not os.path.exists(filename):
            raise StateError(f"Could not open '{filename}': No such file or directory")
        self._add(GraphNode(name=name, driver="file", filename=filename, read_only=read_only))

    async def add_raw(
        self,
        name: str,
        file: str,
        policy: GuestPolicy = DEFAULT_POLICY,
        *,
        read_only: bool = False,
    ) -> None:
        """Add a raw disk over a file, or another name for a node.

        Raises:
            StateError: The name is taken, or there is no such node.
            OSError, ImageError: The file cannot be opened.
        """
        under = self.find(file, file)
        if under.driver == "file":
            await self._add_opened(name, "raw", under, policy, read_only=read_only)
            return
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
                read_only=under.read_only or read_only,
                can_trim=under.can_trim,
            )
        )

    async def add_qcow2(
        self,
        name: str,
        file: str,
        backing: str | None,
        policy: GuestPolicy = DEFAULT_POLICY,
        *,
        read_only: bool = False,
    ) -> None:
        """Add a disk, or a scratch image over a disk.

        Raises:
            StateError: The name is taken, there is no such file, or the backing node is no disk.
            OSError, ImageError: The image cannot be opened.
        """
        under = self.find(file, file)
        if under.driver != "file":
            raise StateError(f"node '{file}' is no file for an image")
        if backing is None:
            await self._add_opened(name, "qcow2", under, policy, read_only=read_only)
            return
        behind = self._find_backing(backing)
        if behind.disk is None or behind.view is not behind.disk.node:
            raise StateError(f"backing node '{backing}' is no disk")
        self._add(
            GraphNode(
                name=name,
                driver="qcow2",
                filename=under.filename,
                view=SwitchableView(behind.disk.node),
                bitmaps=(ScratchImage(name, behind.disk), behind.disk),
                disk=behind.disk,
                children=(file, backing),
            )
        )

    async def _add_opened(
        self, name: str, driver: str, under: GraphNode, policy: GuestPolicy, *, read_only: bool
    ) -> None:
        """Open a file as what the driver says."""
        node = GraphNode(name=name, driver=driver, filename=under.filename, children=(under.name,))
        with self._adding(node):
            if under.read_only and not read_only:
                raise StateError("Block node is read-only")
            await self._open(node, policy, read_only=read_only)

    async def add_image(self, name: str, path: Path) -> ReadOnlyImage:
        """Add a qcow2 image that is only shown, with no node for its file.

        Raises:
            StateError: The name is taken.
            OSError, ImageError: The image cannot be opened.
        """
        node = GraphNode(name=name, driver="qcow2", filename=str(path))
        with self._adding(node):
            return await self._show(node)

    async def _open(self, node: GraphNode, policy: GuestPolicy, *, read_only: bool) -> None:
        path = Path(node.filename)
        if not read_only:
            node.disk = await self._open_disk(node.name, path, policy, is_raw=node.driver == "raw")
            node.opened, node.view, node.bitmaps = node.disk, node.disk.node, (node.disk,)
            node.read_only = False
        elif node.driver == "raw":
            node.opened = node.view = FileNode.open(path, read_only=True)
        else:
            await self._show(node)

    async def _show(self, node: GraphNode) -> ReadOnlyImage:
        """Open a node's qcow2 image for reading only."""
        disks = [*self._engine.disks.values(), *(each.disk for each in self if each.disk)]
        shown = await ReadOnlyImage.open(node.name, Path(node.filename), disks)
        node.opened, node.view, node.bitmaps = shown.image, shown.image, (shown,)
        return shown

    async def _open_disk(self, name: str, path: Path, policy: GuestPolicy, *, is_raw: bool) -> Disk:
        """Open a disk, and settle what a crash left open on it.

        Raises:
            StateError: A backup that runs makes a checkpoint that the disk has.
            OSError, ImageError: The image cannot be opened.
        """
        disk = await self._engine.open_disk(name, path, policy, is_exported=False, is_raw=is_raw)
        try:
            for snapshot in self._engine.snapshots.values():
                made = snapshot.checkpoint if snapshot.is_pending else None
                if made is not None and disk.state.chain.find(made):
                    raise StateError(
                        f"'{path}' has a checkpoint '{made}', which backup '{snapshot.name}'"
                        " makes: commit or abort that first"
                    )
            await self._engine.recover()
        except BaseException:
            await self._engine.give_up_disk(disk)
            await disk.close()
            raise
        return disk

    def _find_backing(self, name: str) -> GraphNode:
        try:
            return self.find(name, name)
        except StateError as error:
            raise StateError(f"Could not open backing file: {error}") from None

    async def add_copy_before_write(
        self,
        name: str,
        file: str,
        target: str,
        limit: tuple[BitmapNode, str] | None,
        on_error: str | None = None,
        timeout_seconds: float | None = None,
    ) -> None:
        """Take a snapshot of a disk now.

        Args:
            name: Of the node and of the snapshot.
            file: The disk's node.
            target: A scratch image.
            limit: The bitmap that marks what is to be kept; None for all.
            on_error: What a failure to copy breaks, in QEMU's words; None for the usual.
            timeout_seconds: A copy that takes longer is a failure, 0: never; None for the usual.

        Raises:
            StateError: A name is taken or unknown, or a node is not of the right kind.
            OSError: The scratch file cannot be made.
        """
        self._check_new(name)
        disk = self.find(file, file).disk
        if disk is None or self.find(file, file).view is not disk.node:
            raise StateError(f"node '{file}' is no disk")
        await self._set_aside(target, disk)
        failure = disk.copies.failure
        if on_error is not None:
            failure = failure._replace(on_error=OnCbwError(on_error))
        if timeout_seconds is not None:
            failure = failure._replace(timeout_seconds=timeout_seconds or None)
        freeze = Freeze(name, [disk], limit=limit, failure=failure)
        try:
            await self._engine.transact([freeze])
        except BaseException:
            self._take_back(target)
            raise
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

    async def _set_aside(self, name: str, source: Disk) -> None:
        """Let a node be a target: if it has been a disk, it counts as one no more.

        Raises:
            StateError: There is none of that name, or it is used otherwise.
        """
        node = self.find(name, name)
        if node.driver not in ("file", "raw", "qcow2"):
            raise StateError(f"node '{name}' is no scratch image")
        if isinstance(node.opened, Disk):
            is_target = name not in self._engine.disks
            if node.opened is source or is_target or self._is_used(name):
                raise StateError(f"Block device {name} is in use")
            await self._engine.give_up_disk(node.opened)

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
        if self._is_used(name):
            raise StateError(f"Block device {name} is in use")
        if isinstance(node.opened, Disk):
            await self._engine.give_up_disk(node.opened)
        del self._nodes[name]
        if node.opened is not None:
            await node.opened.close()
        if node.driver == "copy-before-write" and node.snapshot is not None:
            try:
                await self.end_snapshot(node.snapshot, f"node '{name}'")
            except StateError:
                self._nodes[name] = node
                raise
            self._take_back(node.children[1])

    def _is_used(self, name: str) -> bool:
        """Whether a node is under another one."""
        return any(name in each.children for each in self)

    def _take_back(self, target: str) -> None:
        """Let what was the target of copy-before-write be a disk again, if it was one."""
        node = self._nodes.get(target)
        if node is not None and isinstance(node.opened, Disk):
            self._engine.disks[target] = node.opened

    async def end_snapshot(self, snapshot: Snapshot, user: str) -> None:
        """Drop a snapshot on which only ``user`` stands.

        Raises:
            StateError: Something else stands on it, too.
        """
        snapshot.users.discard(user)
        try:
            await self._engine.drop_snapshot(snapshot.name, is_told=False)
        except StateError:
            snapshot.users.add(user)
            raise

    async def close(self) -> None:
        """Remove all nodes, those above others first; the disks are the engine's to close."""
        while self._nodes:
            used = {child for node in self for child in node.children}
            for name in [name for name in self._nodes if name not in used]:
                if isinstance(self._nodes[name].opened, Disk):
                    del self._nodes[name]
                else:
                    await self.remove(name)
