"""Recording bitmaps miss nothing between opening an image and closing it, and QEMU reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdfleece.errors import StateError
from nbdfleece.qcow2.bitmap_directory import DamagedEntry
from nbdfleece.qcow2.bitmap_store import BitmapStore
from nbdfleece.qcow2.image import Qcow2Image
from nbdfleece.qcow2.recording import Recording
from tests.qcow2.bitmap_image import create, listed_bitmaps, qemu_dirty_ranges, qemu_img
from tests.qcow2.stored_bitmaps import MIB, check_clean


@pytest.fixture
def path(folder: Path) -> Path:
    path = create(folder / "disk.qcow2", size=10 * MIB)
    qemu_img("bitmap", "--add", path, "records")
    qemu_img("bitmap", "--add", "--disable", path, "frozen")
    return path


async def begin(path: Path) -> tuple[Qcow2Image, Recording]:
    image = await Qcow2Image.open(path, read_only=False)
    return image, await Recording.begin(image, await BitmapStore.load(image))


def flags(path: Path) -> dict[str, set[str]]:
    return {name: flags for name, (_, flags) in listed_bitmaps(path).items()}


async def test_changes_recorded_while_open_are_what_qemu_reads(path: Path) -> None:
    image, recording = await begin(path)
    assert list(recording.bitmaps) == ["records"]
    recording.bitmaps["records"].set_range(3 * MIB, 1)
    await recording.end()
    await image.close()
    assert flags(path) == {"records": {"auto"}, "frozen": set()}
    assert qemu_dirty_ranges(path, "records") == [(3 * MIB, 65536)]
    assert qemu_dirty_ranges(path, "frozen") == []
    check_clean(path)


async def test_bitmap_recorded_into_is_in_use_until_the_end(path: Path) -> None:
    image, _ = await begin(path)
    await image.close()  # as by a crash: what was recorded is not stored
    assert flags(path) == {"records": {"auto", "in-use"}, "frozen": set()}


async def test_inconsistent_bitmap_stays_so_and_records_nothing(path: Path) -> None:
    image, _ = await begin(path)
    await image.close()
    qemu_img("bitmap", "--add", path, "fresh")
    image, recording = await begin(path)
    assert list(recording.bitmaps) == ["fresh"]
    await recording.end()
    await image.close()
    assert flags(path) == {"records": {"auto", "in-use"}, "frozen": set(), "fresh": {"auto"}}


async def test_damaged_directory_is_refused_before_anything_is_written(path: Path) -> None:
    image = await Qcow2Image.open(path, read_only=False)
    store = await BitmapStore.load(image)
    store.damaged.append(DamagedEntry(0, "records", "its table is outside the file"))
    before = path.read_bytes()
    with pytest.raises(StateError, match="its table is outside the file"):
        await Recording.begin(image, store)
    await image.close()
    assert path.read_bytes() == before


async def test_image_without_bitmaps_is_left_as_it_is(folder: Path) -> None:
    path = create(folder / "plain.qcow2")
    before = path.read_bytes()
    image, recording = await begin(path)
    await recording.end()
    await image.close()
    assert recording.bitmaps == {}
    assert path.read_bytes() == before
