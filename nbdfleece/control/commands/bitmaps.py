"""QEMU's commands on dirty bitmaps, for those that belong to no checkpoint.

Spec: QEMU qapi/block-core.json, "block-dirty-bitmap-add" and those after it.
"""

from __future__ import annotations

import hashlib
from typing import Final

import msgspec

from ...engine.bitmaps import AddBitmap, ClearBitmap, MergeBitmaps, RemoveBitmap, SetRecording
from ...engine.transaction import Action, BitmapNode
from ..command import ActionCommand, Command
from ..controlled import Controlled
from ..errors import QmpError

_HASHED_BYTES: Final = 8
"""QEMU serialises bitmaps in whole words of 64 bits."""


class BitmapReference(msgspec.Struct, forbid_unknown_fields=True):
    """QEMU's BlockDirtyBitmap: a bitmap of a node."""

    node: str
    name: str


class BitmapHash(msgspec.Struct):
    """QEMU's BlockDirtyBitmapSha256."""

    sha256: str


def find_node(server: Controlled, node: str) -> BitmapNode:
    """The node that has bitmaps, in QEMU's words if there is none.

    Raises:
        StateError: There is none.
    """
    return server.graph.find_bitmaps(node)


class BlockDirtyBitmapAdd(ActionCommand):
    """Add a dirty bitmap to a node; as in QEMU it is transient unless told otherwise."""

    node: str
    name: str
    granularity: int | None = None
    persistent: bool = False
    disabled: bool = False

    def action(self, server: Controlled) -> Action:
        """What is to be done."""
        server.graph.find(self.node, self.node)  # QEMU's message here differs from the others'
        return AddBitmap(
            node=find_node(server, self.node),
            name=self.name,
            granularity=self.granularity,
            recording=not self.disabled,
            persistent=self.persistent,
        )


class BlockDirtyBitmapRemove(ActionCommand):
    """Remove a dirty bitmap, also from the image."""

    node: str
    name: str

    def action(self, server: Controlled) -> Action:
        """What is to be done."""
        return RemoveBitmap(find_node(server, self.node), self.name)


class BlockDirtyBitmapClear(ActionCommand):
    """Let a dirty bitmap mark nothing."""

    node: str
    name: str

    def action(self, server: Controlled) -> Action:
        """What is to be done."""
        return ClearBitmap(find_node(server, self.node), self.name)


class BlockDirtyBitmapEnable(ActionCommand):
    """Let guest writes mark a dirty bitmap."""

    node: str
    name: str

    def action(self, server: Controlled) -> Action:
        """What is to be done."""
        return SetRecording(find_node(server, self.node), self.name, enabled=True)


class BlockDirtyBitmapDisable(ActionCommand):
    """Let guest writes no longer mark a dirty bitmap."""

    node: str
    name: str

    def action(self, server: Controlled) -> Action:
        """What is to be done."""
        return SetRecording(find_node(server, self.node), self.name, enabled=False)


class BlockDirtyBitmapMerge(ActionCommand):
    """Let ``target`` also mark what ``bitmaps`` mark, those of checkpoints and other nodes too.

    The target is not cleared before; on an error it is as it was.
    """

    node: str
    target: str
    bitmaps: list[str | BitmapReference]

    def action(self, server: Controlled) -> Action:
        """What is to be done."""
        node = find_node(server, self.node)
        sources = [
            (node, each) if isinstance(each, str) else (find_node(server, each.node), each.name)
            for each in self.bitmaps
        ]
        return MergeBitmaps(node, self.target, sources)


class XDebugBlockDirtyBitmapSha256(Command):
    """Hash the bits of a dirty bitmap, as QEMU does."""

    node: str
    name: str

    async def run(self, server: Controlled) -> BitmapHash:
        """Carry it out."""
        disk = find_node(server, self.node)
        if self.name not in disk.state.bitmaps:
            raise QmpError(f"Dirty bitmap '{self.name}' not found")
        packed = bytes((await disk.bits(self.name)).data)
        whole = packed.ljust(-(-len(packed) // _HASHED_BYTES) * _HASHED_BYTES, b"\0")
        return BitmapHash(hashlib.sha256(whole).hexdigest())


COMMANDS: Final = (
    BlockDirtyBitmapAdd,
    BlockDirtyBitmapRemove,
    BlockDirtyBitmapClear,
    BlockDirtyBitmapEnable,
    BlockDirtyBitmapDisable,
    BlockDirtyBitmapMerge,
    XDebugBlockDirtyBitmapSha256,
)
