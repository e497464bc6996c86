"""Bitmaps in images: QEMU agrees both ways, power cuts leave old or new, damage is harmless."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import struct
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nbdfleece.bitmaps.bitmap import Bitmap
from nbdfleece.errors import ImageError, StateError
from nbdfleece.qcow2.bitmap_store import BitmapStore, StoredBitmap, repair_directory
from nbdfleece.qcow2.extension_area import PLACEHOLDER_MAGIC, scan_extension_area
from nbdfleece.qcow2.header import Autoclear
from nbdfleece.qcow2.image import Qcow2Image
from nbdfleece.qcow2.private_extension import EXTENSION_MAGIC
from tests.qcow2.bitmap_image import (
    RecordingFile,
    SimpleImage,
    check_image,
    crash_states,
    create,
    durable_content,
    listed_bitmaps,
    qemu_dirty_ranges,
    qemu_img,
)
from tests.qcow2.fake_disk import FakeDisk

MIB = 1 << 20
BITMAPS_EXTENSION = 0x23852875


@pytest.fixture
def path(folder: Path) -> Path:
    return create(folder / "disk.qcow2")


def marked(size: int, granularity: int, seed: float, ranges: int = 12) -> Bitmap:
    """A bitmap with some random ranges, and the disk's last byte, marked."""
    choose = random.Random(seed)
    bitmap = Bitmap(size, granularity)
    for _ in range(ranges):
        offset = choose.randrange(size)
        bitmap.set_range(offset, choose.randrange(1, min(size - offset, 40 * granularity) + 1))
    bitmap.set_range(size - 1, 1)
    return bitmap


NEW_BITS = marked(10 * MIB, 65536, seed=21)


def frozen(name: str, content: Bitmap) -> StoredBitmap:
    return StoredBitmap(name, content.granularity, recording=False, in_use=False, content=content)


def recording(name: str, content: Bitmap, *, in_use: bool = True) -> StoredBitmap:
    return StoredBitmap(name, content.granularity, recording=True, in_use=in_use, content=content)


def kept(name: str, granularity: int = 65536) -> StoredBitmap:
    return StoredBitmap(name, granularity, recording=False, in_use=False)


async def store_in(path: Path, entries: list[StoredBitmap], payload: bytes | None = None) -> None:
    """Open an image, replace its bitmaps, close it."""
    image = await Qcow2Image.open(path, read_only=False)
    try:
        await (await BitmapStore.load(image)).replace(entries, payload)
    finally:
        await image.close()


async def load_from(path: Path) -> tuple[BitmapStore, dict[str, Bitmap]]:
    """What an image holds, read without changing it."""
    image = await Qcow2Image.open(path, read_only=True)
    try:
        store = await BitmapStore.load(image)
        bits = {entry.name: await store.load_bits(entry.name) for entry in store.entries}
        return store, bits
    finally:
        await image.close()


def check_clean(path: Path) -> None:
    assert "No errors" in qemu_img("check", path).stdout


def header_features(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[88:96], "big")


def extension_types(path: Path) -> list[int]:
    area = scan_extension_area(path.read_bytes()[: 1 << 16], str(path))
    return [extension.type for extension in area.extensions]


# QEMU agrees (rule 7)


@pytest.mark.parametrize(
    ("cluster_size", "size", "granularity"),
    [
        (512, 1 * MIB, 512),
        (512, 3 * MIB, 4096),
        (4096, 64 * MIB + 512, 512),
        (4096, 100 * MIB + 4096, 65536),
        (65536, 1, 65536),
        (65536, 512, 512),
        (65536, 64 * MIB - 512, 1 << 20),
        (65536, 1 << 30, 512),
        (65536, (1 << 40) + 12345 * 512, 65536),
        (65536, 1 << 30, 1 << 31),
        (2 * MIB, (1 << 35) + 512, 1024),
    ],
)
async def test_bitmaps_we_store_are_what_qemu_shows(
    folder: Path, cluster_size: int, size: int, granularity: int
) -> None:
    path = create(folder / "disk.qcow2", size, cluster_size=cluster_size)
    size = -(-size // 512) * 512
    sparse = marked(size, granularity, seed=1)
    full = Bitmap(size, granularity)
    full.set_all()
    empty = Bitmap(size, granularity)
    wanted = {"sparse": sparse, "full": full, "empty": empty, "näme/∂": sparse}
    payload = b"chain" if cluster_size > 512 else None
    await store_in(path, [frozen(name, content) for name, content in wanted.items()], payload)

    check_clean(path)
    assert listed_bitmaps(path) == {name: (granularity, set()) for name in wanted}
    for name, content in wanted.items():
        assert qemu_dirty_ranges(path, name) == list(content.dirty_ranges()), name
    _, bits = await load_from(path)
    assert bits == wanted


async def test_bits_have_the_digest_that_qemu_computes(path: Path) -> None:
    size = 10 * MIB
    contents = {
        f"{granularity}-{ranges}": marked(size, granularity, seed=ranges, ranges=ranges)
        for granularity in (512, 4096, 65536, 1 << 24)
        for ranges in (0, 3, 200)
    }
    await store_in(path, [frozen(name, bits) for name, bits in contents.items()], b"record")
    for name, bits in contents.items():
        padded = bytes(bits.data) + bytes(-len(bits.data) % 8)
        assert qemu_bitmap_digest(path, name) == hashlib.sha256(padded).hexdigest(), name


def qemu_bitmap_digest(path: Path, name: str) -> str:
    """The SHA-256 that qemu-storage-daemon computes over a bitmap's bits."""
    file = {"driver": "file", "filename": str(path)}
    node = {"driver": "qcow2", "node-name": "disk", "read-only": True, "file": file}
    commands = [
        {"execute": "qmp_capabilities"},
        {"execute": "blockdev-add", "arguments": node},
        {
            "execute": "x-debug-block-dirty-bitmap-sha256",
            "arguments": {"node": "disk", "name": name},
        },
        {"execute": "quit"},
    ]
    result = subprocess.run(
        ["qemu-storage-daemon", "--chardev", "stdio,id=qmp", "--monitor", "chardev=qmp"],
        input="\n".join(map(json.dumps, commands)),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    (digest,) = re.findall(r'"sha256": "(\w+)"', result.stdout)
    return str(digest)


async def test_flags_are_what_qemu_info_lists(path: Path) -> None:
    content = marked(10 * MIB, 65536, seed=2)
    await store_in(
        path,
        [
            frozen("old", content),
            recording("clean", content, in_use=False),
            recording("active", content),
        ],
    )
    assert listed_bitmaps(path) == {
        "old": (65536, set()),
        "clean": (65536, {"auto"}),
        "active": (65536, {"auto", "in-use"}),
    }
    check_clean(path)


@pytest.mark.parametrize("cluster_size", [512, 65536, 2 * MIB])
async def test_bitmaps_qemu_stores_are_loaded_exactly(folder: Path, cluster_size: int) -> None:
    path = create(folder / "disk.qcow2", 32 * MIB + 512, cluster_size=cluster_size)
    for granularity in (512, 4096, 1 << 20):
        qemu_img("bitmap", "--add", "-g", granularity, path, f"by-{granularity}")
    qemu_img("bitmap", "--add", "--disable", path, "disabled")
    commands = ["write -P 1 0 4k", "write -P 2 5M 1M", "write -z 20M 64k", "discard 32M 512"]
    qemu_io(path, *commands)
    store, bits = await load_from(path)
    assert store.damaged == []
    assert {entry.name: entry.recording for entry in store.entries} == {
        "by-512": True,
        "by-4096": True,
        "by-1048576": True,
        "disabled": False,
    }
    assert not any(entry.inconsistent for entry in store.entries)
    for name, content in bits.items():
        assert list(content.dirty_ranges()) == qemu_dirty_ranges(path, name), name
        image = await Qcow2Image.open(path, read_only=True)
        assert await (await BitmapStore.load(image)).dirty_bytes(name) == content.dirty_bytes()
        await image.close()


def qemu_io(path: Path, *commands: str) -> None:
    arguments = [item for command in commands for item in ("-c", command)]
    subprocess.run(
        ["qemu-io", "-f", "qcow2", *arguments, path], check=True, capture_output=True, timeout=30
    )


@pytest.mark.parametrize("cluster_size", [4096, 65536])
async def test_three_rounds_of_us_and_qemu_agree(folder: Path, cluster_size: int) -> None:
    path = create(folder / "disk.qcow2", 64 * MIB, cluster_size=cluster_size)
    model = {"frozen": marked(64 * MIB, 4096, seed=3), "live": marked(64 * MIB, 65536, seed=4)}
    for turn in range(3):
        await store_in(
            path,
            [
                frozen("frozen", model["frozen"]),
                recording("live", model["live"], in_use=False),
                StoredBitmap("kept", 65536, recording=False, in_use=False)
                if turn
                else frozen("kept", marked(64 * MIB, 65536, seed=5)),
            ],
            b"turn %d" % turn,
        )
        check_clean(path)
        offset = (7 * turn + 1) * MIB
        qemu_io(path, f"write {offset} 3000", f"write -z {offset + 5 * MIB} 70000")
        model["live"].set_range(offset, 3000)
        model["live"].set_range(offset + 5 * MIB, 70000)
        model["frozen"].set_range(offset, 1)
        qemu_img("bitmap", "--add", path, f"extra{turn}")
        qemu_img("bitmap", "--merge", f"extra{turn}", path, "frozen")
        qemu_img("bitmap", "--remove", path, f"extra{turn}")
        check_clean(path)
        store, bits = await load_from(path)
        assert bits["live"] == model["live"]
        assert bits["kept"] == marked(64 * MIB, 65536, seed=5)
        assert store.record is not None
        assert store.record.payload == b"turn %d" % turn
        assert not store.record.matches_directory
        assert not store.private_bit_was_set


async def test_private_bit_and_record_survive_what_only_reads(path: Path) -> None:
    await store_in(path, [frozen("a", marked(10 * MIB, 65536, seed=6))], b"record")
    qemu_img("check", path)
    qemu_img("info", path)
    qemu_img("convert", "-O", "raw", path, path.with_suffix(".raw"))
    qemu_dirty_ranges(path, "a")
    store, _ = await load_from(path)
    assert store.private_bit_was_set
    assert store.record == (b"record", True)


async def test_qemu_opening_for_writing_clears_the_bit_but_keeps_the_record(path: Path) -> None:
    await store_in(path, [frozen("a", marked(10 * MIB, 65536, seed=6))], b"record")
    qemu_io(path, "write 0 4k")
    assert not header_features(path) & Autoclear.PRIVATE
    store, _ = await load_from(path)
    assert not store.private_bit_was_set
    assert store.record == (b"record", False)


async def test_record_stays_stale_until_it_is_stored_again(path: Path) -> None:
    """What QEMU may have changed is not called fresh because of an unrelated change of ours."""
    bits = marked(10 * MIB, 65536, seed=6)
    await store_in(path, [frozen("a", bits)], b"record")
    qemu_io(path, "write 0 4k")
    await store_in(path, [frozen("a", bits), frozen("b", bits)], None)
    store, _ = await load_from(path)
    assert store.record == (b"record", False)
    assert not store.private_bit_was_set
    await store_in(path, [kept("a")], b"again")
    store, _ = await load_from(path)
    assert store.record == (b"again", True)
    assert store.private_bit_was_set


async def test_replace_without_payload_keeps_the_record_in_force(path: Path) -> None:
    bits = marked(10 * MIB, 65536, seed=6)
    await store_in(path, [frozen("a", bits)], b"record")
    await store_in(path, [kept("a"), frozen("b", bits)], None)
    store, _ = await load_from(path)
    assert store.record == (b"record", True)
    assert store.private_bit_was_set


# Header extensions


@pytest.mark.parametrize("cluster_size", [4096, 65536])
@pytest.mark.parametrize("name_length", [5, 300])
async def test_backing_file_name_and_foreign_extensions_survive(
    folder: Path, cluster_size: int, name_length: int
) -> None:
    base = create(folder / ("b" * 100 + ".qcow2"), 10 * MIB)
    name = "./" * ((name_length - 5) // 2) + base.name
    path = folder / "disk.qcow2"
    options = f"cluster_size={cluster_size}"
    qemu_img("create", "-q", "-f", "qcow2", "-b", name, "-F", "qcow2", "-o", options, path)
    before = extension_types(path)
    bits = marked(10 * MIB, 65536, seed=7)
    await store_in(path, [frozen("a", bits)], b"record")
    assert extension_types(path) == [*before, BITMAPS_EXTENSION, EXTENSION_MAGIC]
    assert f"backing file: {name}" in qemu_img("info", path).stdout
    check_clean(path)
    assert qemu_dirty_ranges(path, "a") == list(bits.dirty_ranges())
    # QEMU has room to write the header anew.
    qemu_img("rebase", "-u", "-b", "./" * 30 + base.name, "-F", "qcow2", path)
    store, _ = await load_from(path)
    assert store.record == (b"record", False)
    check_clean(path)


async def test_switched_fields_never_straddle_a_sector(folder: Path) -> None:
    """Whatever extensions come before, and even if QEMU's own straddles."""
    for filler in range(0, 80, 8):
        path = create(folder / f"{filler}.qcow2")
        insert_extension(path, 0x12345678, bytes(filler))
        if filler % 16:
            qemu_img("bitmap", "--add", path, "qemu")
        bits = marked(10 * MIB, 65536, seed=filler)
        await store_in(path, [frozen("a", bits)], None)
        await store_in(path, [kept("a"), frozen("b", bits)], b"record")
        area = scan_extension_area(path.read_bytes()[: 1 << 16], "")
        (place,) = area.find(BITMAPS_EXTENSION)
        assert not place.straddles_sectors
        assert set(listed_bitmaps(path)) == {"a", "b"}
        check_clean(path)
        store, loaded = await load_from(path)
        assert store.record == (b"record", True)
        assert loaded == {"a": bits, "b": bits}
        qemu_io(path, "write 0 1")  # QEMU writes the header anew


@pytest.mark.parametrize("end", [488, 496])
async def test_header_without_room_for_a_record_still_gets_bitmaps(folder: Path, end: int) -> None:
    path = create(folder / "disk.qcow2", 1 * MIB, cluster_size=1024)
    insert_extension(path, 0x12345678, bytes(end - 112 - 8))
    insert_extension(path, 0x12345679, bytes(1024 - end - 8 - 8 - 72))
    content = bytearray(path.read_bytes())
    (place,) = scan_extension_area(bytes(content[:1024]), "").find(0x12345679)
    content[place.offset - 8 : place.offset] = bytes(8)
    bits = marked(1 * MIB, 512, seed=1)
    path.write_bytes(content)
    await store_in(path, [frozen("a", bits)], None)
    check_clean(path)
    assert qemu_dirty_ranges(path, "a") == list(bits.dirty_ranges())


def insert_extension(path: Path, extension_type: int, data: bytes) -> None:
    """Append an extension behind the ones that are there."""
    content = bytearray(path.read_bytes())
    end = scan_extension_area(bytes(content[: 1 << 16]), "").end
    packed = struct.pack(">II", extension_type, len(data)) + data + bytes(-len(data) % 8)
    content[end : end + len(packed)] = packed
    path.write_bytes(content)


async def test_image_that_loses_all_bitmaps_opens_without_a_warning(path: Path) -> None:
    bits = marked(10 * MIB, 65536, seed=8)
    await store_in(path, [frozen("a", bits)], b"one")
    await store_in(path, [], b"two")
    result = qemu_img("info", path)
    assert result.stderr == ""
    assert listed_bitmaps(path) == {}
    assert PLACEHOLDER_MAGIC in extension_types(path)
    check_clean(path)
    store, _ = await load_from(path)
    assert store.record == (b"two", True)
    await store_in(path, [frozen("b", bits)], None)
    assert PLACEHOLDER_MAGIC not in extension_types(path)
    assert qemu_dirty_ranges(path, "b") == list(bits.dirty_ranges())
    store, _ = await load_from(path)
    assert store.record == (b"two", True)


async def test_payload_too_large_for_the_header_names_both_and_changes_nothing(
    folder: Path,
) -> None:
    path = create(folder / "disk.qcow2", 1 * MIB, cluster_size=512)
    bits = marked(1 * MIB, 65536, seed=9)
    before = path.read_bytes()
    with pytest.raises(StateError, match=r"needs 200 bytes.* 512-byte clusters"):
        await store_in(path, [frozen("a", bits)], bytes(200))
    assert path.read_bytes() == before
    await store_in(path, [frozen("a", bits)], bytes(40))
    assert qemu_dirty_ranges(path, "a") == list(bits.dirty_ranges())
    check_clean(path)


async def test_payload_room_grows_with_the_cluster(path: Path) -> None:
    bits = marked(10 * MIB, 65536, seed=9)
    await store_in(path, [frozen("a", bits)], bytes(30000))
    with pytest.raises(StateError, match="use larger clusters"):
        await store_in(path, [frozen("a", bits)], bytes(31000))
    store, _ = await load_from(path)
    assert 30000 < store.payload_bytes_max < 31000
    await store_in(path, [frozen("a", bits)], bytes(store.payload_bytes_max))
    check_clean(path)


# The state at the call (rule 3), in use (rule 2)


async def test_replace_stores_the_bits_of_the_moment_of_the_call(path: Path) -> None:
    content = Bitmap(10 * MIB)
    content.set_range(0, 1)
    image = await Qcow2Image.open(path, read_only=False)
    store = await BitmapStore.load(image)
    work = store.replace([frozen("a", content)], None)
    content.set_range(5 * MIB, 1)
    await work
    assert list((await store.load_bits("a")).dirty_ranges()) == [(0, 65536)]
    await image.close()


async def test_mark_in_use_marks_only_what_records(path: Path) -> None:
    content = marked(10 * MIB, 65536, seed=10)
    await store_in(path, [frozen("old", content), recording("live", content, in_use=False)], b"r")
    image = await Qcow2Image.open(path, read_only=False)
    store = await BitmapStore.load(image)
    await store.mark_in_use(keep_private_bit=True)
    assert not any(entry.inconsistent for entry in store.entries)
    await image.close()
    assert listed_bitmaps(path) == {"old": (65536, set()), "live": (65536, {"auto", "in-use"})}
    check_clean(path)
    assert qemu_dirty_ranges(path, "old") == list(content.dirty_ranges())
    store, bits = await load_from(path)
    assert [(entry.name, entry.inconsistent) for entry in store.entries] == [
        ("old", False),
        ("live", True),
    ]
    assert store.record == (b"r", True)
    assert bits["live"] == content


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


async def test_writer_that_keeps_no_promise_makes_the_record_stale(path: Path) -> None:
    await store_in(path, [recording("live", NEW_BITS, in_use=False)], b"record")
    image = await Qcow2Image.open(path, read_only=False)
    store = await BitmapStore.load(image)
    assert store.record == (b"record", True)
    await store.mark_in_use()
    assert store.record == (b"record", False)
    await image.close()
    store, _ = await load_from(path)
    assert store.record == (b"record", False)
    assert not store.private_bit_was_set
    await store_in(path, [recording("live", NEW_BITS, in_use=False)], b"anew")
    store, _ = await load_from(path)
    assert store.record == (b"anew", True)
    assert store.private_bit_was_set


async def test_opening_for_writing_clears_foreign_autoclear_bits_only(path: Path) -> None:
    await store_in(path, [frozen("a", NEW_BITS)], b"record")
    content = bytearray(path.read_bytes())
    content[93] |= 0x10
    path.write_bytes(content)
    await (await Qcow2Image.open(path, read_only=True)).close()
    assert path.read_bytes() == bytes(content)
    await (await Qcow2Image.open(path, read_only=False)).close()
    assert header_features(path) == Autoclear.BITMAPS | Autoclear.PRIVATE


async def test_bitmap_in_use_cannot_be_called_good_without_its_content(path: Path) -> None:
    content = marked(10 * MIB, 65536, seed=10)
    await store_in(path, [recording("live", content)])
    with pytest.raises(StateError, match="without its content"):
        await store_in(path, [StoredBitmap("live", 65536, recording=True, in_use=False)])
    await store_in(path, [StoredBitmap("live", 65536, recording=True, in_use=True)])
    store, _ = await load_from(path)
    assert store.entries[0].inconsistent
    await store_in(path, [recording("live", content, in_use=False)])
    store, _ = await load_from(path)
    assert not store.entries[0].inconsistent


BITS = Bitmap(10 * MIB)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([frozen("a", BITS), frozen("a", BITS)], "same name"),
        ([frozen("", BITS)], "needs a name"),
        ([frozen("x" * 1024, BITS)], "needs a name"),
        ([frozen("\udcff", BITS)], "needs a name"),
        ([frozen("a\0b", BITS)], "needs a name"),
        ([frozen("a", Bitmap(20 * MIB))], "does not fit a disk"),
        ([StoredBitmap("a", 4096, False, False, BITS)], "does not fit a disk"),
        ([StoredBitmap("a", 65536, False, True, BITS)], "cannot be in use"),
        ([kept("a")], "nothing to keep"),
    ],
)
async def test_impossible_bitmaps_are_refused_and_nothing_changes(
    path: Path, entries: list[StoredBitmap], reason: str
) -> None:
    before = path.read_bytes()
    with pytest.raises(StateError, match=reason):
        await store_in(path, entries, b"record")
    assert path.read_bytes() == before


async def test_unknown_bitmap_and_read_only_image_are_state_errors(path: Path) -> None:
    image = await Qcow2Image.open(path, read_only=True)
    store = await BitmapStore.load(image)
    with pytest.raises(StateError, match="no bitmap 'a'"):
        await store.load_bits("a")
    with pytest.raises(StateError, match="reading only"):
        await store.replace([frozen("a", BITS)], None)
    await image.close()


async def test_version_2_has_no_bitmaps(folder: Path) -> None:
    path = create(folder / "disk.qcow2", compat="0.10")
    image = await Qcow2Image.open(path, read_only=False)
    store = await BitmapStore.load(image)
    assert store.entries == []
    assert store.record is None
    assert not store.private_bit_was_set
    await store.mark_in_use()
    with pytest.raises(StateError, match="version 2"):
        await store.replace([frozen("a", BITS)], None)
    await image.close()


async def test_directory_without_its_autoclear_bit_is_void(path: Path) -> None:
    await store_in(path, [frozen("a", BITS)], b"record")
    content = bytearray(path.read_bytes())
    content[95] &= 0xFE
    path.write_bytes(content)
    store, _ = await load_from(path)
    assert store.entries == []
    await store_in(path, [frozen("b", BITS)], None)
    assert set(listed_bitmaps(path)) == {"b"}
    check_image(path)


# Power cuts (rules 4 and 6)

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
    for number in range(400):
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


# Damage


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
        report = await repair_directory(image)
        await image.close()
        assert report.dropped, position
        assert qemu_opens(path), position
        assert set(listed_bitmaps(path)) == {entry.name for entry in report.kept}
        check_image(path)
    assert refused > 30


def qemu_opens(path: Path) -> bool:
    """Whether QEMU opens the image and loads its bitmaps."""
    command = ["qemu-io", "-r", "-f", "qcow2", "-c", "length", str(path)]
    return subprocess.run(command, capture_output=True, timeout=30).returncode == 0


async def test_directory_past_the_end_of_the_file_is_dropped_by_repair(path: Path) -> None:
    await store_in(path, [frozen("a", BITS)], b"record")
    content = bytearray(path.read_bytes())
    (place,) = scan_extension_area(bytes(content[: 1 << 16]), "").find(BITMAPS_EXTENSION)
    struct.pack_into(">Q", content, place.offset + 16, 1 << 40)
    path.write_bytes(content)
    image = await Qcow2Image.open(path, read_only=False)
    report = await repair_directory(image)
    await image.close()
    assert report.kept == []
    assert "past the end" in report.dropped[0].reason
    assert listed_bitmaps(path) == {}
    check_image(path)


async def test_sound_directory_is_not_touched_by_repair(path: Path) -> None:
    await store_in(path, [frozen("a", BITS)], b"record")
    before = path.read_bytes()
    image = await Qcow2Image.open(path, read_only=False)
    report = await repair_directory(image)
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
    report = await repair_directory(image)
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
    await store_in(path, [recording("a", BITS)], None)
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
