"""Checking and repairing images, against ``qemu-img check``."""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nbdfleece.errors import ImageError
from nbdfleece.qcow2.check import Repair, check_image
from nbdfleece.qcow2.check_references import CheckResult
from tests.held import held_by_qemu

_ALL_ONES_BITMAP_EXTENSION = b"\x23\x85\x28\x75"


def qemu(*words: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([str(word) for word in words], capture_output=True, check=False)


def qemu_check(image: Path) -> dict[str, Any] | None:
    """QEMU's findings; None if it could not check."""
    done = qemu("qemu-img", "check", "--output=json", "-f", "qcow2", image)
    if done.returncode == 1:
        return None
    found: dict[str, Any] = json.loads(done.stdout)
    return {name: value for name, value in found.items() if name not in ("filename", "format")}


def shown(result: CheckResult) -> dict[str, Any]:
    """Our findings as QEMU tells them."""
    numbers = {name: value for name, value in asdict(result).items() if name != "messages"}
    return {
        name.replace("_", "-"): value
        for name, value in numbers.items()
        if (value or name == "check_errors") and not name.endswith("_fixed")
    }


def content(image: Path) -> bytes | None:
    """The disk as QEMU reads it; None if it cannot."""
    raw = image.with_suffix(".raw")
    done = qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
    return None if done.returncode else raw.read_bytes()


OPTIONS = [
    "cluster_size=512,refcount_bits=1",
    "cluster_size=1k,refcount_bits=64",
    "cluster_size=4k,refcount_bits=2",
    "cluster_size=16k,refcount_bits=4,extended_l2=on",
    "cluster_size=64k,refcount_bits=16",
    "cluster_size=64k,refcount_bits=8,extended_l2=on",
    "cluster_size=256k,refcount_bits=32",
    "cluster_size=2M",
    "compat=0.10",
]


def make(folder: Path, options: str, seed: int) -> Path:
    """An image with a history: writes, zeroes, discards, a snapshot, bitmaps, compression."""
    rng, image, size = random.Random(seed), folder / "image.qcow2", 3 * 512 + (1 << 20)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, size)
    commands: list[str] = []
    for _ in range(10):
        offset = rng.randrange(size // 512) * 512
        length = min(rng.randrange(1, 400) * 512, size - offset)
        verb = rng.choice(["write", "write", "write -z", "write -z -u", "discard"])
        commands += ["-c", f"{verb} {offset} {length}"]
    qemu("qemu-io", *commands, image)
    if seed % 3 == 0:
        qemu("qemu-img", "snapshot", "-c", "s", image)
        qemu("qemu-io", *commands[:8], image)
    if seed % 3 == 1:
        qemu("qemu-img", "bitmap", "--add", image, "b")
        qemu("qemu-io", *commands, image)
    if seed % 3 == 2 and "refcount_bits=1," not in options:
        packed = folder / "packed.qcow2"
        qemu("qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, image, packed)
        packed.replace(image)
    return image


def damage(image: Path, seed: int) -> None:
    """Change entries of the L1, L2 and refcount tables."""
    rng, data = random.Random(seed), bytearray(image.read_bytes())
    fields = struct.unpack(">IIQIIQIIQQIIQ", data[:72])
    cluster_size, l1_size, l1, table, table_clusters = 1 << fields[4], *fields[7:11]
    l2 = _tables(data, l1, l1_size)
    blocks = _tables(data, table, table_clusters * cluster_size // 8)
    for _ in range(rng.randrange(1, 4)):
        where = rng.choice(
            [
                l1 + 8 * rng.randrange(l1_size),
                rng.choice(l2) + 8 * rng.randrange(min(64, cluster_size // 8)),
                rng.choice(l2) + 8 * rng.randrange(min(64, cluster_size // 8)),
                rng.choice(blocks) + 8 * rng.randrange(8),
            ]
        )
        value = int.from_bytes(data[where : where + 8], "big")
        value = rng.choice([value ^ 1 << rng.randrange(64), value ^ 1 << 63, 0, value + (3 << 16)])
        data[where : where + 8] = (value & (1 << 64) - 1).to_bytes(8, "big")
    image.write_bytes(data)


def _tables(data: bytearray, offset: int, count: int) -> list[int]:
    entries = struct.unpack(f">{count}Q", data[offset : offset + 8 * count])
    found = [entry & 0xFFFFFFFFFFFE00 for entry in entries]
    return [each for each in found if 0 < each < len(data)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", OPTIONS)
async def test_sound_image_has_qemu_findings(folder: Path, options: str, seed: int) -> None:
    image = make(folder, options, seed)
    assert shown(await check_image(image)) == qemu_check(image)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", OPTIONS)
async def test_damaged_image_has_qemu_findings_and_repairs_keep_the_content(
    folder: Path, options: str, seed: int
) -> None:
    """As much is put right as by QEMU, and no byte of the disk is changed by it."""
    image, copy = make(folder, options, seed), folder / "copy.qcow2"
    damage(image, seed)
    expected = qemu_check(image)
    found = await check_image(image)
    assert expected is None or shown(found) == expected
    before = content(image)
    for repair in (Repair.LEAKS, Repair.ALL):
        shutil.copy(image, copy)
        qemu("qemu-img", "check", "-q", "-r", repair.name.lower(), copy)
        theirs = qemu_check(copy)
        shutil.copy(image, copy)
        result = await check_image(copy, repair=repair)
        ours = qemu_check(copy)
        assert before is None or content(copy) == before
        if theirs is not None and not {"corruptions", "leaks"} & set(theirs):
            assert ours is not None
            assert not {"corruptions", "leaks"} & set(ours)
            assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0)


async def test_missing_refcount_blocks_are_rebuilt(folder: Path) -> None:
    """A refcount table of zeroes: everything is found by the references alone."""
    image = make(folder, "cluster_size=4k", 0)
    before = content(image)
    data = bytearray(image.read_bytes())
    table = int.from_bytes(data[48:56], "big")
    data[table : table + 4096] = bytes(4096)
    image.write_bytes(data)
    result = await check_image(image, repair=Repair.ALL)
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0)
    assert result.corruptions_fixed > 10
    found = qemu_check(image)
    assert found is not None
    assert not {"corruptions", "leaks"} & set(found)
    assert content(image) == before


async def test_leaks_are_not_repaired_where_blocks_are_missing(folder: Path) -> None:
    image = make(folder, "cluster_size=4k", 0)
    data = bytearray(image.read_bytes())
    table = int.from_bytes(data[48:56], "big")
    data[table : table + 4096] = bytes(4096)
    image.write_bytes(data)
    result = await check_image(image, repair=Repair.LEAKS)
    assert result.check_errors == 1
    assert image.read_bytes() == data


async def test_damaged_bitmap_entry_is_a_corruption(folder: Path) -> None:
    """QEMU cannot even open such an image."""
    image = make(folder, "cluster_size=64k", 1)
    data = bytearray(image.read_bytes())
    extension = data.index(_ALL_ONES_BITMAP_EXTENSION) + 8
    directory = int.from_bytes(data[extension + 16 : extension + 24], "big")
    data[directory + 16] = 9  # the type
    image.write_bytes(data)
    assert qemu_check(image) is None
    result = await check_image(image)
    assert result.corruptions == 1
    assert "bitmap b is of the unknown type 9" in result.messages[0]


async def test_corrupt_and_dirty_marks_go_with_a_repair_that_leaves_nothing(folder: Path) -> None:
    image = make(folder, "lazy_refcounts=on", 0)
    data = bytearray(image.read_bytes())
    data[79] |= 3
    image.write_bytes(data)
    await check_image(image)
    assert image.read_bytes()[79] & 3 == 3
    await check_image(image, repair=Repair.ALL)
    assert image.read_bytes()[79] & 3 == 0


async def test_repair_of_an_image_in_use_is_refused(folder: Path) -> None:
    image = make(folder, "cluster_size=64k", 0)
    with held_by_qemu(image), pytest.raises(ImageError):
        await check_image(image, repair=Repair.ALL)


async def test_header_that_cannot_be_is_refused(folder: Path) -> None:
    image = folder / "image.qcow2"
    image.write_bytes(b"QFI\xfb" + bytes(1000))
    with pytest.raises(ImageError):
        await check_image(image)


@pytest.mark.parametrize("offset", [1 << 40, 1 << 63])
async def test_snapshot_whose_l1_table_no_file_can_reach_is_a_corruption(
    folder: Path, offset: int
) -> None:
    image = make(folder, "cluster_size=4k", 0)
    data = bytearray(image.read_bytes())
    table = int.from_bytes(data[64:72], "big")
    data[table : table + 8] = offset.to_bytes(8, "big")
    image.write_bytes(data)
    result = await check_image(image)
    assert f"reference to {offset:#x}, 8 bytes: past the end of the file" in result.messages[0]
    if offset == 1 << 40:  # of the other QEMU says that it cannot be read, and checks no further
        assert shown(result) == qemu_check(image)
