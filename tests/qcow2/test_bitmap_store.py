"""Bitmaps in images: QEMU agrees both ways, what cannot be is refused with nothing changed."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from pathlib import Path

import pytest

from nbdfleece.bitmaps.bitmap import Bitmap
from nbdfleece.errors import StateError
from nbdfleece.qcow2.bitmap_store import BitmapStore, StoredBitmap
from nbdfleece.qcow2.image import Qcow2Image
from tests.qcow2.bitmap_image import create, listed_bitmaps, qemu_dirty_ranges, qemu_img
from tests.qcow2.stored_bitmaps import (
    MIB,
    NEW_BITS,
    check_clean,
    frozen,
    kept,
    load_from,
    marked,
    qemu_io,
    recording,
    store_in,
)


@pytest.fixture
def path(folder: Path) -> Path:
    return create(folder / "disk.qcow2")


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


@pytest.mark.parametrize("raw", ["on", "off"])
async def test_bitmaps_of_an_image_with_an_external_data_file(folder: Path, raw: str) -> None:
    path = folder / "disk.qcow2"
    create(path, 10 * MIB, data_file=folder / "disk.data", data_file_raw=raw)
    await store_in(path, [frozen("a", NEW_BITS), recording("b", NEW_BITS, in_use=False)], b"r")
    check_clean(path)
    assert qemu_dirty_ranges(path, "a") == list(NEW_BITS.dirty_ranges())
    qemu_io(path, "write 9M 64k")
    store, bits = await load_from(path)
    assert bits["a"] == NEW_BITS
    assert bits["b"].is_set(9 * MIB)
    assert store.record == (b"r", False)


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
        timeout=120,
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
    await store.mark_in_use()
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
    assert store.record == (b"r", False)
    assert bits["live"] == content


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
