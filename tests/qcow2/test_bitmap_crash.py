"""Power cuts and failing disks leave the old bitmaps and record or the new (rules 4 and 6)."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nbdfleece.bitmaps.bitmap import Bitmap
from nbdfleece.errors import StateError
from nbdfleece.qcow2.bitmap_store import BitmapStore, StoredBitmap
from nbdfleece.qcow2.extension_area import scan_extension_area
from nbdfleece.qcow2.image import Qcow2Image
from tests.qcow2.bitmap_image import (
    RecordingFile,
    SimpleImage,
    check_image,
    crash_states,
    create,
    durable_content,
    listed_bitmaps,
    qemu_img,
)
from tests.qcow2.fake_disk import FakeDisk
from tests.qcow2.stored_bitmaps import (
    BITMAPS_EXTENSION,
    MIB,
    NEW_BITS,
    check_clean,
    frozen,
    load_from,
    marked,
    qemu_io,
    recording,
    store_in,
)


@pytest.fixture
def path(folder: Path) -> Path:
    return create(folder / "disk.qcow2")


State = tuple[dict[str, tuple[bool, Bitmap]], tuple[bytes, bool] | None]


async def state_of(image: SimpleImage) -> State:
    store = await BitmapStore.load(image)
    assert store.damaged == []
    bitmaps = {
        entry.name: (entry.recording, await store.load_bits(entry.name)) for entry in store.entries
    }
    return bitmaps, store.record


def start_fresh(path: Path) -> None:
    """An image that has never had bitmaps."""


def start_with_backing_file(path: Path) -> None:
    base = create(path.with_name("base.qcow2"))
    qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", path)


def start_with_qemus(path: Path) -> None:
    qemu_img("bitmap", "--add", path, "a")
    qemu_img("bitmap", "--add", path, "qemu")


def start_straddling(path: Path) -> None:
    start_with_qemus(path)
    content = bytearray(path.read_bytes())
    area = scan_extension_area(bytes(content[: 1 << 16]), "")
    filler = struct.pack(">II", 0x12345678, 488) + bytes(488)
    content[112 + len(filler) : area.end + len(filler)] = content[112 : area.end]
    content[112 : 112 + len(filler)] = filler
    path.write_bytes(content)
    area = scan_extension_area(bytes(content[: 1 << 16]), "")
    assert area.find(BITMAPS_EXTENSION)[0].straddles_sectors


def start_with_ours(path: Path) -> None:
    bits = marked(10 * MIB, 65536, seed=20)
    asyncio.run(store_in(path, [frozen("a", bits), recording("b", bits)], b"first" * 300))
    asyncio.run(store_in(path, [frozen("a", bits), recording("b", bits)], b"second" * 300))


def start_with_ours_touched_by_qemu(path: Path) -> None:
    bits = marked(10 * MIB, 65536, seed=20)
    asyncio.run(store_in(path, [frozen("a", bits)], b"first" * 300))
    asyncio.run(store_in(path, [frozen("a", bits)], b"second" * 300))
    qemu_io(path, "write 0 64k")


def start_with_all_dropped(path: Path) -> None:
    start_with_ours(path)
    asyncio.run(store_in(path, [], b"third" * 300))


STARTS = [
    start_fresh,
    start_with_backing_file,
    start_with_qemus,
    start_straddling,
    start_with_ours,
    start_with_ours_touched_by_qemu,
    start_with_all_dropped,
]

ENDS: dict[str, list[StoredBitmap]] = {
    "two": [frozen("a", NEW_BITS), recording("new", NEW_BITS, in_use=False)],
    "none": [],
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("payload", [None, b"payload" * 300], ids=["keep", "record"])
@pytest.mark.parametrize("start", STARTS)
def test_power_cut_during_replace_leaves_old_or_new(
    path: Path, start: Callable[[Path], None], payload: bytes | None, end: str
) -> None:
    start(path)
    asyncio.run(cut_power(path, payload, ENDS[end]))


async def cut_power(path: Path, payload: bytes | None, entries: list[StoredBitmap]) -> None:
    content = path.read_bytes()
    old = await state_of(SimpleImage.from_bytes(content))
    image = SimpleImage.from_bytes(content)
    store = await BitmapStore.load(image)
    await store.replace(entries, payload)
    durable = SimpleImage.from_bytes(durable_content(content, image.file.log))
    new = await state_of(durable)
    assert {entry.name for entry in entries} == set(new[0])
    assert new[1] == (old[1] if payload is None else (payload, True))
    await image.flush()

    for number, state in enumerate(crash_states(content, image.file.log, seed=1)):
        opened = SimpleImage.from_bytes(state)
        assert opened.header.backing_file == image.header.backing_file
        crashed = await state_of(opened)
        assert crashed in (old, new), f"state {number}"
        if number % 8 == 0:
            path.write_bytes(state)
            check_image(path)
            assert set(listed_bitmaps(path)) == set(crashed[0])


def test_power_cut_and_then_qemu_never_pairs_a_record_with_the_other_directory(
    path: Path,
) -> None:
    start_with_ours(path)
    asyncio.run(cut_power_then_run_qemu(path))


async def cut_power_then_run_qemu(path: Path) -> None:
    content = path.read_bytes()
    old = await state_of(SimpleImage.from_bytes(content))
    image = SimpleImage.from_bytes(content)
    store = await BitmapStore.load(image)
    await store.replace(ENDS["two"], b"payload" * 300)
    await image.flush()
    records = {"b": old[1], "new": (b"payload" * 300, True)}
    found = []
    for state in crash_states(content, image.file.log, seed=3):
        path.write_bytes(state)
        qemu_io(path, "write 0 4k")
        store, _ = await load_from(path)
        (recording_name,) = {entry.name for entry in store.entries} & {"b", "new"}
        expected = records[recording_name]
        assert expected is not None
        assert store.record in (None, (expected[0], False))
        found.append(store.record)
    assert found[0] == (b"second" * 300, False)
    assert found[-1] == (b"payload" * 300, False)


def test_image_is_usable_after_any_power_cut(path: Path) -> None:
    start_with_ours_touched_by_qemu(path)
    asyncio.run(use_after_power_cut(path))


async def use_after_power_cut(path: Path) -> None:
    content = path.read_bytes()
    image = SimpleImage.from_bytes(content)
    await (await BitmapStore.load(image)).replace(ENDS["two"], b"payload")
    for number, state in enumerate(crash_states(content, image.file.log, seed=2)):
        again = SimpleImage.from_bytes(state)
        await (await BitmapStore.load(again)).replace(ENDS["two"], b"later")
        bitmaps, record = await state_of(SimpleImage.from_bytes(bytes(again.file.content)))
        assert set(bitmaps) == {"a", "new"}
        assert record == (b"later", True)
        if number % 10 == 0:
            path.write_bytes(again.file.content)
            check_image(path)


@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_power_cut_while_the_guest_writes_leaves_old_or_new(
    folder: Path, cluster_size: int
) -> None:
    """The real driver: its refcounts, its quarantine, its flushes at any moment."""
    path = create(folder / "disk.qcow2", 2 * MIB, cluster_size=cluster_size)
    asyncio.run(cut_power_under_load(path, random.Random(cluster_size)))


async def cut_power_under_load(path: Path, rng: random.Random) -> None:
    disk = FakeDisk(path.read_bytes(), rng=rng)
    image = await Qcow2Image.from_file(disk)
    store = await BitmapStore.load(image)
    history: list[State] = [({}, None)]
    spans: list[tuple[int, int]] = []
    for turn in range(12):
        contents = {
            f"b{index}": marked(2 * MIB, 512, seed=rng.random()) for index in range(turn % 4)
        }
        payload = b"%d" % turn * rng.randrange(1, 30)
        begin = len(disk.log.records)
        stored = store.replace([frozen(name, bits) for name, bits in contents.items()], payload)
        history.append(({name: (False, bits) for name, bits in contents.items()}, (payload, True)))
        _, end = await asyncio.gather(guest_writes(image, rng), end_of(stored, disk))
        spans.append((begin, end))
    await image.close()
    for number in range(200):
        point = rng.randrange(len(disk.log.records) + 1)
        state = disk.log.crash(point, rng if number % 4 else None)
        done = sum(end <= point for _, end in spans)
        begun = sum(begin <= point for begin, _ in spans)
        assert await state_of(SimpleImage.from_bytes(state.content)) in history[done : begun + 1]
        if number % 10 == 0:
            path.write_bytes(state.content)
            check_image(path)


async def guest_writes(image: Qcow2Image, rng: random.Random) -> None:
    for _ in range(10):
        offset = rng.randrange(image.size // 512 - 64) * 512
        length = 512 * rng.randrange(1, 64)
        if rng.random() < 0.3:
            await image.trim(offset, length)
        else:
            await image.write(offset, memoryview(rng.randbytes(length)))
        if rng.random() < 0.2:
            await image.flush()


async def end_of(work: Awaitable[None], disk: FakeDisk) -> int:
    """Wait for ``work``; returns how much had reached the disk then."""
    await work
    return len(disk.log.records)


@pytest.mark.parametrize("start", [start_fresh, start_with_ours, start_with_all_dropped])
def test_failing_disk_leaves_old_or_new_and_what_is_freed_is_not_lost(
    path: Path, start: Callable[[Path], None]
) -> None:
    start(path)
    asyncio.run(fail_everywhere(path))


async def fail_everywhere(path: Path) -> None:
    """Every write and flush of a replace fails in turn, once and for good."""
    content = path.read_bytes()
    old = await state_of(SimpleImage.from_bytes(content))
    number = 0
    failed = True
    while failed:
        image = SimpleImage.from_bytes(content)
        store = await BitmapStore.load(image)
        image.file.fail_at = number
        try:
            await store.replace(ENDS["two"], b"payload")
            failed = False
        except OSError:
            image.file.fail_at = None
            bitmaps, _ = await state_of(SimpleImage.from_bytes(bytes(image.file.content)))
            assert set(bitmaps) in ({"a", "new"}, set(old[0]))
        number += 1
    assert number > 5


async def test_failing_disk_under_the_real_driver_leaves_old_or_new(path: Path) -> None:
    """Rule 6: whatever operation fails, and with it all that follow."""
    await store_in(path, [frozen("a", NEW_BITS)], b"first")
    content = path.read_bytes()
    old = await state_of(SimpleImage.from_bytes(content))
    new = ({"a": (False, NEW_BITS), "new": (True, NEW_BITS)}, (b"second", True))
    outcomes = set()
    for fail_after in range(40):
        disk = FakeDisk(content)
        image = await Qcow2Image.from_file(disk)
        store = await BitmapStore.load(image)
        disk.fail_after = fail_after
        try:
            await store.replace(ENDS["two"], b"second")
            outcomes.add("done")
            assert await state_of(SimpleImage.from_bytes(bytes(disk.content))) == new
        except OSError:
            outcomes.add("failed")
            assert await state_of(SimpleImage.from_bytes(bytes(disk.content))) in (old, new)
            assert [entry.name for entry in store.entries] == ["a"]
        path.write_bytes(disk.content)
        check_image(path)
    assert outcomes == {"done", "failed"}


async def test_switch_that_fails_and_is_taken_back_changes_nothing(path: Path) -> None:
    await store_in(path, [frozen("a", NEW_BITS)], b"first")
    image = SimpleImage.from_bytes(path.read_bytes())
    store = await BitmapStore.load(image)
    old = await state_of(SimpleImage.from_bytes(bytes(image.file.content)))
    fail_flush_once_after(image.file, switches=1)
    with pytest.raises(OSError, match="Input/output error"):
        await store.replace(ENDS["two"], b"second")
    assert await state_of(SimpleImage.from_bytes(bytes(image.file.content))) == old
    assert [entry.name for entry in store.entries] == ["a"]
    await store.replace(ENDS["two"], b"third")
    await image.flush()
    path.write_bytes(image.file.content)
    check_clean(path)
    assert (await load_from(path))[0].record == (b"third", True)


def fail_flush_once_after(file: RecordingFile, switches: int) -> None:
    """The flush that follows a write of the bitmaps extension's 24 bytes fails, once."""
    flush = file.flush
    left = switches

    async def failing() -> None:
        nonlocal left
        last = file.log[-1] if file.log else None
        if left and last is not None and len(last[1]) == 24:
            left -= 1
            raise OSError(5, "Input/output error", file.path)
        await flush()

    file.flush = failing  # type: ignore[method-assign]  # a fault of this one file


async def test_switch_that_cannot_be_taken_back_stops_further_changes(path: Path) -> None:
    await store_in(path, [frozen("a", NEW_BITS)], b"first")
    image = SimpleImage.from_bytes(path.read_bytes())
    store = await BitmapStore.load(image)
    fail_flush_once_after(image.file, switches=2)
    with pytest.raises(OSError, match="Input/output error"):
        await store.replace(ENDS["two"], b"second")
    assert image.quarantined == []
    with pytest.raises(StateError, match="open it again"):
        await store.replace(ENDS["two"], b"third")


async def test_cancelled_replace_goes_on_to_its_end(path: Path) -> None:
    image = await Qcow2Image.open(path, read_only=False)
    store = await BitmapStore.load(image)
    task = asyncio.create_task(store.replace([frozen("a", NEW_BITS)], b"record"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [entry.name for entry in store.entries] == ["a"]
    await image.close()
    check_clean(path)
    assert (await load_from(path))[0].record == (b"record", True)
