"""Changes over a chain of overlays, by libvirt's rule: same name, granularity, all there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from nbdfleece.bitmaps.bitmap import Bitmap
from nbdfleece.engine.cumulative import adopted
from nbdfleece.engine.engine import Engine
from nbdfleece.engine.offline import open_images
from nbdfleece.engine.still_nodes import ReadOnlyImage
from nbdfleece.errors import StateError
from tests.engine.rig import (
    CLUSTER,
    dirty_clusters,
    make_image,
    open_engine,
    qemu_img,
    write,
)

OLD, NEW = "old", "new"


def write_by_qemu(path: Path, cluster: int) -> None:
    """As a guest of QEMU: recording bitmaps mark it."""
    command = f"write -P 1 {cluster * CLUSTER} 512"
    subprocess.run(["qemu-io", "-c", command, path], check=True, capture_output=True)


def mark_in_use(path: Path, name: str) -> None:
    """As a program that was killed leaves a bitmap."""
    _set_bit(path, name, 9)  # its flags' last byte


def damage(path: Path, name: str) -> None:
    """A bitmap's table lies at no cluster."""
    _set_bit(path, name, 17)  # the last byte of its offset


def _set_bit(path: Path, name: str, before: int) -> None:
    """Change a byte of a bitmap's entry, in every directory that the file has had."""
    data = bytearray(path.read_bytes())
    at = data.find(name.encode())
    while at >= 0:
        if data[at - 8] == 1:  # the type of the entry that ends with this name
            data[at - before] |= 1
        at = data.find(name.encode(), at + 1)
    path.write_bytes(data)


def make_overlay(path: Path, base: Path, *bitmaps: str) -> Path:
    """What libvirt makes: an image over another one, with bitmaps of the same names."""
    qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", path)
    for name in bitmaps:
        qemu_img("bitmap", "--add", path, name)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Two cumulative bitmaps, as libvirt keeps them: cluster 1 is old, cluster 2 is new."""
    path = make_image(tmp_path / "base.qcow2")
    for number, name in enumerate((OLD, NEW), start=1):
        qemu_img("bitmap", "--add", path, name)
        write_by_qemu(path, number)
    return path


async def backup(engine: Engine, since: str) -> dict[str, set[int] | str]:
    """What each disk is told to have changed, or why that is not known."""
    parts = await engine.begin_backup("b", since=since)
    found: dict[str, set[int] | str] = {}
    for part in parts:
        if part.reason is not None:
            found[part.disk] = part.reason
        else:
            found[part.disk] = await dirty_clusters(engine, part.export, since)
    await engine.abort_backup("b")
    return found


async def offline_changes(path: Path, since: str) -> set[int]:
    """What an image that no server has open tells to have changed."""
    async with open_images([path], read_only=True) as [image]:
        return clusters_of(await image.changes_since(since))


def clusters_of(bitmap: Bitmap) -> set[int]:
    """The clusters that are dirty."""
    found = bitmap.dirty_ranges()
    return {at // CLUSTER for offset, size in found for at in range(offset, offset + size, CLUSTER)}


async def adopt(engine: Engine, disk: str) -> None:
    await engine.change_bitmaps(engine.disk(disk), lambda each: adopted(each, [OLD, NEW]))


async def test_layers_bitmaps_are_merged(tmp_path: Path, base: Path) -> None:
    """Of libvirt's chain, adopted in the top image only; three images."""
    middle = make_overlay(tmp_path / "middle.qcow2", base, OLD, NEW)
    write_by_qemu(middle, 3)
    top = make_overlay(tmp_path / "top.qcow2", middle, OLD, NEW)
    write_by_qemu(top, 4)
    engine = await open_engine(tmp_path, top)
    await adopt(engine, "top")
    await write(engine, "top", 5 * CLUSTER, b"x")
    assert await backup(engine, OLD) == {"top": {1, 2, 3, 4, 5}}
    assert await backup(engine, NEW) == {"top": {2, 3, 4, 5}}
    await engine.close()
    assert await offline_changes(top, OLD) == {1, 2, 3, 4, 5}
    assert await offline_changes(top, NEW) == {2, 3, 4, 5}


async def test_changes_of_an_image_that_stays_open_can_be_asked_for_again(
    tmp_path: Path, base: Path
) -> None:
    """The images behind are looked at once: their bitmaps' own clusters are known then."""
    top = make_overlay(tmp_path / "top.qcow2", base, OLD, NEW)
    write_by_qemu(top, 4)
    engine = await open_engine(tmp_path, top)
    await adopt(engine, "top")
    await engine.close()
    shown = await ReadOnlyImage.open("top", top, [])
    async with open_images([top], read_only=True) as [image]:
        for each in (image, shown):
            assert clusters_of(await each.changes_since(OLD)) == {1, 2, 4}
            assert clusters_of(await each.changes_since(NEW)) == {2, 4}
    await shown.image.close()


async def test_chain_of_a_backing_image_counts_from_its_checkpoint_on(
    tmp_path: Path, base: Path
) -> None:
    """Ours in both images: the base's links from the checkpoint to its end."""
    below = await open_engine(tmp_path, base)
    await adopt(below, "base")
    await below.create_checkpoint("last")
    await write(below, "base", 6 * CLUSTER, b"x")
    await below.close()
    top = make_overlay(tmp_path / "top.qcow2", base, OLD, NEW)
    engine = await open_engine(tmp_path, top)
    await adopt(engine, "top")
    await write(engine, "top", 7 * CLUSTER, b"x")
    assert await backup(engine, OLD) == {"top": {1, 2, 6, 7}}
    assert await backup(engine, NEW) == {"top": {2, 6, 7}}
    await engine.create_snapshot("s")
    export = await engine.add_export("s", "top", between={"x": (OLD, NEW)})
    assert await dirty_clusters(engine, export.name, "x") == {1}
    await engine.close()


async def test_checkpoint_of_the_overlay_alone_needs_no_other(tmp_path: Path, base: Path) -> None:
    engine = await open_engine(tmp_path, make_overlay(tmp_path / "top.qcow2", base))
    await engine.create_checkpoint("own")
    await write(engine, "top", 7 * CLUSTER, b"x")
    assert await backup(engine, "own") == {"top": {7}}
    await engine.close()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("missing in the middle", "middle.qcow2' has no bitmap of that name, though"),
        ("disabled", "base.qcow2: bitmap 'old' was disabled and has missed changes"),
        ("granularity", "base.qcow2: bitmap 'old' is not of granularity 65536"),
        ("in use", "base.qcow2: bitmap 'old' is inconsistent"),
        ("damaged", "base.qcow2: bitmap 'old' is damaged: "),
        ("missing at the top", "top.qcow2' has no such checkpoint, though an image behind it has"),
    ],
)
async def test_gap_makes_that_disk_full_and_says_why(
    tmp_path: Path, base: Path, fault: str, reason: str
) -> None:
    """The other disk's backup is incremental all the same."""
    if fault == "disabled":
        qemu_img("bitmap", "--disable", base, OLD)
    if fault == "granularity":
        qemu_img("bitmap", "--remove", base, OLD)
        qemu_img("bitmap", "--add", "-g", "128k", base, OLD)
    if fault == "in use":
        mark_in_use(base, OLD)
    names = [NEW] if fault == "missing in the middle" else [OLD, NEW]
    middle = make_overlay(tmp_path / "middle.qcow2", base, *names)
    top = make_overlay(tmp_path / "top.qcow2", middle, OLD, NEW)
    other = make_image(tmp_path / "other.qcow2")
    for name in (OLD, NEW):
        qemu_img("bitmap", "--add", other, name)
    if fault == "damaged":
        damage(base, OLD)  # only now: qemu-img would not open it
    engine = await open_engine(tmp_path, top, other)
    await adopt(engine, "other")
    if fault != "missing at the top":
        await adopt(engine, "top")
    await write(engine, "other", 0, b"x")
    found = await backup(engine, OLD)
    assert found["other"] == {0}
    assert reason in str(found["top"])
    with pytest.raises(StateError, match="there is no checkpoint 'nobody'"):
        await engine.begin_backup("b", since="nobody")
    await engine.close()
    with pytest.raises(StateError, match=re.escape(reason)):
        await offline_changes(top, OLD)
