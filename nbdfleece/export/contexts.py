"""Metadata contexts: named descriptions of an export's ranges.

Spec: proto.md, "Metadata querying"; QEMU docs/interop/nbd.rst for ``qemu:``.
"""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple, Protocol

from ..bitmaps.bitmap import Bitmap
from ..block.node import BlockNode, allocation_depth, allocation_flags
from ..extents import Extents

BASE_ALLOCATION: Final = "base:allocation"
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
DIRTY_BITMAP_PREFIX: Final = "qemu:dirty-bitmap:"

_AHEAD_EXTENTS_MIN: Final = 4096
"""Extents of an answer from which on the next is worth a thread: to find so many takes longer."""


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


class _Query(NamedTuple):
    """What a client wants to know."""

    offset: int
    length: int
    extents_max: int


class DirtyBitmap:
    """``qemu:dirty-bitmap:NAME``: bit 0 dirty.

    Clients ask for a map in pieces, for the next one when they have digested the last. Where
    the pieces are large the next is found meanwhile, one ahead at most, however many clients
    there are.

    Args:
        leaf: The name after the prefix, as the client asks for it.
        bitmap: The bits; they do not change while the export exists.
    """

    def __init__(self, leaf: str, bitmap: Bitmap) -> None:
        self.name = DIRTY_BITMAP_PREFIX + leaf
        self.bitmap = bitmap
        self._ahead: tuple[_Query, asyncio.Future[Extents]] | None = None

    async def extents(self, offset: int, length: int, *, extents_max: int) -> Extents:
        """Describe the range by the bitmap; if that is much, the next range is begun with."""
        query = _Query(offset, length, extents_max)
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == query:
            found = await asyncio.shield(ahead[1])
        else:
            found = self._look(query)
        if len(found.lengths) >= _AHEAD_EXTENTS_MIN:
            self._look_ahead(query, offset + found.total())
        return found

    def _look(self, query: _Query) -> Extents:
        return self.bitmap.extents(query.offset, query.length, extents_max=query.extents_max)

    def _look_ahead(self, query: _Query, end: int) -> None:
        """Let a thread describe what a client that wants the whole map asks for next."""
        length = min(query.length, self.bitmap.size - end)
        if length > 0:
            following = query._replace(offset=end, length=length)
            loop = asyncio.get_running_loop()
            self._ahead = following, loop.run_in_executor(None, self._look, following)
