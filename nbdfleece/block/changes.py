"""What changed on a disk, as a disk: the marked ranges, and nothing else.

Ranges that the bitmap marks have the disk's data, and are described as data even where these
are all zeroes, because they may have become so. All others are described as holes and read
as zeroes. Whoever copies no holes copies what changed.
"""

from __future__ import annotations

from ..bitmaps.bitmap import Bitmap
from ..extents import Extents
from .node import BlockNode, BlockStatus, block_status_word

_CHANGED = block_status_word(BlockStatus.DATA, 1)
_UNCHANGED = block_status_word(BlockStatus.HOLE | BlockStatus.ZERO, 0)


class ChangesNode(BlockNode):
    """Another node, as far as a bitmap marks it.

    Args:
        below: The disk; not written while this node is used, and closed with it.
        bitmap: Its changes; as large as the disk.
    """

    read_only = True

    def __init__(self, below: BlockNode, bitmap: Bitmap) -> None:
        self._below = below
        self._bitmap = bitmap
        self.size = below.size
        self.preferred_block_size = below.preferred_block_size

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Read what is marked; the rest becomes zeroes."""
        position = 0
        for length, is_marked in self._bitmap.extents(offset, len(view)).pairs():
            part = view[position : position + length]
            if is_marked:
                await self._below.read_into(offset + position, part)
            else:
                part[:] = bytes(length)
            position += length

    async def block_status(
        self, offset: int, length: int, *, extents_max: int = 1 << 20
    ) -> Extents:
        """Describe the marks."""
        marks = self._bitmap.extents(offset, length, extents_max=extents_max)
        return Extents.from_pairs(
            (length, _CHANGED if is_marked else _UNCHANGED) for length, is_marked in marks.pairs()
        )

    async def close(self) -> None:
        """Close the disk."""
        await self._below.close()
