"""Overlays against plain bytes: the base never changes until a commit, and then all at once."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path

import pytest

from nbdfleece.block.node import BlockStatus
from nbdfleece.block.overlay import Overlay
from nbdfleece.testing.memory_node import MemoryNode


async def read(node: Overlay, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    await node.read_into(offset, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize("seed", range(20))
async def test_overlay_at_random_reads_as_written_and_commits_exactly(
    tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    size = chance.choice([4096, 70_001, 3 << 20])
    base = MemoryNode(chance.randbytes(size))
    before = bytes(base.content)
    overlay = Overlay(base, tmp_path)
    model = bytearray(before)
    for _ in range(60):
        offset = chance.randrange(size)
        length = chance.randint(1, min(size - offset, chance.choice([10, 5000, 200_000])))
        kind = chance.random()
        if kind < 0.5:
            data = chance.randbytes(length)
            await overlay.write(offset, memoryview(data))
            model[offset : offset + length] = data
        elif kind < 0.7:
            await overlay.write_zeroes(offset, length)
            model[offset : offset + length] = bytes(length)
        elif kind < 0.8:
            await overlay.trim(offset, length)
            model[offset : offset + length] = await read(overlay, offset, length)
            assert await read(overlay, 0, size) == model
        else:
            assert await read(overlay, offset, length) == model[offset : offset + length]
            extents = await overlay.block_status(offset, length)
            assert extents.total() == length
            at = offset
            for part, status in extents.pairs():
                if status & BlockStatus.ZERO:
                    assert not any(model[at : at + part])
                at += part
    assert base.content == before
    await overlay.commit(base)
    assert base.content == model
    assert base.flushes == 1
    await overlay.close()
    assert list(tmp_path.iterdir()) == []


async def test_commit_writes_only_what_was_written(tmp_path: Path) -> None:
    base = MemoryNode(b"x" * (1 << 20))
    overlay = Overlay(base, tmp_path)
    await overlay.write(5000, memoryview(b"y"))
    await overlay.write_zeroes(1 << 18, 1 << 16)
    touched: list[str] = []
    base.pause = touched.append  # type: ignore[assignment,return-value]
    await overlay.commit(base)
    assert touched == ["write", "write_zeroes", "flush"]
    await overlay.close()


async def test_concurrent_writes_to_parts_of_a_granule_are_all_kept(tmp_path: Path) -> None:
    base = MemoryNode(b"x" * 4096)
    held = asyncio.get_running_loop().create_future()
    base.pause = lambda operation: held
    overlay = Overlay(base, tmp_path)
    writes = [
        asyncio.ensure_future(overlay.write(offset, memoryview(b"abc")))
        for offset in (0, 100, 4000)
    ]
    await asyncio.sleep(0)
    held.set_result(None)
    await asyncio.gather(*writes)
    found = await read(overlay, 0, 4096)
    assert (found[:3], found[100:103], found[4000:4003]) == (b"abc", b"abc", b"abc")
    assert found.count(b"x") == 4096 - 9
    await overlay.close()


async def test_full_scratch_fails_the_write_and_changes_nothing(tmp_path: Path) -> None:
    overlay = Overlay(MemoryNode(b"x" * 16384), tmp_path, quota=4096)
    await overlay.write(0, memoryview(b"y" * 4096))
    with pytest.raises(OSError, match="quota") as caught:
        await overlay.write(4096, memoryview(b"z" * 4096))
    assert caught.value.errno == errno.ENOSPC
    assert await read(overlay, 0, 16384) == b"y" * 4096 + b"x" * 12288
    await overlay.close()
