"""A block node in memory that can be made slow and can fail, for tests of what lies above."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

from ..block.node import BlockNode, BlockStatus, block_status_word
from ..extents import Extents

_DATA = block_status_word(BlockStatus.DATA, 1)
_HOLE = block_status_word(BlockStatus.HOLE | BlockStatus.ZERO, 0)


class MemoryNode(BlockNode):
    """Bytes in memory.

    ``pause`` is called before each operation with its name; what it returns, if not
    None, is awaited: a test decides there who goes on when. ``fail`` is called likewise
    and may raise. ``is_at_hand`` says whether what is asked needs no waiting now.
    """

    read_only = False

    def __init__(self, content: bytes | bytearray | int, block: int = 4096) -> None:
        self.content = bytearray(content)
        self.size = len(self.content)
        self.block = block
        self.holes: set[int] = set()
        self.pause: Callable[[str], asyncio.Future[None] | None] = lambda operation: None
        self.fail: Callable[[str, int], None] = lambda operation, offset: None
        self.is_at_hand: Callable[[], bool] = lambda: False
        self.flushes = 0
        self.closed = False

    @classmethod
    def sparse(cls, content: bytes | bytearray | int) -> MemoryNode:
        """A node whose blocks of zeroes are holes."""
        node = cls(content)
        for block in range(-(-node.size // node.block)):
            if not any(node.content[block * node.block : (block + 1) * node.block]):
                node.holes.add(block)
        return node

    async def _enter(self, operation: str, offset: int) -> None:
        waiting = self.pause(operation)
        if waiting is not None:
            await waiting
        self.fail(operation, offset)

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Copy out."""
        await self._enter("read", offset)
        if offset + len(view) > self.size:
            raise OSError(errno.EINVAL, "past the end")
        view[:] = self.content[offset : offset + len(view)]

    def read_at_once(self, offset: int, view: memoryview) -> bool:
        """Copy out, if that is at hand."""
        if not self.is_at_hand():
            return False
        self.fail("read", offset)
        view[:] = self.content[offset : offset + len(view)]
        return True

    def read_with_status(self, offset: int, view: memoryview) -> int | None:
        """Copy out a part of one block, if that is at hand."""
        if not self.is_at_hand() or offset // self.block != (offset + len(view) - 1) // self.block:
            return None
        self.fail("read", offset)
        if offset // self.block in self.holes:
            return _HOLE
        view[:] = self.content[offset : offset + len(view)]
        return _DATA

    async def write(self, offset: int, data: memoryview) -> None:
        """Copy in."""
        await self._enter("write", offset)
        self.content[offset : offset + len(data)] = data
        self._unhole(offset, len(data))

    def write_at_once(self, offset: int, data: memoryview) -> bool:
        """Copy in, if that needs no waiting."""
        if not self.is_at_hand():
            return False
        self.fail("write", offset)
        self.content[offset : offset + len(data)] = data
        self._unhole(offset, len(data))
        return True

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        """Keep the space."""
        await self._enter("write_zeroes", offset)
        self.content[offset : offset + length] = bytes(length)
        self._unhole(offset, length)

    async def trim(self, offset: int, length: int) -> None:
        """Make whole blocks holes."""
        await self._enter("trim", offset)
        for block in range(-(-offset // self.block), (offset + length) // self.block):
            begin = block * self.block
            end = min(begin + self.block, self.size)
            self.content[begin:end] = bytes(end - begin)
            self.holes.add(block)

    async def flush(self) -> None:
        """Count."""
        await self._enter("flush", 0)
        self.flushes += 1

    async def block_status(
        self, offset: int, length: int, *, extents_max: int = 1 << 20
    ) -> Extents:
        """Tell holes from data, by blocks."""
        await self._enter("block_status", offset)
        pairs = []
        end = offset + length
        while offset < end:
            stop = min(end, (offset // self.block + 1) * self.block)
            pairs.append((stop - offset, _HOLE if offset // self.block in self.holes else _DATA))
            offset = stop
        return Extents.from_pairs(pairs).limited(extents_max)

    async def close(self) -> None:
        """Note that it was closed."""
        self.closed = True

    def _unhole(self, offset: int, length: int) -> None:
        for block in range(offset // self.block, (offset + length - 1) // self.block + 1):
            self.holes.discard(block)
