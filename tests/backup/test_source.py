"""A source over libnbd: what it negotiates, reads and survives."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from nbdfleece.backup import ServerError, Source, offered_bitmaps
from nbdfleece.backup.source import READ_BYTES_MAX, read_as_dirty_from
from nbdfleece.errors import UsageError
from nbdfleece.extents import Extents

from .fake_server import ALLOCATION, BITMAP, READ, Script, serving, truthful
from .programs import nbdkit

SIZE = 8 << 20


@pytest.fixture
def script() -> Script:
    content = bytearray(range(256)) * (SIZE // 256)
    return Script(content, truthful({1, 2}, {2, 3}, SIZE, 65536))


async def test_extents_of_both_contexts_are_merged(tmp_path: Path, script: Script) -> None:
    async with serving(script, tmp_path) as uri:
        source = await Source.open(uri, dirty_bitmap=BITMAP)
        assert source.contexts == (ALLOCATION, BITMAP)
        found = await source.extents()
        await source.close()
    block = 65536
    expected = [(block, 0), (block, 1), (block, 3), (block, 2), (SIZE - 4 * block, 0)]
    assert found.pairs() == expected


async def test_large_read_is_spread_over_the_connections(tmp_path: Path, script: Script) -> None:
    async with serving(script, tmp_path) as uri:
        source = await Source.open(uri, connections=3)
        assert source.connection_count == 3
        buffer = bytearray(4 * READ_BYTES_MAX + 5)
        await source.read_into(1000, memoryview(buffer))
        await source.close()
    assert buffer == script.content[1000 : 1000 + len(buffer)]
    assert max(length for _, length in script.reads) == READ_BYTES_MAX


async def test_server_that_does_not_promise_multi_conn_gets_one_connection(
    tmp_path: Path,
) -> None:
    with nbdkit(tmp_path, "--filter=multi-conn", "memory", "1M", "multi-conn-mode=disable") as uri:
        source = await Source.open(uri, connections=4)
        assert source.connection_count == 1
        await source.close()


async def test_read_that_fails_is_an_error_and_the_next_one_works(
    tmp_path: Path, script: Script
) -> None:
    failures = [errno.EIO]
    script.fails = lambda number, kind: failures.pop() if kind == READ and failures else None
    async with serving(script, tmp_path) as uri:
        source = await Source.open(uri, connections=1)
        buffer = bytearray(512)
        with pytest.raises(ServerError, match="reading 512 bytes at 0 failed: Input/output error"):
            await source.read_into(0, memoryview(buffer))
        await source.read_into(0, memoryview(buffer))
        await source.close()
    assert buffer == script.content[:512]


async def test_server_that_hangs_up_fails_what_is_under_way_and_what_follows(
    tmp_path: Path, script: Script
) -> None:
    script.hangs_up = lambda number, kind: kind == READ and number > 2
    async with serving(script, tmp_path) as uri:
        source = await Source.open(uri, connections=1)
        buffers = [bytearray(512) for _ in range(8)]
        results = await asyncio.gather(
            *(source.read_into(0, memoryview(buffer)) for buffer in buffers),
            return_exceptions=True,
        )
        assert [type(result) for result in results[:3]] == [type(None)] * 3
        assert all(isinstance(result, ServerError) for result in results[3:])
        with pytest.raises(ServerError):
            await source.read_into(0, memoryview(bytearray(512)))
        await source.close()


async def test_cancelled_read_does_not_write_to_its_buffer_later(
    tmp_path: Path, script: Script
) -> None:
    async with serving(script, tmp_path) as uri:
        source = await Source.open(uri, connections=1)
        buffer = bytearray(1 << 20)
        task = asyncio.create_task(source.read_into(0, memoryview(buffer)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        before = bytes(buffer)
        await asyncio.sleep(0.05)
        assert buffer == before
        await source.close()


async def test_bitmap_that_is_none_or_not_offered_is_refused(
    tmp_path: Path, script: Script
) -> None:
    async with serving(script, tmp_path) as uri:
        assert await offered_bitmaps(uri) == ["b0"]
        with pytest.raises(UsageError, match="not a dirty bitmap"):
            await Source.open(uri, dirty_bitmap="base:allocation")
        with pytest.raises(ServerError, match="does not offer 'qemu:dirty-bitmap:x'"):
            await Source.open(uri, dirty_bitmap="qemu:dirty-bitmap:x")


async def test_server_that_is_not_there_is_an_error_with_its_uri(tmp_path: Path) -> None:
    uri = f"nbd+unix:///x?socket={tmp_path}/none"
    for opening in (Source.open(uri), offered_bitmaps(uri)):
        with pytest.raises(ServerError, match=r"none: .*No such file"):
            await opening


async def test_what_is_new_at_the_end_is_dirty() -> None:
    extents = Extents.from_pairs([(10, 0), (10, 2), (10, 1)])
    assert read_as_dirty_from(extents, 5).pairs() == [(5, 0), (5, 1), (10, 3), (10, 1)]
    assert read_as_dirty_from(extents, 0).pairs() == [(10, 1), (10, 3), (10, 1)]
    assert read_as_dirty_from(extents, 30).pairs() == extents.pairs()
    assert read_as_dirty_from(extents, 99).pairs() == extents.pairs()
