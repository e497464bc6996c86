"""A snapshot read by its share, as another process does; here both are one."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from nbdfleece.block import mapped_file, shared_codes
from nbdfleece.block.copy_before_write import CopyBeforeWrite
from nbdfleece.block.file import FileNode
from nbdfleece.block.granule_codes import COPIED
from nbdfleece.block.granule_map import Codes
from nbdfleece.block.guest import GuestNode
from nbdfleece.block.host_file import BELOW, ELSEWHERE, ZEROES, Places
from nbdfleece.block.mapped_file import MappedFile
from nbdfleece.block.shared_codes import SharedCodes, SharedCodesReader
from nbdfleece.block.shared_fleece import Share, SharedFleece
from nbdfleece.block.snapshot_access import SnapshotAccess
from nbdfleece.errors import SnapshotError
from nbdfleece.extents import Extents
from nbdfleece.testing.memory_node import MemoryNode

GRANULE = 4096
SIZE = (6 << 20) + 1000
CONTENT = random.Random(8).randbytes(SIZE)


class Keeper:
    """Tells what it is asked, and counts it."""

    def __init__(self, node: SnapshotAccess) -> None:
        self.node = node
        self.asked: list[str] = []

    async def locate(self, part: int) -> Places:
        self.asked.append("locate")
        return await self.node.locate(part)

    async def read_into(self, offset: int, view: memoryview) -> None:
        self.asked.append("read")
        await self.node.read_into(offset, view)

    async def block_status(self, offset: int, length: int, extents_max: int) -> Extents:
        self.asked.append("status")
        return await self.node.block_status(offset, length, extents_max=extents_max)


class Disk:
    """A raw disk with its guest."""

    def __init__(self, path: Path) -> None:
        self.file = FileNode.open(path, read_only=False)
        self.copies = CopyBeforeWrite(self.file, path.parent, granularity=GRANULE)
        self.guest = GuestNode(self.file, self.copies)
        self.readers: list[SharedFleece] = []

    def snapshot(self) -> SnapshotAccess:
        return SnapshotAccess(self.copies, self.copies.add_layer(), SIZE, 4096)

    async def read_by_share(self, node: SnapshotAccess) -> tuple[SharedFleece, Keeper]:
        share = await node.share()
        assert share is not None
        keeper = Keeper(node)
        file, scratch, codes = map(os.dup, share[1:4])
        reader = SharedFleece(Share(share.geometry, file, scratch, codes, None), keeper)
        self.readers.append(reader)
        return reader, keeper

    async def write(self, offset: int, data: bytes) -> None:
        await self.guest.write(offset, memoryview(data))


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Disk]:
    path = folder / "disk"
    path.write_bytes(CONTENT)
    disk = Disk(path)
    yield disk
    for reader in disk.readers:
        await reader.close()
    await disk.file.close()


async def read(node: SharedFleece, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(length))
    await node.read_into(offset, view)
    return bytes(view)


@pytest.mark.parametrize("displaced_before", [False, True])
async def test_what_is_overwritten_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, displaced_before: bool
) -> None:
    """Rule 1: the codes are looked at before the bytes are read, and after."""
    async with opened(tmp_path) as disk:
        reader, keeper = await disk.read_by_share(disk.snapshot())
        await read(reader, 0, SIZE)
        if displaced_before:
            await disk.write(GRANULE, b"1" * GRANULE)
        at_once = FileNode.read_at_once

        def overwrite_first(file: FileNode, offset: int, view: memoryview) -> bool:
            with pytest.raises(StopIteration):  # nothing has to be waited for
                disk.write(8 * GRANULE, b"2" * GRANULE).send(None)
            return at_once(file, offset, view)

        view = memoryview(bytearray(32 * GRANULE))
        with monkeypatch.context() as amid:
            amid.setattr(reader._file, "read_at_once", overwrite_first.__get__(reader._file))
            assert not reader.read_at_once(0, view)
        assert reader.read_at_once(0, view)
        assert view == CONTENT[: len(view)]
        assert keeper.asked == ["locate"]


async def test_what_is_given_up_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its copies are gone by then, and holes are no content."""
    async with opened(tmp_path) as disk:
        node = disk.snapshot()
        reader, _ = await disk.read_by_share(node)
        await read(reader, 0, SIZE)
        await disk.write(0, b"1" * GRANULE)
        pieces_at_once, pieces = FileNode.read_pieces_at_once, FileNode.read_pieces

        def give_up() -> None:
            giving_up = disk.copies.release(node._layer, 0, 65536)
            giving_up.send(None)  # up to where it waits for the copies to be freed
            giving_up.close()

        def read_at_once(file: FileNode, wanted: Sequence[tuple[int, memoryview]]) -> bool:
            give_up()
            return pieces_at_once(file, wanted)

        async def read_later(file: FileNode, wanted: Sequence[tuple[int, memoryview]]) -> None:
            give_up()
            await pieces(file, wanted)

        scratch, view = reader._scratch, memoryview(bytearray(65536))
        with monkeypatch.context() as amid:
            amid.setattr(scratch, "read_pieces_at_once", read_at_once.__get__(scratch))
            assert not reader.read_at_once(0, view)
    async with opened(tmp_path) as disk:
        node = disk.snapshot()
        reader, _ = await disk.read_by_share(node)
        await disk.write(0, b"1" * GRANULE)
        scratch = reader._scratch
        with monkeypatch.context() as amid:
            amid.setattr(scratch, "read_pieces", read_later.__get__(scratch))
            with pytest.raises(PermissionError, match="was released"):
                await reader.read_into(0, view)


async def test_what_was_displaced_before_it_was_shared_is_told(tmp_path: Path) -> None:
    """And what the guest displaces for newer snapshots while it is told does not count instead."""
    async with opened(tmp_path) as disk:
        oldest = disk.snapshot()
        place = 1000 * GRANULE  # in the second page of codes
        disk.snapshot()
        await disk.write(0, b"1" * GRANULE)
        await disk.write(place, b"1" * GRANULE)
        newest = disk.snapshot()
        sharing = asyncio.create_task(disk.read_by_share(oldest))
        await asyncio.sleep(0)
        await disk.write(place, b"2" * GRANULE)
        reader, keeper = await sharing
        assert await read(reader, 0, SIZE) == CONTENT
        newer, _ = await disk.read_by_share(newest)
        assert await read(newer, place, GRANULE) == b"1" * GRANULE
        await disk.write(place, b"3" * GRANULE)
        assert await read(newer, place, GRANULE) == b"1" * GRANULE
        assert await read(reader, place, GRANULE) == CONTENT[place : place + GRANULE]
        assert "read" not in keeper.asked


async def test_layers_that_go_leave_the_codes_of_the_others_as_they_are(tmp_path: Path) -> None:
    """A copy that only an older snapshot has needed is still its own."""
    async with opened(tmp_path) as disk:
        first, second, third = (disk.snapshot() for _ in range(3))
        reader, keeper = await disk.read_by_share(second)
        for at in range(0, SIZE - GRANULE, 3 * GRANULE):
            await disk.write(at, b"1" * GRANULE)
        for node in (third, first):
            await node.close()
            await disk.write(GRANULE, b"2" * 9 * GRANULE)
            assert await read(reader, 0, SIZE) == CONTENT
        assert "read" not in keeper.asked


async def give_up_a_range(node: SnapshotAccess, disk: Disk) -> None:
    await node.trim(0, 65536)


async def break_it(node: SnapshotAccess, disk: Disk) -> None:
    disk.copies._break([node._layer], OSError(errno.ENOSPC, "No space left on device"))


async def drop(node: SnapshotAccess, disk: Disk) -> None:
    await node.close()


@pytest.mark.parametrize("change", [give_up_a_range, break_it, drop])
async def test_a_change_that_is_not_displacing_makes_the_reader_ask(
    tmp_path: Path, change: Callable[[SnapshotAccess, Disk], Awaitable[None]]
) -> None:
    """Rules 1 and 8: what may not be read any more is refused in the keeper's words."""
    async with opened(tmp_path) as disk:
        node = disk.snapshot()
        reader, keeper = await disk.read_by_share(node)
        assert await read(reader, 0, 65536) == CONTENT[:65536]
        await change(node, disk)
        assert not reader.read_at_once(0, memoryview(bytearray(10)))
        with pytest.raises((OSError, SnapshotError)) as refused:
            await read(reader, 0, 10)
        with pytest.raises(type(refused.value)) as said:
            await node.read_into(0, memoryview(bytearray(10)))
        assert str(said.value) == str(refused.value)
        assert keeper.asked == ["locate", "read"]


async def test_snapshot_that_is_dropped_while_it_is_being_shared(tmp_path: Path) -> None:
    async with opened(tmp_path) as disk:
        node = disk.snapshot()
        for at in range(0, SIZE - GRANULE, 512 * GRANULE):
            await disk.write(at, b"1" * GRANULE)
        sharing = asyncio.create_task(node.share())
        await asyncio.sleep(0)
        await node.close()
        with pytest.raises(SnapshotError, match="dropped"):
            await sharing


async def test_what_is_not_whole_or_in_no_file_is_not_shared(tmp_path: Path) -> None:
    async with opened(tmp_path) as disk:
        layer = disk.copies.add_layer()
        once = SnapshotAccess(disk.copies, layer, SIZE, 4096, release_after_read=True)
        assert await once.share() is None
        limited = disk.snapshot()
        await limited.trim(0, 65536)
        assert await limited.share() is None
    copies = CopyBeforeWrite(MemoryNode(1 << 20), tmp_path)
    elsewhere = SnapshotAccess(copies, copies.add_layer(), 1 << 20, 4096)
    assert await elsewhere.share() is None
    with pytest.raises(OSError, match="in no file"):
        await elsewhere.locate(0)


def test_codes_take_memory_only_where_they_are_set() -> None:
    """A disk of 16 TiB has 2**32 granules."""
    codes = SharedCodes(1 << 32)
    reader = SharedCodesReader(os.dup(codes.fileno()))
    try:
        assert not reader.is_open
        codes.open()
        assert reader.is_open
        assert reader.read(1 << 31, (1 << 31) + 1000) == bytes(4000)
        codes.set_one((1 << 31) + 5, COPIED + 7)
        codes.set_one((1 << 31) + 5, COPIED + 8)
        codes.set((1 << 31) + 4, np.array([0, COPIED + 9, 3], dtype=np.uint32))
        found = np.frombuffer(reader.read((1 << 31) + 4, (1 << 31) + 7), dtype=np.uint32)
        assert found.tolist() == [0, COPIED + 7, 3]
        assert os.fstat(codes.fileno()).st_blocks * 512 <= 3 * 4096
        codes.withdraw()
        codes.open()
        assert not reader.is_open
    finally:
        codes.close()
        reader.close()


@pytest.mark.parametrize("way", ["set", "set_one", "replace"])
def test_guest_that_discards_much_makes_readers_ask(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Rule 5: its codes take memory, and no quota of copies bounds them."""
    monkeypatch.setattr(shared_codes, "FREE_CODES_MAX", 2000)
    codes = SharedCodes(1 << 20)
    copied = np.arange(5000, dtype=np.uint32) + COPIED
    free = np.full(2001, 3, dtype=np.uint32)

    def give(first: int, given: Codes) -> None:
        if way == "set_one":
            for granule, code in enumerate(given.tolist(), first):
                codes.set_one(granule, code)
        else:
            getattr(codes, way)(first, given)

    try:
        give(0, copied)
        give(7000, free[:2000])
        codes.open()
        reader = SharedCodesReader(os.dup(codes.fileno()))
        assert reader.is_open
        if way != "replace":
            give(7000, free[:2000])
        assert reader.is_open
        give(9000, free[:1])
        assert not reader.is_open
        before = os.fstat(codes.fileno()).st_blocks
        give(100_000, copied)
        assert os.fstat(codes.fileno()).st_blocks == before
        reader.close()
    finally:
        codes.close()


def test_only_machines_that_keep_stores_in_order_are_trusted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rule 1: a reader must not see the guest's bytes before the code that says so."""
    for machine, is_trusted in [("x86_64", True), ("aarch64", False), ("riscv64", False)]:
        monkeypatch.setattr(shared_codes.platform, "machine", lambda name=machine: name)
        assert shared_codes.are_seen_in_order() is is_trusted


async def test_mapped_file_reads_pieces_zeroes_and_growth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of no part is more known than fits, and a file that grows is read to its end."""
    monkeypatch.setattr(mapped_file, "CACHE_CLUSTERS", 4)
    path = tmp_path / "file"
    path.write_bytes(CONTENT[:20_000])
    file = FileNode(os.open(path, os.O_RDONLY), str(path), read_only=True, grows_elsewhere=True)
    asked: list[int] = []

    async def locate(part: int) -> Places:
        asked.append(part)
        table = {0: [8192, ZEROES], 1: [12288, 16384], 2: [ELSEWHERE, 0], 3: [20480, ZEROES]}
        return np.array(table[part], dtype=np.uint64)

    disk = MappedFile(file, 32768, 12, 13, locate, None)
    expected = CONTENT[8192:12288] + bytes(4096) + CONTENT[12288:20_000] + bytes(480)
    view = memoryview(bytearray(16384))
    assert not disk.read_at_once(0, view)
    await disk.read_into(0, view)
    assert (view, asked) == (expected, [0, 1])
    view[:] = bytes(16384)
    assert disk.read_at_once(100, view[:15_000])
    assert view[:15_000] == expected[100:15_100]
    with pytest.raises(OSError, match="not in the disk's file"):
        await disk.read_into(16384, view[:100])
    assert not disk.read_at_once(16384, view[:100])
    await disk.read_into(24576, view[:4096])
    assert view[:4096] == bytes(4096)
    with path.open("ab") as writer:
        writer.write(CONTENT[20_000:24_576])
    assert disk.read_at_once(24576, view[:4096])
    assert view[:4096] == CONTENT[20_480:24_576]
    await disk.read_into(0, view[:4096])
    assert asked == [0, 1, 2, 3, 0]
    await file.close()


async def test_mapped_file_has_the_next_part_located_while_one_is_read(tmp_path: Path) -> None:
    """For who goes from part to part; who jumps about does without, and so does the last part."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT[:4096])
    file = FileNode(os.open(path, os.O_RDONLY), str(path), read_only=True, grows_elsewhere=True)
    asked: list[int] = []
    gate = asyncio.Event()
    gate.set()

    async def locate(part: int) -> Places:
        asked.append(part)
        await gate.wait()
        if asked == [0, 1, 2]:
            raise SnapshotError("told to who reads")
        return np.array([0], dtype=np.uint64)

    async def turns() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    disk = MappedFile(file, 10 * 4096 - 5, 12, 12, locate, None)
    view = memoryview(bytearray(10))
    await disk.read_into(0, view)
    assert asked == [0]
    assert disk.read_at_once(0, view)
    assert disk.read_at_once(5, view)
    await turns()
    assert asked == [0, 1]
    assert disk.read_at_once(4096, view)
    await turns()
    assert asked == [0, 1, 2]
    assert not disk.read_at_once(2 * 4096, view)
    await disk.read_into(2 * 4096, view)
    assert asked == [0, 1, 2, 2]
    await disk.read_into(8 * 4096, view)
    assert disk.read_at_once(8 * 4096, view)
    await disk.read_into(9 * 4096, view)
    assert disk.read_at_once(9 * 4096, view)
    await turns()
    assert asked == [0, 1, 2, 2, 8, 9]
    gate.clear()
    assert disk.read_at_once(2 * 4096, view)
    await turns()
    assert asked == [0, 1, 2, 2, 8, 9, 3]
    await disk.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    await file.close()


@pytest.mark.parametrize("reach", [0, 5000, 12288, 20000])
async def test_mapped_file_reads_what_is_below_as_far_as_it_reaches(
    tmp_path: Path, reach: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT[:8192])
    file = FileNode(os.open(path, os.O_RDONLY), str(path), read_only=True, grows_elsewhere=True)
    below = MemoryNode(random.Random(3).randbytes(reach))

    async def locate(part: int) -> Places:
        return np.array([BELOW, 4096, BELOW, ZEROES], dtype=np.uint64)

    old = bytes(below.content) + bytes(20_000)
    expected = old[:4096] + CONTENT[4096:8192] + old[8192:12288] + bytes(4096)
    disk = MappedFile(file, 16384, 12, 14, locate, below)
    chance = random.Random(reach)
    for is_at_hand in (False, True):
        below.is_at_hand = lambda is_at_hand=is_at_hand: is_at_hand
        for _ in range(100):
            begin, end = sorted(chance.sample(range(16385), 2))
            view = memoryview(bytearray(b"?" * (end - begin)))
            if not is_at_hand or not disk.read_at_once(begin, view):
                assert not is_at_hand or not below.size
                await disk.read_into(begin, view)
            assert view == expected[begin:end]
    await file.close()
