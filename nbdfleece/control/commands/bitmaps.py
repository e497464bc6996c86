"""QEMU's commands on dirty bitmaps, for those that belong to no checkpoint.

A node is a disk. Nothing holds such a bitmap busy.

Spec: QEMU qapi/block-core.json, "block-dirty-bitmap-add" and those after it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import msgspec

from ...engine import bitmaps
from ...engine.disk import Disk
from ...engine.disk_state import DiskState
from ..command import Command
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


def find_node(server: Controlled, node: str) -> Disk:
    """The disk that is the node, in QEMU's words if there is none.

    Raises:
        QmpError: There is none.
    """
    disk = server.engine.disks.get(node)
    if disk is None:
        raise QmpError(f"Cannot find device='{node}' nor node-name='{node}'")
    return disk


class BlockDirtyBitmapAdd(Command):
    """Add a dirty bitmap to a disk; as in QEMU it is transient unless told otherwise."""

    node: str
    name: str
    granularity: int | None = None
    persistent: bool = False
    disabled: bool = False

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        await _change(
            server,
            self.node,
            partial(
                bitmaps.added,
                name=self.name,
                granularity=self.granularity,
                recording=not self.disabled,
                persistent=self.persistent,
            ),
        )


class BlockDirtyBitmapRemove(Command):
    """Remove a dirty bitmap, also from the image."""

    node: str
    name: str

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        await _change(server, self.node, partial(bitmaps.removed, name=self.name))


class BlockDirtyBitmapClear(Command):
    """Let a dirty bitmap mark nothing."""

    node: str
    name: str

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        await _change(server, self.node, partial(bitmaps.cleared, name=self.name))


class BlockDirtyBitmapEnable(Command):
    """Let guest writes mark a dirty bitmap."""

    node: str
    name: str

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        await _change(server, self.node, partial(bitmaps.recording, name=self.name, enabled=True))


class BlockDirtyBitmapDisable(Command):
    """Let guest writes no longer mark a dirty bitmap."""

    node: str
    name: str

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        await _change(server, self.node, partial(bitmaps.recording, name=self.name, enabled=False))


class BlockDirtyBitmapMerge(Command):
    """Let ``target`` also mark what ``bitmaps`` mark, those of checkpoints and other disks too.

    The target is not cleared before; on an error it is as it was.
    """

    node: str
    target: str
    bitmaps: list[str | BitmapReference]

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        disk = find_node(server, self.node)
        sources = [
            (disk, each) if isinstance(each, str) else (find_node(server, each.node), each.name)
            for each in self.bitmaps
        ]
        change = partial(bitmaps.merged, target=self.target, sources=sources)
        await server.engine.change_bitmaps(disk, change)


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


async def _change(
    server: Controlled, node: str, change: Callable[[Disk], Awaitable[DiskState]]
) -> None:
    await server.engine.change_bitmaps(find_node(server, node), change)


COMMANDS: Final = (
    BlockDirtyBitmapAdd,
    BlockDirtyBitmapRemove,
    BlockDirtyBitmapClear,
    BlockDirtyBitmapEnable,
    BlockDirtyBitmapDisable,
    BlockDirtyBitmapMerge,
    XDebugBlockDirtyBitmapSha256,
)
