"""Images whose refcounts another program has left behind, and what then is done before writing."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from nbdfleece.errors import ImageError
from nbdfleece.qcow2.create import create_image
from nbdfleece.qcow2.image import Qcow2Image
from tests.qcow2.guest import Guest, check, qemu_content, qemu_img, qemu_io
from tests.qcow2.test_crash import CrashingDisk

MIB = 1 << 20
DIRTY_PLACE = 79
"""Of the byte with the dirty bit."""


def leave_dirty(path: Path, commands: list[str]) -> None:
    """Have QEMU work on an image with lazy refcounts, and die."""
    words = [word for command in [*commands, "flush", "abort"] for word in ("-c", command)]
    subprocess.run(["qemu-io", *words, path], capture_output=True, check=False)
    assert path.read_bytes()[DIRTY_PLACE] & 1
    found = subprocess.run(["qemu-img", "check", path], capture_output=True, check=False)
    assert found.returncode == 2


@pytest.mark.parametrize("refcount_bits", [1, 16, 64])
@pytest.mark.parametrize("cluster_size", [512, 65536])
async def test_image_that_qemu_left_dirty_is_repaired_before_it_is_written(
    folder: Path, cluster_size: int, refcount_bits: int
) -> None:
    path = folder / "disk.qcow2"
    options = f"lazy_refcounts=on,cluster_size={cluster_size},refcount_bits={refcount_bits}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(2 * MIB))
    qemu_io(path, ["write -P 3 1M 300k"])
    leave_dirty(path, ["write -P 5 0 700k", "discard 1M 64k"])
    before = path.read_bytes()
    await (await Qcow2Image.open(path, read_only=True)).close()
    assert path.read_bytes() == before
    image = await Qcow2Image.open(path, read_only=False)
    assert not path.read_bytes()[DIRTY_PLACE] & 1
    guest = Guest(image, cluster_size, random.Random(1))
    guest.content[: 700 << 10] = b"\5" * (700 << 10)
    guest.content[MIB + 65536 : MIB + (300 << 10)] = b"\3" * ((300 << 10) - 65536)
    await guest.check_all()
    await guest.steps(60)
    await image.close()
    check(path)
    assert qemu_content(path) == guest.content


async def test_power_cut_inside_the_repair_leaves_an_image_that_can_be_repaired(
    folder: Path,
) -> None:
    path = folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, str(2 * MIB))
    leave_dirty(path, ["write -P 5 0 700k"])
    rng = random.Random(2)
    disk = CrashingDisk(path.read_bytes())
    crashed = folder / "crashed.qcow2"
    cuts = 0

    async def question() -> None:
        nonlocal cuts
        for _ in range(3):
            crashed.write_bytes(disk.log.crash(len(disk.log.records), rng).content)
            if not crashed.read_bytes()[DIRTY_PLACE] & 1:
                check(crashed)
            await (await Qcow2Image.open(crashed, read_only=False)).close()
            check(crashed)
            assert qemu_content(crashed)[: 700 << 10] == b"\5" * (700 << 10)
            cuts += 1

    disk.question = question  # type: ignore[method-assign]  # the test's own hook
    await (await Qcow2Image.from_file(disk)).close()
    assert cuts


async def test_dirty_image_that_is_also_damaged_is_not_written(folder: Path) -> None:
    path = folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, str(2 * MIB))
    qemu_io(path, ["write 0 1M"])
    content = bytearray(path.read_bytes())
    l1 = int.from_bytes(content[40:48], "big")
    l2 = int.from_bytes(content[l1 : l1 + 8], "big") & ~(1 << 63)
    content[l2 : l2 + 8] = (1 << 63 | l1 + 512).to_bytes(8, "big")  # no cluster begins there
    content[DIRTY_PLACE] |= 1
    path.write_bytes(content)
    with pytest.raises(ImageError, match="beyond repair"):
        await Qcow2Image.open(path, read_only=False)
    assert path.read_bytes()[l1 : l1 + 65536] == content[l1 : l1 + 65536]


async def test_image_that_was_only_marked_dirty_is_clean_after_the_first_opening(
    folder: Path,
) -> None:
    path = folder / "disk.qcow2"
    await create_image(path, MIB, lazy_refcounts=True)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:DIRTY_PLACE] + b"\1" + content[DIRTY_PLACE + 1 :])
    await (await Qcow2Image.open(path, read_only=False)).close()
    assert path.read_bytes() == content
