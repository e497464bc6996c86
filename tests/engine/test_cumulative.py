"""To and from libvirt's cumulative bitmaps: every question is answered as before."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from nbdfleece.engine import cumulative
from nbdfleece.engine.engine import Engine
from nbdfleece.errors import StateError
from tests.engine.rig import (
    CLUSTER,
    dirty_clusters,
    make_image,
    open_engine,
    qemu_img,
    stored_bitmaps,
    write,
)

NAMES = ["c1", "c2", "c3"]


def qemu_write(image: Path, cluster: int) -> None:
    command = ["qemu-io", "-f", "qcow2", "-c", f"write {cluster * CLUSTER} 64k", str(image)]
    subprocess.run(command, check=True, capture_output=True)


def qemu_dirty(image: Path, bitmap: str) -> set[int]:
    """The dirty clusters of a bitmap as qemu-nbd serves it."""
    serve = ["qemu-nbd", "-r", "-f", "qcow2", "-B", bitmap, str(image)]
    command = ["nbdinfo", f"--map=qemu:dirty-bitmap:{bitmap}", "--json", "--", "[", *serve, "]"]
    told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return {
        cluster
        for extent in told
        if extent["type"]
        for cluster in range(
            extent["offset"] // CLUSTER, (extent["offset"] + extent["length"]) // CLUSTER
        )
    }


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image with three bitmaps as libvirt keeps them, written by QEMU."""
    path = make_image(tmp_path / "vda.qcow2")
    for number, name in enumerate(NAMES):
        qemu_img("bitmap", "--add", path, name)
        qemu_write(path, number)
        qemu_write(path, 10)
    return path


async def since(engine: Engine, name: str) -> set[int]:
    await engine.begin_backup("look", since=name)
    try:
        return await dirty_clusters(engine, "look/vda", name)
    finally:
        await engine.abort_backup("look")


async def test_adopted_chain_answers_as_the_cumulative_bitmaps_did(
    tmp_path: Path, image: Path
) -> None:
    before = {name: qemu_dirty(image, name) for name in NAMES}
    assert before == {"c1": {0, 1, 2, 10}, "c2": {1, 2, 10}, "c3": {2, 10}}
    engine = await open_engine(tmp_path, image)
    disk = engine.disk("vda")
    await engine.change_bitmaps(disk, lambda disk: cumulative.adopted(disk, NAMES, owner="me"))
    assert {name: await since(engine, name) for name in NAMES} == before
    await write(engine, "vda", 20 * CLUSTER, b"x")
    assert {name: await since(engine, name) for name in NAMES} == {
        name: found | {20} for name, found in before.items()
    }
    assert len(disk.node.recording) == 1, "one bitmap records now"
    await engine.close()
    assert stored_bitmaps(image) == {"c1": [], "c2": [], "c3": ["auto"]}


async def test_handed_over_bitmaps_answer_as_the_chain_did(tmp_path: Path, image: Path) -> None:
    engine = await open_engine(tmp_path, image)
    disk = engine.disk("vda")
    await engine.change_bitmaps(disk, lambda disk: cumulative.adopted(disk, NAMES))
    await write(engine, "vda", 20 * CLUSTER, b"x")
    before = {name: await since(engine, name) for name in NAMES}
    await engine.change_bitmaps(disk, cumulative.handed_over)
    await write(engine, "vda", 30 * CLUSTER, b"x")
    assert len(disk.state.chain) == 0
    await engine.close()
    assert stored_bitmaps(image) == {name: ["auto"] for name in NAMES}
    assert {name: qemu_dirty(image, name) for name in NAMES} == {
        name: found | {30} for name, found in before.items()
    }
    qemu_write(image, 40)
    assert {name: qemu_dirty(image, name) for name in NAMES} == {
        name: found | {30, 40} for name, found in before.items()
    }


async def test_wrong_order_is_refused(tmp_path: Path, image: Path) -> None:
    engine = await open_engine(tmp_path, image)
    disk = engine.disk("vda")
    with pytest.raises(StateError, match="not cumulative"):
        await engine.change_bitmaps(disk, lambda disk: cumulative.adopted(disk, NAMES[::-1]))
    with pytest.raises(StateError, match="no bitmap 'c4'"):
        await engine.change_bitmaps(disk, lambda disk: cumulative.adopted(disk, ["c4"]))
    with pytest.raises(StateError, match="has no chain"):
        await engine.change_bitmaps(disk, cumulative.handed_over)
    assert len(disk.state.chain) == 0
    await engine.close()
    assert stored_bitmaps(image) == {name: ["auto"] for name in NAMES}


async def test_broken_chain_is_not_handed_over(tmp_path: Path, image: Path) -> None:
    engine = await open_engine(tmp_path, image)
    disk = engine.disk("vda")
    await engine.change_bitmaps(disk, lambda disk: cumulative.adopted(disk, NAMES))
    await engine.close()
    qemu_img("bitmap", "--remove", image, "c2")
    engine = await open_engine(tmp_path, image)
    with pytest.raises(StateError, match="'c2' is missing"):
        await engine.change_bitmaps(engine.disk("vda"), cumulative.handed_over)
    await engine.close()
