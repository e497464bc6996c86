"""A read-only view whose source can be replaced while it is served."""

from __future__ import annotations

from ..extents import Extents
from .node import BlockNode


class SwitchableView(BlockNode):
    """Shows one node, and from the next request on maybe another one of the same size.

    Args:
        source: What is shown at first.
    """

    read_only = True

    def __init__(self, source: BlockNode) -> None:
        self.source = source
        self.size = source.size
        self.preferred_block_size = source.preferred_block_size

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Read the present source."""
        await self.source.read_into(offset, view)

    def read_at_once(self, offset: int, view: memoryview) -> bool:
        """Read the present source."""
        return self.source.read_at_once(offset, view)

    async def block_status(
        self, offset: int, length: int, *, extents_max: int = 1 << 20
    ) -> Extents:
        """Describe the present source."""
        return await self.source.block_status(offset, length, extents_max=extents_max)

    async def close(self) -> None:
        """Nothing: the sources are others' to close."""
