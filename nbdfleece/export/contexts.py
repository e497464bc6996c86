"""Metadata contexts: named descriptions of an export's ranges.

Spec: proto.md, "Metadata querying"; QEMU docs/interop/nbd.rst for ``qemu:``.
"""

from __future__ import annotations

from typing import Final, Protocol

from ..bitmaps.bitmap import Bitmap
from ..block.node import BlockNode, allocation_depth, allocation_flags
from ..extents import Extents

BASE_ALLOCATION: Final = "base:allocation"
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
DIRTY_BITMAP_PREFIX: Final = "qemu:dirty-bitmap:"


class MetadataContext(Protocol):
    """A description that a client can ask for by name."""

    @property
    def name(self) -> str:
        """The full name, ``namespace:leaf``."""

    async def extents(self, offset: int, length: int, *, extents_max: int) -> Extents:
        """Describe the range.

        Returns:
            Extents from ``offset`` on, merged, not past ``offset + length``; their status
            is the 32-bit value of the wire.
        """


class BaseAllocation:
    """``base:allocation``: bit 0 hole, bit 1 reads as zeroes."""

    name = BASE_ALLOCATION

    def __init__(self, node: BlockNode) -> None:
        self._node = node

    async def extents(self, offset: int, length: int, *, extents_max: int) -> Extents:
        """Describe the range by the node's own flags."""
        found = await self._node.block_status(offset, length, extents_max=extents_max)
        return found.with_status(allocation_flags(found.status))


class AllocationDepth:
    """``qemu:allocation-depth``: 0 unallocated, 1 this layer, 2 its backing file, and so on."""

    name = ALLOCATION_DEPTH

    def __init__(self, node: BlockNode) -> None:
        self._node = node

    async def extents(self, offset: int, length: int, *, extents_max: int) -> Extents:
        """Describe the range by the depth of the layer that holds it."""
        found = await self._node.block_status(offset, length, extents_max=extents_max)
        return found.with_status(allocation_depth(found.status))


class DirtyBitmap:
    """``qemu:dirty-bitmap:NAME``: bit 0 dirty.

    Args:
        leaf: The name after the prefix, as the client asks for it.
        bitmap: The bits; they do not change while the export exists.
    """

    def __init__(self, leaf: str, bitmap: Bitmap) -> None:
        self.name = DIRTY_BITMAP_PREFIX + leaf
        self.bitmap = bitmap

    async def extents(self, offset: int, length: int, *, extents_max: int) -> Extents:
        """Describe the range by the bitmap."""
        return self.bitmap.extents(offset, length, extents_max=extents_max)
