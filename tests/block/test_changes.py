"""A disk of changes: what is marked is data, all else a hole that reads as zeroes."""

from __future__ import annotations

import random

from nbdfleece.bitmaps.bitmap import Bitmap
from nbdfleece.block.changes import ChangesNode
from nbdfleece.block.node import BlockStatus
from nbdfleece.testing.memory_node import MemoryNode

SIZE = 100_000


async def test_every_range_reads_and_is_described_by_the_marks() -> None:
    chance = random.Random(1)
    below = MemoryNode(chance.randbytes(SIZE))
    await below.trim(16384, 8192)
    bitmap = Bitmap(SIZE, 4096)
    wanted = bytearray(SIZE)
    for granule in (0, 3, 4, 5, 24):
        begin, end = granule * 4096, min(granule * 4096 + 4096, SIZE)
        bitmap.set_range(begin, end - begin)
        wanted[begin:end] = below.content[begin:end]
    node = ChangesNode(below, bitmap)
    for _ in range(200):
        offset = chance.randrange(SIZE)
        length = chance.randrange(1, SIZE - offset + 1)
        view = memoryview(bytearray(b"?") * length)
        await node.read_into(offset, view)
        assert view == wanted[offset : offset + length]
        position = offset
        for extent, status in (await node.block_status(offset, length)).pairs():
            is_data = not status & (BlockStatus.HOLE | BlockStatus.ZERO)
            assert is_data == bitmap.is_set(position) == bitmap.is_set(position + extent - 1)
            position += extent
        assert position == offset + length


async def test_it_cannot_be_written_and_closes_the_disk() -> None:
    below = MemoryNode(SIZE)
    node = ChangesNode(below, Bitmap(SIZE, 4096))
    assert node.read_only
    await node.close()
    assert below.closed
