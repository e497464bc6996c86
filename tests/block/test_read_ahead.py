from __future__ import annotations

import asyncio
import os
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from nbdfleece.block import file as file_module
from nbdfleece.block.file import FileNode
from nbdfleece.block.read_ahead import AHEAD_BYTES, STREAMS_MAX, ReadAhead, will_need

KIB, MIB = 1 << 10, 1 << 20
READ = 256 * KIB


class Disk:
    """What was asked of it, and a stream that asks."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.futures: list[asyncio.Future[None]] = []
        self.is_slow = False
        self.ahead = ReadAhead(self._ask)

    def _ask(self, begin: int, end: int) -> asyncio.Future[None]:
        self.asked.append((begin, end))
        self.futures.append(asyncio.get_running_loop().create_future())
        if not self.is_slow:
            self.futures[-1].set_result(None)
        return self.futures[-1]

    async def read(self, offset: int, length: int = READ, *, is_cold: bool = False) -> None:
        self.ahead.follow(offset, offset + length)
        if is_cold:
            self.ahead.begin(offset, offset + length)
        await asyncio.sleep(0)


async def test_stream_is_asked_for_without_gaps_and_no_further_than_it_has_come() -> None:
    disk = Disk()
    await disk.read(0, is_cold=True)
    assert not disk.asked
    for at in range(READ, 64 * MIB, READ):
        await disk.read(at)
        begin, end = disk.asked[-1]
        # Each part begins where the last one ended, or where the stream is.
        assert begin == (disk.asked[-2][1] if len(disk.asked) > 1 else at + READ)
        ahead = min(AHEAD_BYTES, at + READ)
        assert ahead - ahead // 4 < end - (at + READ) <= ahead
    assert len(disk.asked) < 64 * MIB // (AHEAD_BYTES // 4) + 20


async def test_warm_streams_and_scattered_reads_ask_for_nothing() -> None:
    disk = Disk()
    for at in range(0, 4 * MIB, READ):
        await disk.read(at)
    for at in range(8 * MIB, 64 * MIB, 2 * READ):
        await disk.read(at, is_cold=True)
    assert not disk.asked


async def test_streams_beside_one_another_are_followed_each() -> None:
    disk = Disk()
    places = [place * 64 * MIB for place in range(STREAMS_MAX)]
    for place in places:
        await disk.read(place, is_cold=True)
    for place in places:
        await disk.read(place + READ)
    assert disk.asked == [(place + 2 * READ, place + 4 * READ) for place in places]


async def test_stream_that_was_silent_longest_is_forgotten_for_a_new_one() -> None:
    disk = Disk()
    for place in range(100):
        await disk.read(place * 64 * MIB, is_cold=True)
    assert len(disk.ahead.streams) == STREAMS_MAX
    await disk.read(READ)
    assert not disk.asked
    await disk.read(99 * 64 * MIB + READ)
    assert len(disk.asked) == 1


async def test_one_thing_is_asked_at_a_time_and_what_was_put_off_is_made_good() -> None:
    disk = Disk()
    disk.is_slow = True
    await disk.read(0, is_cold=True)
    for at in range(READ, AHEAD_BYTES, READ):
        await disk.read(at)
    assert disk.asked == [(2 * READ, 4 * READ)]
    assert disk.ahead.asking is disk.futures[0]
    disk.futures[0].set_result(None)
    await asyncio.sleep(0)
    await disk.read(AHEAD_BYTES)
    assert disk.asked[1:] == [(AHEAD_BYTES + READ, 2 * AHEAD_BYTES + READ)]


async def test_cold_stream_is_read_ahead_and_reads_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.raw"
    content = os.urandom(4 * MIB)
    path.write_bytes(content)
    node = FileNode.open(path, read_only=True)
    asked: list[tuple[int, int]] = []

    def note(fd: int, begin: int, end: int) -> None:
        asked.append((begin, end))
        will_need(fd, begin, end)

    monkeypatch.setattr(file_module, "will_need", note)
    monkeypatch.setattr(node, "read_cached", lambda offset, view: 0)  # all of it is cold
    buffer = bytearray(READ)
    found = b""
    for at in range(0, 4 * MIB, READ):
        await node.read_into(at, memoryview(buffer))
        found += buffer
    await node.close()
    assert found == content
    assert asked[0][0] == 2 * READ
    assert all(a[1] <= b[0] for a, b in pairwise(asked))


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_file_is_not_closed_while_a_thread_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cancelled: bool
) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4 * MIB))
    node = FileNode.open(path, read_only=False)
    fd = node.fileno()
    begun, may_end = threading.Event(), threading.Event()
    seen: list[bool] = []

    def slow(fd: int, begin: int, end: int) -> None:
        begun.set()
        assert may_end.wait(60)
        os.fstat(fd)
        seen.append(True)

    monkeypatch.setattr(file_module, "will_need", slow)
    monkeypatch.setattr(node, "read_cached", lambda offset, view: 0)
    for at in (0, READ):
        await node.read_into(at, memoryview(bytearray(READ)))
    assert await asyncio.to_thread(begun.wait, 60)
    closing = asyncio.create_task(node.close())
    await asyncio.sleep(0)
    if is_cancelled:
        closing.cancel()
        await asyncio.sleep(0)
    os.fstat(fd)
    assert not closing.done()
    may_end.set()
    await asyncio.wait([closing], timeout=60)
    assert closing.cancelled() == is_cancelled
    assert seen == [True]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_hint_that_cannot_be_given_is_no_error() -> None:
    reader, writer = os.pipe()
    will_need(reader, 0, READ)
    for fd in (reader, writer):
        os.close(fd)
