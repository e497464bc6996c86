"""Another size for a disk, with QEMU as the judge and taking turns."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
from pathlib import Path

import pytest

from nbdfleece.bitmaps.bitmap import Bitmap
from nbdfleece.block.file import FileNode
from nbdfleece.engine.offline import resize_disk
from nbdfleece.errors import StateError, UsageError
from nbdfleece.qcow2 import bitmap_directory
from nbdfleece.qcow2.bitmap_directory import BitmapsExtension
from nbdfleece.qcow2.bitmap_store import BitmapStore, StoredBitmap
from nbdfleece.qcow2.create import create_image
from nbdfleece.qcow2.directory_switch import NO_DIRECTORY, DirectorySwitch
from nbdfleece.qcow2.header import SIZE_FIELD
from nbdfleece.qcow2.image import Qcow2Image
from nbdfleece.qcow2.private_extension import Slot
from nbdfleece.qcow2.resize import resize_image
from nbdfleece.qcow2.written_bitmaps import WrittenBitmaps
from tests.qcow2.guest import Guest, check, qemu_content, qemu_img, qemu_io
from tests.qcow2.test_crash import CrashingDisk

MIB = 1 << 20


async def resize(path: Path, size: int) -> None:
    image = await Qcow2Image.open(path, read_only=False)
    try:
        await resize_image(image, await BitmapStore.load(image), size)
        assert image.size == size
    finally:
        await image.close()


def make_with_bitmap(folder: Path, size: int = MIB, granularity: int = 65536) -> Path:
    path = folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, str(size))
    qemu_img("bitmap", "--add", "-g", str(granularity), path, "b")
    return path


def check_kept(path: Path, size: int = MIB) -> None:
    """Look that an image of :func:`make_with_bitmap` has its size and its bitmap."""
    check(path)
    assert len(qemu_content(path)) == size
    assert bitmap_flags(path) == {"b": ["auto"]}


@pytest.mark.parametrize(
    ("cluster_size", "version", "extended_l2", "backing_size"),
    [
        (512, 3, False, 0),
        (512, 2, False, 3 * MIB + 512),
        (4096, 3, False, MIB),
        (16384, 3, True, 5 * MIB),
        (65536, 2, False, 0),
        (65536, 3, True, 0),
        (65536, 3, False, 9 * MIB),
    ],
)
async def test_random_sizes_with_qemu_taking_turns_agree(
    folder: Path, cluster_size: int, version: int, extended_l2: bool, backing_size: int
) -> None:
    path = folder / "disk.qcow2"
    rng = random.Random(cluster_size + version)
    backing: dict[str, str] = {}
    content = bytearray(2 * MIB)
    if backing_size:
        base = rng.randbytes(backing_size)
        (folder / "base.raw").write_bytes(base)
        backing = {"backing_file": "base.raw", "backing_format": "raw"}
        content = bytearray(base[: 2 * MIB].ljust(2 * MIB, b"\0"))
    await create_image(
        path,
        2 * MIB,
        cluster_size=cluster_size,
        version=version,
        extended_l2=extended_l2,
        **backing,
    )
    for turn in range(8):
        image = await Qcow2Image.open(path, read_only=False)
        guest = Guest(image, cluster_size, rng)
        guest.content = content
        for _ in range(15):
            await rng.choice([guest.write, guest.zero])(*guest.pick_range(300_000))
        size = rng.choice([0, 512, MIB, rng.randrange(6 * MIB) // 512 * 512, 20 * MIB])
        if turn % 3 < 2:
            await resize_image(image, await BitmapStore.load(image), size)
            content = content[:size].ljust(size, b"\0")
            guest.content = content
            if size:
                await guest.check_all()
        await image.close()
        check(path)
        assert qemu_content(path) == content
        if turn % 3 == 2:
            if version == 2:  # QEMU cannot grow such an image over a longer backing file
                size = min(size, len(content))
            qemu_img("resize", "-q", "--shrink", path, str(max(512, size)))
            content = bytearray(qemu_content(path))  # QEMU may show old data there
        if not content:
            await resize(path, MIB)
            content = bytearray(MIB)


@pytest.mark.parametrize("is_raw", ["off", "on"])
async def test_resize_with_a_data_file_zeroes_it_too(folder: Path, is_raw: str) -> None:
    path, data = folder / "disk.qcow2", folder / "data.raw"
    options = f"data_file={data},data_file_raw={is_raw}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(MIB))
    qemu_io(path, [f"write -P 5 0 {MIB}"])
    await resize(path, MIB // 2 + 512)
    check(path)
    assert data.stat().st_size == MIB // 2 + 512
    data.write_bytes(data.read_bytes().ljust(3 * MIB, b"\6"))  # as if that had been cut short
    await resize(path, 2 * MIB)
    check(path)
    kept = b"\5" * (MIB // 2 + 512)
    assert qemu_content(path) == kept.ljust(2 * MIB, b"\0")
    assert data.read_bytes()[: 2 * MIB] == kept.ljust(2 * MIB, b"\0")
    await resize(path, 4 * MIB)
    assert data.read_bytes() == kept.ljust(4 * MIB, b"\0")


async def test_resize_keeps_internal_snapshots(folder: Path) -> None:
    path = folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, str(MIB))
    qemu_io(path, [f"write -P 5 0 {MIB}"])
    qemu_img("snapshot", "-c", "before", path)
    await resize(path, 100 * 512)
    check(path)
    await resize(path, 3 * MIB)
    check(path)
    assert qemu_content(path) == (b"\5" * 51200).ljust(3 * MIB, b"\0")
    qemu_img("snapshot", "-a", "before", path)
    check(path)
    assert qemu_content(path)[:MIB] == b"\5" * MIB


async def test_resize_of_version_2_with_snapshots_or_past_the_limit_is_refused(
    folder: Path,
) -> None:
    path = folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10,cluster_size=512", path, str(MIB))
    qemu_img("snapshot", "-c", "before", path)
    with pytest.raises(StateError, match="version 2 cannot be resized"):
        await resize(path, 2 * MIB)
    with pytest.raises(UsageError, match="at most"):
        await resize(path, 1 << 50)


def bitmap_flags(path: Path) -> dict[str, list[str]]:
    info = json.loads(qemu_img("info", "--output=json", path))
    bitmaps = info["format-specific"]["data"].get("bitmaps", [])
    return {bitmap["name"]: bitmap["flags"] for bitmap in bitmaps}


async def test_resize_takes_bitmaps_along_and_marks_what_is_new_in_those_that_record(
    folder: Path,
) -> None:
    path = folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, str(4 * MIB))
    qemu_img("bitmap", "--add", path, "recording")
    qemu_io(path, ["write 64k 64k"])
    qemu_img("bitmap", "--add", "--disable", path, "frozen")
    qemu_img("bitmap", "--merge", "recording", path, "frozen")
    await resize(path, 40 * MIB)
    check(path)
    assert bitmap_flags(path) == {"recording": ["auto"], "frozen": []}
    image = await Qcow2Image.open(path, read_only=True)
    store = await BitmapStore.load(image)
    frozen, recording = await store.load_bits("frozen"), await store.load_bits("recording")
    assert list(frozen.dirty_ranges()) == [(65536, 65536)]
    assert list(recording.dirty_ranges()) == [(65536, 65536), (4 * MIB, 36 * MIB)]
    await image.close()
    await resize(path, 65536)
    assert bitmap_flags(path) == {"recording": ["auto"], "frozen": []}
    check(path)


async def test_resize_with_an_inconsistent_bitmap_is_refused(folder: Path) -> None:
    path = folder / "disk.qcow2"
    await create_image(path, MIB)
    image = await Qcow2Image.open(path, read_only=False)
    store = await BitmapStore.load(image)
    bitmap = Bitmap(MIB)
    await store.replace([StoredBitmap("b", 65536, True, in_use=True, content=bitmap)], None)
    await image.close()
    with pytest.raises(StateError, match="'b' is inconsistent"):
        await resize(path, 2 * MIB)
    assert bitmap_flags(path) == {"b": ["in-use", "auto"]}


async def test_same_size_changes_nothing(folder: Path) -> None:
    path = make_with_bitmap(folder)
    before = path.read_bytes()
    await resize(path, MIB)
    assert path.read_bytes() == before


async def test_bitmaps_for_which_there_is_no_room_keep_the_disk_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 6: on a full file system all is found out before anything is changed."""
    path = make_with_bitmap(folder, granularity=512)
    write, limit = FileNode.write, path.stat().st_size

    async def write_within(self: FileNode, offset: int, data: memoryview) -> None:
        if offset + len(data) > limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        await write(self, offset, data)

    monkeypatch.setattr(FileNode, "write", write_within)
    with pytest.raises(OSError, match=f"the disk still has {MIB} bytes: No space left .*{path}"):
        await resize_disk(path, 400 * MIB)
    check_kept(path)


@pytest.mark.parametrize("size", [MIB // 2, 3 * MIB])
async def test_bitmaps_that_cannot_be_put_in_force_are_told_to_be_lost(
    folder: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_with_bitmap(folder)
    stage = DirectorySwitch.stage

    async def fail(
        self: DirectorySwitch, directory: BitmapsExtension, payload: bytes | None
    ) -> Slot | None:
        if directory != NO_DIRECTORY:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return await stage(self, directory, payload)

    monkeypatch.setattr(DirectorySwitch, "stage", fail)
    with pytest.raises(OSError, match=f"has {size} bytes now, but its bitmaps .* lost: Input/"):
        await resize(path, size)
    check(path)
    assert len(qemu_content(path)) == size
    assert bitmap_flags(path) == {}


@pytest.mark.parametrize("size", [MIB // 2, 3 * MIB])
async def test_bitmaps_that_cannot_be_switched_off_stay(
    folder: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_with_bitmap(folder)

    async def fail(self: BitmapStore) -> WrittenBitmaps:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(BitmapStore, "switch_off", fail)
    with pytest.raises(OSError, match="Input/output error"):
        await resize(path, size)
    check_kept(path)


async def test_shrinking_that_fails_half_way_says_which_size_the_disk_has(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, str(MIB))

    async def fail(*arguments: object, **more: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Qcow2Image, "write_zeroes", fail)
    with pytest.raises(OSError, match=r"has 512 bytes now, but .* not all given up: Input/output"):
        await resize(path, 512)
    assert len(qemu_content(path)) == 512


async def test_growing_that_fails_leaves_size_and_bitmaps(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_with_bitmap(folder, MIB + 512)

    async def fail(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Qcow2Image, "write_zeroes", fail)
    with pytest.raises(OSError, match="No space left"):
        await resize(path, 64 << 30)
    check_kept(path, MIB + 512)


@pytest.mark.parametrize("size", [MIB // 2, 64 << 30])
async def test_size_that_cannot_be_written_is_taken_back(
    folder: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_with_bitmap(folder, granularity=512)
    write, failures = FileNode.write, [errno.EIO]

    async def fail(self: FileNode, offset: int, data: memoryview) -> None:
        await write(self, offset, data)
        if offset == SIZE_FIELD and failures:
            raise OSError(failures.pop(), "half of it was written")

    monkeypatch.setattr(FileNode, "write", fail)
    with pytest.raises(OSError, match=r"^\[Errno 5\] half of it was written$"):
        await resize(path, size)
    check_kept(path)


@pytest.mark.parametrize("size", [MIB // 2, 64 << 30])
async def test_size_that_cannot_be_made_durable_leaves_no_bitmaps_of_another_size(
    folder: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules 2, 7 and 8: once a file could not be flushed, nothing of it is certain any more."""
    path = make_with_bitmap(folder, granularity=512)
    write, datasync, is_written = FileNode.write, os.fdatasync, False

    async def write_size(self: FileNode, offset: int, data: memoryview) -> None:
        nonlocal is_written
        await write(self, offset, data)
        is_written = is_written or offset == SIZE_FIELD

    def fail(descriptor: int) -> None:
        if is_written:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        datasync(descriptor)

    monkeypatch.setattr(FileNode, "write", write_size)
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match=f"has {MIB} or {size} bytes now, and no bitmaps: Input/"):
        await resize_disk(path, size, shrink=True)
    check(path, leaks_allowed=True)
    assert len(qemu_content(path)) == MIB
    assert bitmap_flags(path) == {}


async def test_resize_that_is_interrupted_keeps_its_bitmaps(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_with_bitmap(folder)
    write = FileNode.write

    async def interrupt(self: FileNode, offset: int, data: memoryview) -> None:
        await write(self, offset, data)
        if offset == SIZE_FIELD:
            resizing.cancel()
            await asyncio.sleep(0)

    monkeypatch.setattr(FileNode, "write", interrupt)
    resizing = asyncio.create_task(resize(path, 2 * MIB))
    with pytest.raises(asyncio.CancelledError):
        await resizing
    check(path)
    assert bitmap_flags(path) == {"b": ["auto"]}


def write_size(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.seek(SIZE_FIELD)
        file.write(size.to_bytes(8, "big"))


async def test_too_long_tables_that_an_image_has_can_be_removed_one_by_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU does not write tables anew that are in use: after a kill they fit a smaller disk."""
    path = folder / "disk.qcow2"
    await create_image(path, 64 * MIB, cluster_size=512)
    write_size(path, MIB)
    image = await Qcow2Image.open(path, read_only=False)
    bits = Bitmap(MIB, 512)
    in_use = [StoredBitmap(name, 512, True, in_use=True, content=bits) for name in "abcd"]
    await (await BitmapStore.load(image)).replace(in_use, None)
    await image.close()
    write_size(path, 64 * MIB)
    monkeypatch.setattr(bitmap_directory, "TABLES_BYTES_MAX", 8 * 32)
    image = await Qcow2Image.open(path, read_only=False)
    store = await BitmapStore.load(image)
    assert [entry.name for entry in store.entries] == [*"abcd"]
    kept = [StoredBitmap(name, 512, True, in_use=True) for name in "bcd"]
    await store.replace(kept, None)
    assert [entry.name for entry in store.entries] == [*"bcd"]
    await image.close()


async def test_bitmaps_whose_tables_would_be_too_long_together_are_not_begun_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "disk.qcow2"
    await create_image(path, MIB, cluster_size=512)
    for name in "abc":
        qemu_img("bitmap", "--add", "-g", "512", path, name)
    before = path.read_bytes()
    monkeypatch.setattr(bitmap_directory, "TABLES_BYTES_MAX", 3 * 8 * 16)
    with pytest.raises(StateError, match="tables of all bitmaps would take more than 384 bytes"):
        await resize(path, 33 * MIB)
    assert path.read_bytes() == before
    await resize(path, 32 * MIB)
    assert bitmap_flags(path) == {name: ["auto"] for name in "abc"}
    image = await Qcow2Image.open(path, read_only=False)
    store = await BitmapStore.load(image)
    assert not store.damaged
    more = [StoredBitmap(name, 512, True, False, Bitmap(32 * MIB, 512)) for name in "abcd"]
    with pytest.raises(StateError, match="tables of all bitmaps"):
        await store.replace(more, None)
    await image.close()


@pytest.mark.parametrize("sizes", [(MIB // 2, 3 * MIB), (3 * MIB, MIB // 2)])
async def test_power_cut_inside_a_resize_leaves_the_old_size_or_the_new(
    folder: Path, sizes: tuple[int, int]
) -> None:
    path = folder / "disk.qcow2"
    start, end = sizes
    await create_image(path, start, cluster_size=512, refcount_bits=64)
    rng = random.Random(start)
    image = await Qcow2Image.open(path, read_only=False)
    data = rng.randbytes(start)
    await image.write(0, memoryview(data))
    frozen, recording = Bitmap(start, 512), Bitmap(start, 512)
    frozen.set_range(0, MIB // 4)
    recording.set_range(512, 512)
    stored = [
        StoredBitmap("frozen", 512, False, in_use=False, content=frozen),
        StoredBitmap("recording", 512, True, in_use=False, content=recording),
    ]
    await (await BitmapStore.load(image)).replace(stored, b"record")
    await image.close()
    grown = [(start, end - start)] if end > start else []
    bitmaps_seen = []
    disk = CrashingDisk(path.read_bytes())
    image = await Qcow2Image.from_file(disk)
    crashed = folder / "crashed.qcow2"

    async def question() -> None:
        if rng.random() > 0.2:
            return
        state = disk.log.crash(len(disk.log.records), rng)
        crashed.write_bytes(state.content)
        check(crashed, leaks_allowed=True)
        seen = qemu_content(crashed)
        assert len(seen) in sizes
        assert seen[: min(sizes)] == data[: min(sizes)]
        assert not any(seen[start:])
        image = await Qcow2Image.open(crashed, read_only=True)
        store = await BitmapStore.load(image)
        assert not store.damaged
        dirty = {
            each.name: list((await store.load_bits(each.name)).dirty_ranges())
            for each in store.entries
        }
        added = grown if len(seen) == end else []
        if dirty:
            assert dirty == {"frozen": [(0, MIB // 4)], "recording": [(512, 512), *added]}
            assert store.record is not None
            assert store.record.payload == b"record"
        bitmaps_seen.append(bool(dirty))
        await image.close()

    disk.question = question  # type: ignore[method-assign]  # the test's own hook
    await resize_image(image, await BitmapStore.load(image), end)
    await image.close()
    crashed.write_bytes(disk.content)
    check(crashed)
    assert qemu_content(crashed) == data[:end].ljust(end, b"\0")
    assert bitmaps_seen[0]
    assert bitmaps_seen.count(True) > bitmaps_seen.count(False)
