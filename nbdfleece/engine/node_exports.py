"""Exports that clients of QEMU's commands add and remove, with bitmaps of their choice.

Those of images that the server was started with for reading only are such exports, too.

While a bitmap is exported it is busy: it cannot be removed, cleared, merged into or switched.
A recording one goes on recording, so only a writable export may show one by its mere name.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bitmaps.bitmap import Bitmap
from ..block.node import BlockNode
from ..errors import StateError
from ..export.contexts import AllocationDepth, BaseAllocation, DirtyBitmap, MetadataContext
from ..export.export import Export, ExportTable
from ..qcow2.image import Qcow2Image
from .bitmaps import find_bitmap
from .chain import check_name
from .engine import Engine
from .graph import Graph, GraphNode
from .still_nodes import ReadOnlyImage
from .transaction import Action, BitmapNode, Draft

BitmapName = str | tuple[str, str]
"""A bitmap of the exported node or what is under it, or a node's name and its bitmap's."""


class HoldBitmaps(Action):
    """Make bitmaps busy and take their bits.

    Args:
        wanted: Nodes and names.

    Attributes:
        bits: By the bitmaps' names, once it has happened.
    """

    def __init__(self, wanted: Sequence[tuple[BitmapNode, str]]) -> None:
        self._wanted = wanted
        self.bits: dict[str, Bitmap] = {}

    def needs(self) -> Iterable[tuple[BitmapNode, str]]:
        """The bits of all."""
        return self._wanted

    def apply(self, draft: Draft) -> None:
        """Check them.

        Raises:
            StateError: One is not there, busy or inconsistent.
        """
        for node, name in self._wanted:
            if find_bitmap(draft, node, name).inconsistent:
                raise StateError(f"Bitmap '{name}' is inconsistent and cannot be used; remove it")
            if name in self.bits:
                raise StateError("two bitmaps of an export cannot have the same name")
            self.bits[name] = draft.bits(node, name)

    def committed(self) -> None:
        """They are busy now."""
        for node, name in self._wanted:
            node.busy[name] += 1


@dataclass(eq=False, slots=True, kw_only=True)
class NodeExport:
    """An export that was added.

    Attributes:
        id: Unique among the exports.
        node: What it shows.
        export: How NBD clients see it.
        held: The bitmaps that it keeps busy.
        is_of_start: The server was started with it.
        is_ending: Its clients are being disconnected.
    """

    id: str
    node: GraphNode
    export: Export
    held: list[tuple[BitmapNode, str]] = field(default_factory=list)
    is_of_start: bool = False
    is_ending: bool = False


class NodeExports:
    """The exports that were added.

    Args:
        engine: Carries out what concerns bitmaps.
        graph: Has the nodes.
        disconnect: Called with the name of an export that was removed, and with whether its
            clients are to be closed at once; returns once no client uses it any more.
        event: Called with the name and the data of each event.
    """

    def __init__(
        self,
        engine: Engine,
        graph: Graph,
        disconnect: Callable[[str, bool], Awaitable[None]],
        event: Callable[[str, Mapping[str, Any]], None],
    ) -> None:
        self._engine = engine
        self._graph = graph
        self._disconnect = disconnect
        self._event = event
        self._exports: dict[str, NodeExport] = {}

    def __iter__(self) -> Iterator[NodeExport]:
        return iter(list(self._exports.values()))

    @property
    def _table(self) -> ExportTable:
        return self._engine.exports

    async def add(
        self,
        identity: str,
        node_name: str,
        *,
        device: str = "",
        name: str | None = None,
        description: str = "",
        writable: bool = False,
        bitmaps: Sequence[BitmapName] = (),
        changes: Mapping[str, Bitmap] = {},
        allocation_depth: bool = False,
    ) -> None:
        """Export a node.

        Args:
            identity: What to call the export in commands.
            node_name: The node.
            device: What a message is to call it as a device.
            name: What NBD clients call the export; the node's name if not given.
            description: For people.
            writable: Clients may write.
            bitmaps: What to offer as ``qemu:dirty-bitmap:NAME``.
            changes: What else to offer so, by its name; of no bitmap of the node.
            allocation_depth: Offer ``qemu:allocation-depth``.

        Raises:
            StateError: A name is taken or unknown, or a bitmap cannot be shown.
        """
        if identity in self._exports:
            raise StateError(f"Block export id '{identity}' is already in use")
        node = self._graph.find(node_name, device)
        export = _export(node, name, description, writable)
        if allocation_depth:
            export.contexts += (AllocationDepth(export.node),)
        export.contexts += tuple(DirtyBitmap(each, bits) for each, bits in changes.items())
        self._check_name(export.name)
        held = [self._bitmap(node, each, writable) for each in bitmaps]
        added = NodeExport(id=identity, node=node, export=export)
        self._exports[identity] = added
        if node.snapshot is not None:
            node.snapshot.users.add(f"export '{identity}'")
        try:
            await self._hold(added, held)
            self._check_name(export.name)
            self._table.add(export)
        except BaseException:
            self._forget(added)
            raise
        await self._engine.delegate(export)

    async def add_image(
        self, name: str, path: Path, bitmaps: Sequence[str], since: Sequence[str]
    ) -> tuple[Export, Qcow2Image]:
        """Show a qcow2 image for reading only, as node and export of one name, from the start on.

        Args:
            name: Of both.
            path: The image.
            bitmaps: Bitmaps of it to offer.
            since: Checkpoints of it; what has changed since is offered under their names, which
                are none of ``bitmaps``.

        Returns:
            The export and the image that it shows.

        Raises:
            StateError: The name is taken, a bitmap is not there, inconsistent or damaged, or the
                changes since a checkpoint are not known; the node stays.
            OSError, ImageError: The image cannot be opened.
        """
        shown = await self._graph.add_image(name, path)
        try:
            for bitmap in bitmaps:
                shown.check_undamaged(bitmap)
            await self.add(
                name,
                name,
                description=f"read-only image {name}",
                bitmaps=bitmaps,
                changes=await _changes(shown, since),
                allocation_depth=True,
            )
        except StateError as error:
            raise StateError(f"{path}: {error}") from error
        added = self._exports[name]
        added.is_of_start = True
        return added.export, shown.image

    def _check_name(self, name: str) -> None:
        if self._table.has(name):
            raise StateError(f"NBD server already has export named '{name}'")

    def _bitmap(
        self, node: GraphNode, wanted: BitmapName, writable: bool
    ) -> tuple[BitmapNode, str]:
        if not isinstance(wanted, str):
            return self._graph.find_bitmaps(wanted[0]), wanted[1]
        for holder in node.bitmaps:
            bitmap = holder.state.bitmaps.get(wanted)
            if bitmap is not None:
                if bitmap.recording and not writable and node.disk is not None:
                    raise StateError(f"Enabled bitmap '{wanted}' incompatible with readonly export")
                return holder, wanted
        raise StateError(f"Bitmap '{wanted}' is not found")

    async def _hold(
        self, export: NodeExport, held: Sequence[tuple[BitmapNode, str]], leaf: str | None = None
    ) -> None:
        """Make bitmaps busy and offer them, one under another name if one is given."""
        if not held:
            return
        hold = HoldBitmaps(held)
        await self._engine.transact([hold])
        export.held += held
        contexts = tuple(DirtyBitmap(leaf or name, bits) for name, bits in hold.bits.items())
        export.export.contexts += contexts

    async def add_bitmap(self, export_name: str, bitmap: str, leaf: str | None) -> None:
        """Offer one more bitmap of an export to clients that come from now on.

        Args:
            export_name: The export, as NBD clients call it.
            bitmap: A bitmap of its node or what is under it.
            leaf: What clients call the bitmap; its own name if not given.

        Raises:
            StateError: There is none of that name, or the bitmap cannot be shown.
        """
        for each in self:
            if each.export.name == export_name:
                name = leaf or bitmap
                check_name(name, "bitmap")
                context = DirtyBitmap(name, Bitmap(0, 512)).name
                if each.export.context(context) is not None:
                    raise StateError(f"export '{export_name}' has a bitmap '{name}' already")
                writable = not each.export.read_only
                await self._hold(each, [self._bitmap(each.node, bitmap, writable)], leaf)
                return
        raise StateError(f"Export '{export_name}' is not found")

    async def remove(self, identity: str, *, hard: bool = False) -> None:
        """Remove an export.

        Args:
            identity: Which.
            hard: Disconnect its clients; otherwise there must be none.

        Raises:
            StateError: There is none, or it has clients.
        """
        export = self._exports.get(identity)
        if export is None:
            raise StateError(f"Export '{identity}' is not found")
        if export.is_ending:
            raise StateError(f"Export '{identity}' is already shutting down")
        if export.export.connections and not hard:
            raise StateError(f"export '{identity}' still in use; use mode='hard' all the same")
        export.is_ending = True
        self._table.remove(export.export.name)
        await self._disconnect(export.export.name, hard)
        self._forget(export)
        self._event("BLOCK_EXPORT_DELETED", {"id": identity})

    def _forget(self, export: NodeExport) -> None:
        del self._exports[export.id]
        for node, name in export.held:
            node.busy[name] -= 1
        if export.node.snapshot is not None:
            export.node.snapshot.users.discard(f"export '{export.id}'")

    def are_on(self, node_name: str) -> bool:
        """Whether a node is exported."""
        return any(each.node.name == node_name for each in self)

    async def remove_added(self) -> None:
        """Remove all exports but those that the server was started with."""
        await self._remove_where(lambda each: not each.is_of_start)

    async def close(self, view: BlockNode | None = None) -> None:
        """Remove all exports, or those that show one view."""
        await self._remove_where(lambda each: view in (None, each.export.node))

    async def _remove_where(self, is_meant: Callable[[NodeExport], bool]) -> None:
        for each in self:
            if is_meant(each) and not each.is_ending:
                await self.remove(each.id, hard=True)


async def _changes(shown: ReadOnlyImage, since: Sequence[str]) -> dict[str, Bitmap]:
    """What has changed since checkpoints of an image, by their names.

    Raises:
        StateError: That is not known.
    """
    try:
        return {each: await shown.changes_since(each) for each in since}
    except StateError as error:
        raise StateError(f"{error}; without --since the image can be read in full") from error


def _export(node: GraphNode, name: str | None, description: str, writable: bool) -> Export:
    """The export of a node.

    Raises:
        StateError: The node cannot be read, or not be written, or the name cannot be.
    """
    if node.view is None:
        raise StateError(f"node '{node.name}' is a mere file: export a raw or qcow2 node over it")
    if writable and node.read_only:
        raise StateError("Cannot export read-only node as writable")
    if name:
        check_name(name, "export")
    contexts: tuple[MetadataContext, ...] = (BaseAllocation(node.view),)
    return Export(
        name=node.name if name is None else name,
        node=node.view,
        description=description,
        read_only=not writable,
        can_trim=writable or node.can_trim,
        contexts=contexts,
    )
