"""Snapshots stay as they were, whatever the guest does and whenever it does it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import threading
from collections.abc import Awaitable
from pathlib import Path
from typing import NamedTuple

import pytest

from nbdfleece.bitmaps.bitmap import Bitmap
from nbdfleece.block import copy_before_write
from nbdfleece.block.copy_before_write import CopyBeforeWrite
from nbdfleece.block.copy_failure import CopyFailure, OnCbwError
from nbdfleece.block.granule_codes import FORGOTTEN, UNALLOCATED
from nbdfleece.block.granule_map import PAGE_GRANULES
from nbdfleece.block.guest import GuestNode
from nbdfleece.block.layer import Layer
from nbdfleece.block.node import BlockStatus, allocation_flags
from nbdfleece.block.snapshot_access import SnapshotAccess
from nbdfleece.errors import SnapshotError
from nbdfleece.testing.memory_node import MemoryNode
from tests.loop_turns import turns_of, until

KIB = 1024
CLUSTER = 64 * KIB


class Setup(NamedTuple):
    """A disk in memory under a guest node, with what makes snapshots of it."""

    disk: MemoryNode
    copies: CopyBeforeWrite
    guest: GuestNode

    def snapshot(
        self,
        access: Bitmap | None = None,
        failure: CopyFailure | None = None,
        *,
        read_once: bool = False,
    ) -> SnapshotAccess:
        layer = self.copies.add_layer(access, failure)
        return SnapshotAccess(
            self.copies, layer, self.disk.size, 4096, release_after_read=read_once
        )


def set_up(directory: Path, content: bytes | int = 1 << 20, **options: object) -> Setup:
    disk = MemoryNode(content)
    copies = CopyBeforeWrite(disk, directory, **options)  # type: ignore[arg-type]
    return Setup(disk, copies, GuestNode(disk, copies))


async def read(node: SnapshotAccess, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    await node.read_into(offset, memoryview(buffer))
    return bytes(buffer)


async def write(guest: GuestNode, offset: int, data: bytes) -> None:
    await guest.write(offset, memoryview(data))


GUARDED = CopyFailure(OnCbwError.BREAK_GUEST_WRITE)


@pytest.mark.parametrize("seed", range(30))
async def test_snapshots_and_guest_at_random_stay_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Rule 1: writers, readers, new and dropped snapshots, each pausing at every await."""
    monkeypatch.setattr(copy_before_write, "PAGES_AT_ONCE", 1)
    monkeypatch.setattr(copy_before_write, "COPY_BYTES_MAX", 16_384)
    monkeypatch.setattr(copy_before_write, "ZERO_GRANULES", 7)
    chance = random.Random(seed)
    size = chance.choice([300_001, 1 << 20, 3 << 20])
    granularity = chance.choice([512, 4096, 65536])
    setup = set_up(tmp_path, chance.randbytes(size), granularity=granularity)
    disk, guest = setup.disk, setup.guest
    for _ in range(chance.choice([0, 3])):
        hole = chance.randrange(size // 4096 * 4 // 5) * 4096
        await disk.trim(hole, min(chance.randrange(200_000), size - hole))
    loop = asyncio.get_running_loop()

    def pause(operation: str) -> asyncio.Future[None] | None:
        if chance.random() > 0.3:
            return None
        resumed = loop.create_future()
        steps = chance.randrange(8)

        def step(left: int) -> None:
            if left and not resumed.done():
                loop.call_soon(step, left - 1)
            elif not resumed.done():
                resumed.set_result(None)

        step(steps)
        return resumed

    disk.pause = pause
    disk.is_at_hand = lambda: chance.random() < 0.5

    def some_range() -> tuple[int, int]:
        offset = chance.randrange(size)
        return offset, chance.randint(1, min(size - offset, 70_000))

    async def reader(snapshot: SnapshotAccess, frozen: bytes) -> None:
        for _ in range(4):
            offset, length = some_range()
            assert await read(snapshot, offset, length) == frozen[offset : offset + length]
            buffer = bytearray(length)
            if snapshot.read_at_once(offset, memoryview(buffer)):
                assert buffer == frozen[offset : offset + length]
            extents = await snapshot.block_status(offset, length)
            assert extents.total() == length
            at = offset
            for part, status in extents.pairs():
                if status & BlockStatus.ZERO:
                    assert not any(frozen[at : at + part])
                at += part

    async def writer() -> None:
        for _ in range(5):
            offset, length = some_range()
            kind = chance.random()
            if kind < 0.5:
                await write(guest, offset, chance.randbytes(length))
            elif kind < 0.7:
                data = memoryview(chance.randbytes(min(length, 3000)))
                if not guest.write_at_once(offset, data):
                    await guest.write(offset, data)
            elif kind < 0.85:
                await guest.trim(offset, length)
            else:
                await guest.write_zeroes(offset, length)

    snapshots: list[tuple[SnapshotAccess, bytes]] = []
    for _ in range(12):
        kind = chance.random()
        dropping: list[Awaitable[None]] = []
        if kind < 0.4 and len(snapshots) < 5:
            await guest.drain()
            snapshots.append((setup.snapshot(), bytes(disk.content)))
            guest.resume()
        elif kind < 0.55 and snapshots:
            for _ in range(chance.randint(1, min(2, len(snapshots)))):
                dropped, _ = snapshots.pop(chance.randrange(len(snapshots)))
                dropping.append(dropped.close())
        readers = [reader(*each) for each in snapshots]
        await asyncio.gather(*readers, *dropping, writer(), writer())
    for snapshot, _ in snapshots:
        await snapshot.close()
    assert not setup.copies.has_layers


async def test_guest_that_zeroes_a_whole_disk_leaves_others_their_turns(tmp_path: Path) -> None:
    """Rule 5: of 4 GiB in one request each MiB of data is a turn, and holes are found together."""
    data, holes = 24 << 20, 232 << 20
    setup = set_up(tmp_path, b"x" * data + bytes(holes))
    setup.disk.holes = set(range(data // 4096, (data + holes) // 4096))
    asked = []
    setup.disk.pause = asked.append
    snapshot = setup.snapshot()
    assert await turns_of(setup.guest.write_zeroes(0, data + holes)) > data >> 20
    assert asked.count("block_status") < 40
    assert setup.copies.scratch_bytes == data
    assert len(snapshot._layer.map) == data // 4096 // PAGE_GRANULES
    await snapshot.close()


async def test_holes_outside_what_a_snapshot_keeps_are_not_remembered(tmp_path: Path) -> None:
    size = 4 << 20
    setup = set_up(tmp_path, size)
    setup.disk.holes = set(range(size // 4096))
    kept = Bitmap(size)
    kept.set_range(0, size // 2)
    snapshot = setup.snapshot(kept)
    await setup.guest.write_zeroes(0, size)
    assert set(snapshot._layer.map.codes(0, size // 8192).tolist()) == {UNALLOCATED}
    assert set(snapshot._layer.map.codes(size // 8192, size // 4096).tolist()) == {FORGOTTEN}
    await snapshot.close()


async def overwritten(
    directory: Path, pages: int, *, snapshots: int
) -> tuple[Setup, list[SnapshotAccess]]:
    """Snapshots of a disk of old bytes; since them a guest has touched each page of codes."""
    step = PAGE_GRANULES * 512
    setup = set_up(directory, b"old!" * (pages * step // 4), granularity=512)
    taken = [setup.snapshot() for _ in range(snapshots)]
    for page in range(pages):
        await write(setup.guest, page * step, b"new!")
    return setup, taken


async def broken(
    directory: Path, monkeypatch: pytest.MonkeyPatch, quota: int
) -> tuple[Setup, SnapshotAccess]:
    """A snapshot that has just broken for a quota; its thirty copies go one in a turn."""
    monkeypatch.setattr(copy_before_write, "PAGES_AT_ONCE", 1)
    setup, (snapshot,) = await overwritten(directory, 30, snapshots=1)
    assert setup.copies._scratch is not None
    setup.copies._scratch._quota = quota
    await write(setup.guest, 512, b"more")
    assert "quota" in (snapshot.error or "")
    assert setup.copies.scratch_bytes > 0
    return setup, snapshot


async def test_dropping_a_snapshot_of_much_leaves_others_their_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules 1 and 5: a guest writes on, and the older snapshot is exact in each turn."""
    monkeypatch.setattr(copy_before_write, "PAGES_AT_ONCE", 2)
    pages, step = 40, PAGE_GRANULES * 512
    setup, (older, newer) = await overwritten(tmp_path, pages, snapshots=2)
    dropping = asyncio.create_task(newer.close())
    turns = 0
    while not dropping.done():
        for page in range(pages):
            assert await read(older, page * step, 8) == b"old!old!"
        await write(setup.guest, (turns % pages) * step + 4096, b"new!")
        await asyncio.sleep(0)
        turns += 1
    assert pages // 2 <= turns <= pages
    for page in range(pages):
        assert await read(older, page * step, 8192) == b"old!" * 2048
    with pytest.raises(SnapshotError, match="dropped"):
        await read(newer, 0, 1)
    await older.close()
    assert setup.copies.scratch_bytes == 0


async def test_dropping_that_is_cancelled_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_before_write, "PAGES_AT_ONCE", 1)
    step = PAGE_GRANULES * 512
    setup = set_up(tmp_path, b"old!" * step, granularity=512)
    older, newer = setup.snapshot(), setup.snapshot()
    for page in range(4):
        await write(setup.guest, page * step, b"new!")
    dropping = asyncio.create_task(newer.close())
    await asyncio.sleep(0)
    dropping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await dropping
    assert [*setup.copies._layers] == [older._layer]
    assert await read(older, 3 * step, 4) == b"old!"
    dropping = asyncio.create_task(setup.snapshot().close())
    await older.close()
    dropping.cancel()
    await asyncio.wait([dropping])
    assert not setup.copies.has_layers
    assert setup.copies.scratch_bytes == 0


async def test_snapshots_dropped_together_leave_others_their_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 5: what a newer one hands to one that goes as well is handed on in turns, too."""
    monkeypatch.setattr(copy_before_write, "PAGES_AT_ONCE", 1)
    pages, step = 30, PAGE_GRANULES * 512
    _, (kept, middle, newest) = await overwritten(tmp_path, pages, snapshots=3)
    dropping = asyncio.gather(middle.close(), newest.close())
    moved = []
    while not dropping.done():
        before = len(kept._layer.map)
        await asyncio.sleep(0)
        moved.append(len(kept._layer.map) - before)
    assert max(moved) <= 2
    assert sum(moved) == pages
    for page in range(pages):
        assert await read(kept, page * step, 8) == b"old!old!"
    await kept.close()


@pytest.mark.parametrize("what", ["limit", "release"])
async def test_giving_up_copies_of_much_leaves_others_their_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Rule 5: a client may trim 4 GiB of a fleece; what it gave up is refused from then on."""
    monkeypatch.setattr(copy_before_write, "PAGES_AT_ONCE", 1)
    pages = 30
    setup, (snapshot,) = await overwritten(tmp_path, pages, snapshots=1)
    size = setup.disk.size
    giving_up = snapshot.trim(0, size) if what == "release" else snapshot.limit(Bitmap(size))
    in_use = []

    async def watch() -> None:
        while setup.copies.scratch_bytes:
            in_use.append(setup.copies.scratch_bytes)
            with pytest.raises(PermissionError):
                await read(snapshot, size - 512, 512)
            await asyncio.sleep(0)

    giving = asyncio.ensure_future(giving_up)
    await asyncio.sleep(0)
    await asyncio.wait_for(watch(), 20)
    await giving
    assert len(in_use) >= pages - 1
    await snapshot.close()


async def test_broken_snapshots_give_up_their_copies_in_turns_that_no_guest_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 5; and a new snapshot, taken at once, finds the room that they had."""
    setup, snapshot = await broken(tmp_path, monkeypatch, 30 * 512)
    after = setup.snapshot()
    before = bytes(setup.disk.content[:1024])
    await write(setup.guest, 0, b"next" * 256)
    assert after.error is None
    assert await read(after, 0, 1024) == before
    assert setup.copies.scratch_bytes == 1024
    await after.close()
    assert setup.copies.scratch_bytes == 0, "a broken one inherits nothing"
    await snapshot.close()


async def test_wait_for_the_room_of_broken_snapshots_is_no_longer_than_copies_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, old = await broken(tmp_path, monkeypatch, 512)
    patient = setup.snapshot()
    impatient = setup.snapshot(failure=CopyFailure(timeout_seconds=1e-9))
    await write(setup.guest, 1024, b"next")
    assert "too long" in (impatient.error or "")
    assert await read(patient, 1024, 4) == b"old!"
    for snapshot in (old, patient, impatient):
        await snapshot.close()


async def test_write_does_not_wait_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, old = await broken(tmp_path, monkeypatch, 0)
    assert setup.copies._scratch is not None
    setup.copies._scratch._quota = None
    after = setup.snapshot()
    await write(setup.guest, 1024, b"next")
    assert setup.copies._freeing
    assert await read(after, 1024, 4) == b"old!"
    await after.close()
    await old.close()


async def test_copies_that_are_given_up_do_not_go_on_waiting_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 5: each holds memory, and would take the room from those that are needed."""
    setup, old = await broken(tmp_path, monkeypatch, 512)
    guarded = setup.snapshot(failure=CopyFailure(OnCbwError.BREAK_GUEST_WRITE, 1e-9))
    for _ in range(5):
        with pytest.raises(TimeoutError):
            await write(setup.guest, 1024, b"next")
        await asyncio.sleep(0)
        assert not setup.copies._without_room
    await guarded.close()
    await old.close()


async def test_copy_waits_for_what_the_file_system_is_given_back(tmp_path: Path) -> None:
    """With no quota: a hole is punched by a thread, and there is no room before."""
    setup = set_up(tmp_path, b"old!" * CLUSTER)
    snapshot = setup.snapshot()
    await write(setup.guest, 0, b"new!" * (CLUSTER // 4))
    scratch = setup.copies._scratch
    assert scratch is not None
    punch, file_write, is_full = scratch._file.trim, scratch._file.write, True

    async def trim(offset: int, length: int) -> None:
        nonlocal is_full
        for _ in range(20):
            await asyncio.sleep(0)
        await punch(offset, length)
        is_full = False

    async def write_if_there_is_room(offset: int, data: memoryview) -> None:
        if is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        await file_write(offset, data)

    with pytest.MonkeyPatch.context() as amid:
        amid.setattr(scratch._file, "trim", trim)
        amid.setattr(scratch._file, "write", write_if_there_is_room)
        await snapshot.trim(0, CLUSTER)
        await write(setup.guest, CLUSTER, b"new!" * 2048)
    assert snapshot.error is None
    assert await read(snapshot, CLUSTER, 8192) == b"old!" * 2048
    await snapshot.close()


async def test_write_that_waits_for_room_goes_on_when_all_snapshots_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 5."""
    setup, old = await broken(tmp_path, monkeypatch, 512)
    after = setup.snapshot()
    waiting = asyncio.create_task(write(setup.guest, 1024, b"next"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not waiting.done()
    await asyncio.gather(after.close(), old.close())
    await waiting
    assert setup.disk.content[1024:1028] == b"next"
    assert not setup.copies.has_layers


async def test_busy_guest_does_not_keep_a_snapshot_from_being_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it displaces meanwhile must be moved, too: more in each turn than a turn moves."""
    monkeypatch.setattr(copy_before_write, "PAGES_AT_ONCE", 1)
    pages, step = 20, PAGE_GRANULES * 512
    setup, (older, newer) = await overwritten(tmp_path, pages, snapshots=2)
    dropping = asyncio.create_task(newer.close())
    turns = 0
    while not dropping.done():
        for page in range(pages):
            await write(setup.guest, page * step + turns % 500 * 512, b"new!")
        await asyncio.sleep(0)
        turns += 1
        assert turns < 20 * pages
    for page in range(pages):
        assert await read(older, page * step, 500 * 512) == b"old!" * (125 * 512)
    await older.close()


async def test_broken_snapshot_that_goes_gives_up_nothing_of_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 1: a scratch of its own has the same places."""
    setup, snapshot = await broken(tmp_path, monkeypatch, 0)
    dropping = asyncio.create_task(snapshot.close())
    await until(lambda: not setup.copies.has_layers)
    assert setup.copies._freeing
    after, before = setup.snapshot(), bytes(setup.disk.content[:32768])
    await write(setup.guest, 0, b"next" * 8192)
    await dropping
    await asyncio.gather(*setup.copies._freeing)
    assert await read(after, 0, 32768) == before
    assert setup.copies.scratch_bytes == 32768
    await after.close()


async def test_last_snapshot_that_is_dropped_while_a_write_copies_leaves_the_write_alone(
    tmp_path: Path,
) -> None:
    """Rule 5: what is to be copied lies in two pieces, and the first is under way."""
    setup = set_up(tmp_path, b"x" * CLUSTER)
    snapshot = setup.snapshot()
    await write(setup.guest, 4096, b"1")
    held = asyncio.get_running_loop().create_future()
    setup.disk.pause = lambda operation: held if operation == "read" else None
    writing = asyncio.create_task(write(setup.guest, 0, b"y" * 12288))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    dropping = asyncio.create_task(snapshot.close())
    await asyncio.sleep(0)
    setup.disk.pause = lambda operation: None
    held.set_result(None)
    await asyncio.gather(writing, dropping)
    assert setup.disk.content[:12288] == b"y" * 12288
    assert not setup.copies.has_layers


async def test_reader_suspended_while_guest_overwrites_gets_old_bytes(tmp_path: Path) -> None:
    """Rule 1, the race itself: the read is under way in the disk when the guest writes."""
    setup = set_up(tmp_path, b"old!" * 4096)
    snapshot = setup.snapshot()
    held = asyncio.get_running_loop().create_future()
    setup.disk.pause = lambda operation: held if operation == "read" else None
    reading = asyncio.ensure_future(read(snapshot, 0, 4096))
    await asyncio.sleep(0)
    setup.disk.pause = lambda operation: None
    await write(setup.guest, 0, b"new!" * 1024)
    held.set_result(None)
    assert await reading == b"old!" * 1024
    assert setup.disk.content[:4] == b"new!"
    await snapshot.close()


@pytest.mark.parametrize("operation", ["read", "block_status"])
async def test_busy_guest_elsewhere_does_not_keep_a_reader_waiting(
    tmp_path: Path, operation: str
) -> None:
    """Rule 5 from the reader's side: writes to other granules cost it no second look."""
    setup = set_up(tmp_path, b"old!" * (1 << 18))
    snapshot = setup.snapshot()
    entered = 0

    def pause(what: str) -> asyncio.Future[None] | None:
        """While the reader waits for the disk, the guest writes somewhere else."""
        nonlocal entered
        if what != operation:
            return None
        entered += 1
        setup.disk.pause = lambda _: None
        writing = asyncio.ensure_future(write(setup.guest, entered * 8192, b"new!"))
        writing.add_done_callback(lambda _: setattr(setup.disk, "pause", pause))
        return writing

    setup.disk.pause = pause
    if operation == "read":
        assert await asyncio.wait_for(read(snapshot, 0, 8192), 20) == b"old!" * 2048
    else:
        found = await asyncio.wait_for(snapshot.block_status(0, 8192), 20)
        assert found.total() == 8192
    assert entered == 1
    await snapshot.close()


async def test_ten_snapshots_cost_the_guest_one_copy(tmp_path: Path) -> None:
    setup = set_up(tmp_path, b"x" * (1 << 20))
    snapshots = [setup.snapshot() for _ in range(10)]
    await write(setup.guest, 5000, b"y")
    assert setup.copies.scratch_bytes == 4096
    for snapshot in snapshots:
        assert await read(snapshot, 4096, 4096) == b"x" * 4096
    for snapshot in snapshots:
        await snapshot.close()


async def test_second_write_to_a_granule_copies_nothing(tmp_path: Path) -> None:
    setup = set_up(tmp_path, b"x" * (1 << 20))
    snapshot = setup.snapshot()
    await write(setup.guest, 0, b"y" * 4096)
    reads: list[str] = []
    setup.disk.pause = reads.append  # type: ignore[assignment,return-value]
    await write(setup.guest, 0, b"z" * 4096)
    assert reads == ["write"]
    await snapshot.close()


async def test_holes_are_remembered_not_copied(tmp_path: Path) -> None:
    setup = set_up(tmp_path, 1 << 20)
    setup.disk.holes = set(range(256))
    snapshot = setup.snapshot()
    await write(setup.guest, 0, b"y" * (1 << 20))
    assert setup.copies.scratch_bytes == 0
    assert await read(snapshot, 0, 1 << 20) == bytes(1 << 20)
    extents = await snapshot.block_status(0, 1 << 20)
    assert allocation_flags(extents.status).tolist() == [BlockStatus.HOLE | BlockStatus.ZERO]
    await snapshot.close()


@pytest.mark.parametrize("dropped", range(3))
async def test_dropping_any_snapshot_leaves_the_others_exact(tmp_path: Path, dropped: int) -> None:
    setup = set_up(tmp_path, b"0" * CLUSTER)
    snapshots, frozen = [], []
    for number in b"123":
        snapshots.append(setup.snapshot())
        frozen.append(bytes(setup.disk.content))
        await write(setup.guest, 4096 * (number - 0x31), bytes([number]) * 8192)
    await snapshots.pop(dropped).close()
    frozen.pop(dropped)
    await write(setup.guest, 0, b"9" * CLUSTER)
    for snapshot, content in zip(snapshots, frozen, strict=True):
        assert await read(snapshot, 0, CLUSTER) == content
        await snapshot.close()


def files_open_in(folder: Path) -> list[str]:
    """What this process has open there, names or no names."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [name for name in found if name.startswith(f"{folder}/")]


async def test_dropping_the_last_snapshot_frees_all_scratch(tmp_path: Path) -> None:
    setup = set_up(tmp_path, b"x" * (1 << 20))
    snapshot = setup.snapshot()
    await write(setup.guest, 0, b"y" * (1 << 20))
    assert setup.copies.scratch_bytes == 1 << 20
    assert files_open_in(tmp_path)
    await snapshot.close()
    assert setup.copies.scratch_bytes == 0
    assert files_open_in(tmp_path) == []
    assert os.listdir(tmp_path) == []


async def test_scratch_is_given_up_by_a_thread_and_not_written_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 5: freeing its space may take a second; and nobody needs what is in it any more."""
    closed_by = {}
    close = os.close

    def note(fd: int) -> None:
        closed_by[fd] = threading.current_thread()
        close(fd)

    setup = set_up(tmp_path, b"x" * (1 << 20))
    snapshot = setup.snapshot()
    await write(setup.guest, 0, b"y" * (1 << 20))
    assert setup.copies._scratch is not None
    fd = setup.copies._scratch.fileno()
    monkeypatch.setattr(os, "close", note)
    monkeypatch.setattr(os, "fdatasync", lambda fd: pytest.fail("it is written to the disk"))
    await snapshot.close()
    assert closed_by[fd] is not threading.main_thread()


async def test_dropped_snapshot_refuses_reads(tmp_path: Path) -> None:
    setup = set_up(tmp_path)
    snapshot = setup.snapshot()
    await snapshot.close()
    with pytest.raises(SnapshotError, match="dropped"):
        await read(snapshot, 0, 1)


# Limiting bitmap, release


async def test_read_outside_the_limiting_bitmap_is_refused_and_not_protected(
    tmp_path: Path,
) -> None:
    setup = set_up(tmp_path, b"x" * (4 * CLUSTER))
    access = Bitmap(4 * CLUSTER, CLUSTER)
    access.set_range(CLUSTER, CLUSTER)
    snapshot = setup.snapshot(access)
    await write(setup.guest, 0, b"y" * (4 * CLUSTER))
    assert setup.copies.scratch_bytes == CLUSTER
    assert await read(snapshot, CLUSTER, CLUSTER) == b"x" * CLUSTER
    for offset in (0, CLUSTER - 1, 2 * CLUSTER):
        with pytest.raises(PermissionError) as caught:
            await read(snapshot, offset, 2)
        assert caught.value.errno == errno.EACCES
    await snapshot.close()


async def test_trim_releases_scratch_and_ends_protection(tmp_path: Path) -> None:
    setup = set_up(tmp_path, b"x" * (4 * CLUSTER))
    snapshot = setup.snapshot()
    await write(setup.guest, 0, b"y" * (2 * CLUSTER))
    await snapshot.trim(CLUSTER // 2, 3 * CLUSTER)
    assert setup.copies.scratch_bytes == CLUSTER, "whole clusters inside the range only"
    await write(setup.guest, 2 * CLUSTER, b"z" * CLUSTER)
    assert setup.copies.scratch_bytes == CLUSTER, "what was released is not copied"
    assert await read(snapshot, 0, CLUSTER) == b"x" * CLUSTER
    with pytest.raises(PermissionError):
        await read(snapshot, CLUSTER, 1)
    await snapshot.close()


async def test_trim_of_one_snapshot_keeps_what_another_needs(tmp_path: Path) -> None:
    setup = set_up(tmp_path, b"x" * (2 * CLUSTER))
    older, newer = setup.snapshot(), setup.snapshot()
    await write(setup.guest, 0, b"y" * CLUSTER)
    await newer.trim(0, 2 * CLUSTER)
    await write(setup.guest, CLUSTER, b"y" * CLUSTER)
    assert await read(older, 0, 2 * CLUSTER) == b"x" * (2 * CLUSTER)
    await older.trim(0, 2 * CLUSTER)
    assert setup.copies.scratch_bytes == 0
    await older.close()
    await newer.close()


async def test_release_after_read_frees_what_was_read(tmp_path: Path) -> None:
    setup = set_up(tmp_path, b"x" * (2 * CLUSTER))
    snapshot = setup.snapshot(read_once=True)
    await write(setup.guest, 0, b"y" * (2 * CLUSTER))
    assert await read(snapshot, 0, CLUSTER) == b"x" * CLUSTER
    assert setup.copies.scratch_bytes == CLUSTER
    with pytest.raises(PermissionError):
        await read(snapshot, 0, 1)
    await snapshot.close()


async def test_range_that_is_released_after_read_is_not_read_at_once(tmp_path: Path) -> None:
    """What was read at once may be read again."""
    setup = set_up(tmp_path, b"x" * CLUSTER)
    setup.disk.is_at_hand = lambda: True
    buffer = memoryview(bytearray(CLUSTER))
    snapshot = setup.snapshot(read_once=True)
    assert not snapshot.read_at_once(0, buffer)
    assert await read(snapshot, 0, CLUSTER) == b"x" * CLUSTER
    await snapshot.close()


async def test_read_at_once_refuses_what_a_read_refuses(tmp_path: Path) -> None:
    """Rule 1: what is not kept, broken or gone is not shown."""
    setup = set_up(tmp_path, b"x" * (2 * CLUSTER))
    setup.disk.is_at_hand = lambda: True
    buffer = memoryview(bytearray(CLUSTER))
    access = Bitmap(2 * CLUSTER, CLUSTER)
    access.set_range(0, CLUSTER)
    snapshot = setup.snapshot(access)
    assert snapshot.read_at_once(0, buffer)
    with pytest.raises(PermissionError):
        snapshot.read_at_once(CLUSTER, buffer)
    await snapshot.close()
    with pytest.raises(SnapshotError):
        snapshot.read_at_once(0, buffer)


# What breaks: rule 5


async def test_full_scratch_breaks_the_snapshot_not_the_guest(tmp_path: Path) -> None:
    broken: list[Layer] = []
    setup = set_up(tmp_path, b"x" * (4 * CLUSTER), quota=CLUSTER, on_broken=broken.append)
    snapshots = [setup.snapshot(), setup.snapshot()]
    await write(setup.guest, 0, b"y" * (4 * CLUSTER))
    assert setup.disk.content == b"y" * (4 * CLUSTER)
    assert len(broken) == 2
    for snapshot in snapshots:
        assert "quota" in (snapshot.error or "")
        with pytest.raises(SnapshotError, match="quota"):
            await read(snapshot, 3 * CLUSTER, 1)
    await asyncio.sleep(0)
    assert setup.copies.scratch_bytes == 0, "a broken snapshot's copies are worth nothing"
    await write(setup.guest, 0, b"z" * (4 * CLUSTER))
    for snapshot in snapshots:
        await snapshot.close()


async def test_failing_scratch_disk_breaks_the_snapshot_not_the_guest(tmp_path: Path) -> None:
    """Rule 5, with a file that every write to fails."""
    setup = set_up(tmp_path, b"x" * (2 * CLUSTER))
    snapshot = setup.snapshot()
    await write(setup.guest, 0, b"y" * 4096)
    assert snapshot.error is None
    scratch = setup.copies._scratch
    assert scratch is not None
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, scratch._file.fileno())
    os.close(full)
    await write(setup.guest, 4096, b"y" * 4096)
    await write(setup.guest, CLUSTER, b"y" * CLUSTER)
    assert "No space left" in (snapshot.error or "")
    assert setup.disk.content[4096:8192] == b"y" * 4096
    with pytest.raises(SnapshotError, match="No space left"):
        await read(snapshot, 0, 1)
    await snapshot.close()


async def test_only_snapshots_that_need_the_copy_break(tmp_path: Path) -> None:
    setup = set_up(tmp_path, b"x" * (2 * CLUSTER), quota=CLUSTER)
    access = Bitmap(2 * CLUSTER, CLUSTER)
    access.set_range(0, CLUSTER)
    limited, whole = setup.snapshot(access), setup.snapshot()
    await write(setup.guest, 0, b"y" * CLUSTER)
    await write(setup.guest, CLUSTER, b"y" * CLUSTER)
    assert whole.error is not None
    assert limited.error is None
    assert await read(limited, 0, CLUSTER) == b"x" * CLUSTER
    await limited.close()
    await whole.close()


async def test_break_guest_write_fails_the_write_and_keeps_the_snapshot(tmp_path: Path) -> None:
    setup = set_up(tmp_path, b"x" * CLUSTER, quota=4096, failure=GUARDED)
    snapshot = setup.snapshot()
    with pytest.raises(OSError, match="quota") as caught:
        await write(setup.guest, 0, b"y" * CLUSTER)
    assert caught.value.errno == errno.ENOSPC
    assert setup.disk.content == b"x" * CLUSTER
    assert await read(snapshot, 0, CLUSTER) == b"x" * CLUSTER
    assert setup.copies.scratch_bytes == 0
    await snapshot.close()


@pytest.mark.parametrize("operation", ["read", "block_status"])
async def test_unreadable_old_data_breaks_the_snapshot(tmp_path: Path, operation: str) -> None:
    setup = set_up(tmp_path, b"x" * CLUSTER)
    snapshot = setup.snapshot()

    def fail(name: str, offset: int) -> None:
        if name == operation:
            raise OSError(errno.EIO, "bad sector")

    setup.disk.fail = fail
    await write(setup.guest, 0, b"y" * 4096)
    assert "bad sector" in (snapshot.error or "")
    assert setup.disk.content[:1] == b"y"
    await snapshot.close()


async def test_copy_that_takes_too_long_breaks_the_snapshot_and_is_not_kept(
    tmp_path: Path,
) -> None:
    """What arrives late is older than the guest's write: a later snapshot must not get it."""
    setup = set_up(tmp_path, b"x" * CLUSTER, failure=CopyFailure(timeout_seconds=0.001))
    first = setup.snapshot()
    held = asyncio.get_running_loop().create_future()
    setup.disk.pause = lambda operation: held if operation == "read" else None
    await write(setup.guest, 0, b"y" * 4096)
    assert "too long" in (first.error or "")
    await first.close()
    second = setup.snapshot()
    held.set_result(None)
    await asyncio.sleep(0)
    setup.disk.pause = lambda operation: None
    assert await read(second, 0, 4096) == b"y" * 4096
    await write(setup.guest, 0, b"z" * 4096)
    assert await read(second, 0, 4096) == b"y" * 4096
    assert setup.copies.scratch_bytes == 4096
    await second.close()


async def test_copy_for_a_write_that_was_cancelled_is_given_back(tmp_path: Path) -> None:
    setup = set_up(tmp_path, b"x" * CLUSTER, failure=CopyFailure(timeout_seconds=600))
    snapshot = setup.snapshot()
    held = asyncio.get_running_loop().create_future()
    setup.disk.pause = lambda operation: held if operation == "read" else None
    writing = asyncio.create_task(write(setup.guest, 0, b"y" * 4096))
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    held.set_result(None)
    setup.disk.pause = lambda operation: None
    for _ in range(5):
        await asyncio.sleep(0)
    assert setup.copies.scratch_bytes == 0
    assert await read(snapshot, 0, 4096) == b"x" * 4096
    await snapshot.close()


async def test_snapshot_may_have_its_own_choice_of_what_breaks(tmp_path: Path) -> None:
    """As long as one wants the guest's write to fail, none breaks; then all that need it do."""
    setup = set_up(tmp_path, b"x" * CLUSTER, quota=4096)
    usual, guarded = setup.snapshot(), setup.snapshot(None, GUARDED)
    with pytest.raises(OSError, match="quota"):
        await write(setup.guest, 0, b"y" * CLUSTER)
    assert usual.error is None
    assert await read(usual, 0, CLUSTER) == b"x" * CLUSTER
    await guarded.close()
    await write(setup.guest, 0, b"y" * CLUSTER)
    assert "quota" in (usual.error or "")
    await usual.close()


async def test_timeout_breaks_only_the_snapshot_whose_it_is(tmp_path: Path) -> None:
    """The guest's write waits for a copy that a more patient snapshot still needs."""
    broken = asyncio.Event()
    setup = set_up(tmp_path, b"x" * CLUSTER, on_broken=lambda layer: broken.set())
    patient = setup.snapshot()
    hasty = setup.snapshot(None, CopyFailure(timeout_seconds=0.001))
    held = asyncio.get_running_loop().create_future()
    setup.disk.pause = lambda operation: held if operation == "read" else None
    writing = asyncio.ensure_future(write(setup.guest, 0, b"y" * 4096))
    await broken.wait()
    assert "too long" in (hasty.error or "")
    assert not writing.done()
    setup.disk.pause = lambda operation: None
    held.set_result(None)
    await writing
    assert await read(patient, 0, CLUSTER) == b"x" * CLUSTER
    await hasty.close()
    assert await read(patient, 0, CLUSTER) == b"x" * CLUSTER
    await patient.close()


async def test_timeout_of_one_that_guards_itself_fails_the_write(tmp_path: Path) -> None:
    setup = set_up(tmp_path, b"x" * CLUSTER)
    patient = setup.snapshot()
    strict = CopyFailure(OnCbwError.BREAK_GUEST_WRITE, 0.001)
    guarded = setup.snapshot(None, strict)
    held = asyncio.get_running_loop().create_future()
    setup.disk.pause = lambda operation: held if operation == "read" else None
    with pytest.raises(OSError, match="too long"):
        await write(setup.guest, 0, b"y" * 4096)
    setup.disk.pause = lambda operation: None
    held.set_result(None)
    for snapshot in (patient, guarded):
        assert await read(snapshot, 0, CLUSTER) == b"x" * CLUSTER
        await snapshot.close()


# What a snapshot shows


async def test_block_status_is_that_of_the_instant(tmp_path: Path) -> None:
    setup = set_up(tmp_path, b"x" * CLUSTER + bytes(CLUSTER) + b"x" * CLUSTER)
    setup.disk.holes = set(range(16, 32))
    snapshot = setup.snapshot()
    before = (await snapshot.block_status(0, 3 * CLUSTER)).pairs()
    await setup.guest.trim(0, CLUSTER)
    await write(setup.guest, CLUSTER + 8192, b"y" * 4096)
    assert (await snapshot.block_status(0, 3 * CLUSTER)).pairs() == before
    part = await snapshot.block_status(5000, 2 * CLUSTER)
    assert part.pairs() == [
        (CLUSTER - 5000, before[0][1]),
        (CLUSTER, before[1][1]),
        (5000, before[2][1]),
    ]
    await snapshot.close()


async def test_block_status_stops_at_the_maximum(tmp_path: Path) -> None:
    setup = set_up(tmp_path, b"x" * (1 << 20))
    setup.disk.holes = set(range(0, 256, 2))
    snapshot = setup.snapshot()
    await write(setup.guest, 0, b"y" * (1 << 20))
    extents = await snapshot.block_status(0, 1 << 20, extents_max=5)
    assert extents.lengths.tolist() == [4096] * 5
    await snapshot.close()


async def test_last_granule_ends_with_the_disk(tmp_path: Path) -> None:
    setup = set_up(tmp_path, b"x" * 10_001)
    snapshot = setup.snapshot()
    await write(setup.guest, 9_000, b"y" * 1_001)
    assert await read(snapshot, 0, 10_001) == b"x" * 10_001
    assert (await snapshot.block_status(0, 10_001)).total() == 10_001
    await snapshot.close()
