"""Damaged directories: what is bad is named, what is good is kept, nothing runs wild."""

from __future__ import annotations

import random
import struct
import subprocess
from pathlib import Path

import pytest

from nbdfleece.errors import ImageError, StateError
from nbdfleece.qcow2.bitmap_store import BitmapStore
from nbdfleece.qcow2.extension_area import scan_extension_area
from nbdfleece.qcow2.image import Qcow2Image
from nbdfleece.qcow2.private_extension import EXTENSION_MAGIC
from tests.qcow2.bitmap_image import SimpleImage, check_image, create, listed_bitmaps, qemu_img
from tests.qcow2.stored_bitmaps import (
    BITMAPS_EXTENSION,
    MIB,
    NEW_BITS,
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


def damage(path: Path, position: int, value: bytes) -> None:
    """Change bytes of the directory of an image."""
    content = bytearray(path.read_bytes())
    (place,) = scan_extension_area(bytes(content[: 1 << 16]), "").find(BITMAPS_EXTENSION)
    (directory,) = struct.unpack_from(">Q", content, place.offset + 16)
    content[directory + position : directory + position + len(value)] = value
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (12, struct.pack(">I", 4)),
        (17, b"\x05"),
        (18, struct.pack(">H", 0)),
        (20, struct.pack(">I", 8)),
        (8, struct.pack(">I", 2)),
        (0, struct.pack(">Q", 513)),
        (16, b"\7"),
    ],
)
async def test_image_that_qemu_refuses_is_repaired_without_it(
    path: Path, position: int, value: bytes
) -> None:
    contents = {name: marked(10 * MIB, 65536, seed=30 + len(name)) for name in ("a", "bb", "ccc")}
    await store_in(path, [frozen(name, bits) for name, bits in contents.items()], b"record")
    damage(path, 32 + position, value)
    assert qemu_img("info", path, check=False).returncode != 0

    image = await Qcow2Image.open(path, read_only=False)
    store = await BitmapStore.load(image)
    assert store.damaged
    with pytest.raises(StateError, match="repair it first"):
        await store.replace([], None)
    report = await store.repair()
    await image.close()
    names = {entry.name for entry in report.kept}
    assert "a" in names
    assert "bb" not in names
    assert report.dropped
    assert store.damaged == []
    check_image(path)
    assert set(listed_bitmaps(path)) == names
    store, bits = await load_from(path)
    assert store.record == (b"record", True)
    assert bits == {name: contents[name] for name in names}


async def test_whatever_qemu_refuses_is_seen_as_damage_and_can_be_repaired(path: Path) -> None:
    bits = marked(10 * MIB, 65536, seed=33)
    await store_in(path, [frozen("a", bits), recording("b", bits, in_use=False)], b"record")
    pristine = path.read_bytes()
    (place,) = scan_extension_area(pristine[: 1 << 16], "").find(BITMAPS_EXTENSION)
    (directory,) = struct.unpack_from(">Q", pristine, place.offset + 16)
    (table,) = struct.unpack_from(">Q", pristine, directory)
    targets = [*range(place.offset, place.offset + 24), *range(directory, directory + 64)]
    targets += range(table, table + 8)
    refused = 0
    for position in targets[::2] + targets[1::6]:
        content = bytearray(pristine)
        content[position] ^= 0x81
        path.write_bytes(content)
        if qemu_opens(path):
            continue
        refused += 1
        image = await Qcow2Image.open(path, read_only=False)
        report = await (await BitmapStore.load(image)).repair()
        await image.close()
        assert report.dropped, position
        assert qemu_opens(path), position
        assert set(listed_bitmaps(path)) == {entry.name for entry in report.kept}
        check_image(path)
    assert refused > 30


def qemu_opens(path: Path) -> bool:
    """Whether QEMU opens the image and loads its bitmaps."""
    command = ["qemu-io", "-r", "-f", "qcow2", "-c", "length", str(path)]
    return subprocess.run(command, capture_output=True, timeout=120).returncode == 0


async def test_directory_past_the_end_of_the_file_is_dropped_by_repair(path: Path) -> None:
    await store_in(path, [frozen("a", NEW_BITS)], b"record")
    content = bytearray(path.read_bytes())
    (place,) = scan_extension_area(bytes(content[: 1 << 16]), "").find(BITMAPS_EXTENSION)
    struct.pack_into(">Q", content, place.offset + 16, 1 << 40)
    path.write_bytes(content)
    image = await Qcow2Image.open(path, read_only=False)
    report = await (await BitmapStore.load(image)).repair()
    await image.close()
    assert report.kept == []
    assert "past the end" in report.dropped[0].reason
    assert listed_bitmaps(path) == {}
    check_image(path)


async def test_sound_directory_is_not_touched_by_repair(path: Path) -> None:
    await store_in(path, [frozen("a", NEW_BITS)], b"record")
    before = path.read_bytes()
    image = await Qcow2Image.open(path, read_only=False)
    report = await (await BitmapStore.load(image)).repair()
    assert [entry.name for entry in report.kept] == ["a"]
    assert report.dropped == []
    await image.file.close()
    assert path.read_bytes() == before


async def test_bitmaps_that_share_a_cluster_are_damaged(path: Path) -> None:
    bits = marked(10 * MIB, 65536, seed=31)
    await store_in(path, [frozen("a", bits), frozen("b", bits), frozen("c", bits)], None)
    content = path.read_bytes()
    (place,) = scan_extension_area(content[: 1 << 16], "").find(BITMAPS_EXTENSION)
    (directory,) = struct.unpack_from(">Q", content, place.offset + 16)
    damage(path, 32, content[directory : directory + 8])
    store, _ = await load_from(path)
    assert [entry.name for entry in store.entries] == ["c"]
    assert {item.name for item in store.damaged} == {"a", "b"}


async def test_bitmap_that_points_to_the_refcount_table_is_damaged(path: Path) -> None:
    await store_in(path, [frozen("a", NEW_BITS), frozen("b", NEW_BITS)], None)
    content = bytearray(path.read_bytes())
    (place,) = scan_extension_area(bytes(content[: 1 << 16]), "").find(BITMAPS_EXTENSION)
    (directory,) = struct.unpack_from(">Q", content, place.offset + 16)
    (table,) = struct.unpack_from(">Q", content, directory)
    content[table : table + 8] = content[48:56]
    path.write_bytes(content)
    image = await Qcow2Image.open(path, read_only=False)
    report = await (await BitmapStore.load(image)).repair()
    await image.close()
    assert [entry.name for entry in report.kept] == ["b"]
    assert "shares clusters" in report.dropped[0].reason
    check_image(path)


async def test_guest_write_never_reaches_a_bitmap(path: Path) -> None:
    """A damaged L2 entry that leads to a bitmap's cluster."""
    qemu_io(path, "write 0 64k")
    await store_in(path, [frozen("a", NEW_BITS)], None)
    content = bytearray(path.read_bytes())
    (place,) = scan_extension_area(bytes(content[: 1 << 16]), "").find(BITMAPS_EXTENSION)
    (directory,) = struct.unpack_from(">Q", content, place.offset + 16)
    (table,) = struct.unpack_from(">Q", content, directory)
    (l1_table,) = struct.unpack_from(">Q", content, 40)
    (l2_table,) = struct.unpack_from(">Q", content, l1_table)
    struct.pack_into(">Q", content, l2_table & ~(1 << 63), 1 << 63 | table)
    path.write_bytes(content)
    image = await Qcow2Image.open(path, read_only=False)
    store = await BitmapStore.load(image)
    with pytest.raises(OSError, match="metadata"):
        await image.write(0, memoryview(b"guest"))
    assert await store.load_bits("a") == NEW_BITS
    await image.close()


async def test_table_that_points_nowhere_is_damage_of_that_bitmap_alone(path: Path) -> None:
    bits = marked(10 * MIB, 65536, seed=31)
    await store_in(path, [frozen("a", bits), frozen("b", bits)], None)
    content = bytearray(path.read_bytes())
    (place,) = scan_extension_area(bytes(content[: 1 << 16]), "").find(BITMAPS_EXTENSION)
    (directory,) = struct.unpack_from(">Q", content, place.offset + 16)
    (table,) = struct.unpack_from(">Q", content, directory)
    struct.pack_into(">Q", content, table, 1 << 50)
    path.write_bytes(content)
    store, loaded = await load_from(path)
    assert set(loaded) == {"b"}
    assert "impossible entry" in store.damaged[0].reason


async def test_bitmap_in_use_after_a_resize_is_listed_but_unreadable(path: Path) -> None:
    await store_in(path, [recording("a", NEW_BITS)], None)
    image = SimpleImage.from_bytes(path.read_bytes())
    image.size = 1 << 38
    store = await BitmapStore.load(image)
    assert store.damaged == []
    assert store.entries[0].inconsistent
    with pytest.raises(ImageError, match="unreadable"):
        await store.load_bits("a")


async def test_mutated_images_never_raise_anything_but_image_errors(path: Path) -> None:
    """No traceback, no hang, no memory beyond what the file's size allows."""
    bits = marked(10 * MIB, 65536, seed=32)
    await store_in(path, [frozen("a", bits), recording("b", bits)], b"record" * 20)
    pristine = path.read_bytes()
    area = scan_extension_area(pristine[: 1 << 16], "")
    (bitmaps,), (private,) = area.find(BITMAPS_EXTENSION), area.find(EXTENSION_MAGIC)
    (directory,) = struct.unpack_from(">Q", pristine, bitmaps.offset + 16)
    (table,) = struct.unpack_from(">Q", pristine, directory)
    targets = [
        *range(bitmaps.offset - 8, bitmaps.offset + 24),
        *range(private.offset - 8, private.offset + 64),
        *range(directory, directory + 64),
        *range(table, table + 16),
    ]
    choose = random.Random(5)
    for _ in range(1500):
        content = bytearray(pristine)
        for position in choose.sample(targets, choose.choice([1, 1, 2, 8])):
            content[position] = choose.choice([0, 1, 255, choose.randrange(256)])
        try:
            image = SimpleImage.from_bytes(bytes(content))
        except ImageError:
            continue
        store = await BitmapStore.load(image)
        for entry in store.entries:
            if not entry.inconsistent:
                assert len((await store.load_bits(entry.name)).data) <= 1 << 20
        assert image.file.log == []
        if store.damaged:
            await store.repair()
            repaired = await BitmapStore.load(SimpleImage.from_bytes(bytes(image.file.content)))
            assert repaired.damaged == []
            assert repaired.entries == store.entries


async def test_damaged_entry_that_records_is_marked_in_use_too(path: Path) -> None:
    """Rule 2: QEMU may believe it."""
    await store_in(path, [frozen("a", NEW_BITS), recording("bb", NEW_BITS, in_use=False)])
    damage(path, 32, struct.pack(">Q", 1 << 40))
    image = await Qcow2Image.open(path, read_only=False)
    store = await BitmapStore.load(image)
    assert [item.name for item in store.damaged] == ["bb"]
    await store.mark_in_use()
    await image.close()
    assert listed_bitmaps(path)["bb"] == (65536, {"auto", "in-use"})
