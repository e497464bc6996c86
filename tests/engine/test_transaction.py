"""Transactions across a kill: what QEMU finds in the images is all of it or nothing (rule 6)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from nbdfleece.block.file import FileNode
from nbdfleece.engine import joint, offline
from nbdfleece.engine.bitmaps import (
    AddBitmap,
    ClearBitmap,
    MergeBitmaps,
    RemoveBitmap,
    SetRecording,
)
from nbdfleece.engine.chain import PendingChange
from nbdfleece.engine.disk import Disk
from nbdfleece.engine.disk_state import DiskState
from nbdfleece.engine.transaction import Action
from nbdfleece.errors import StateError
from tests.engine.rig import CLUSTER, killed, make_image, open_engine, stored_bitmaps, write

BEFORE = {"a", "b"}
AFTER = {"b", "c", "d"}


async def test_kill_after_any_write_leaves_all_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_image(tmp_path / "vda.qcow2")
    engine = await open_engine(tmp_path, image)
    disk = engine.disk("vda")

    def add(name: str) -> AddBitmap:
        return AddBitmap(node=disk, name=name, granularity=None, recording=False, persistent=True)

    await engine.transact([add("a"), add("b")])
    copies: list[Path] = []
    original = FileNode.write

    async def copying_write(file: FileNode, offset: int, data: memoryview) -> None:
        await original(file, offset, data)
        copies.append(Path(shutil.copyfile(image, tmp_path / f"killed-{len(copies)}.qcow2")))

    with monkeypatch.context() as patch:
        patch.setattr(FileNode, "write", copying_write)
        await engine.transact([RemoveBitmap(disk, "a"), add("c"), add("d")])
    await engine.close()
    found = [set(stored_bitmaps(copy, after_kill=True)) for copy in copies]
    switched = found.index(AFTER)
    assert switched > 0
    assert found[:switched] == [BEFORE] * switched
    assert found[switched:] == [AFTER] * (len(found) - switched)
    assert set(stored_bitmaps(image)) == AFTER


def add_to(disk: Disk, name: str) -> AddBitmap:
    return AddBitmap(node=disk, name=name, granularity=None, recording=True, persistent=True)


async def test_kill_at_any_write_of_two_images_leaves_all_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 6 over images: at the next start both have the old bitmaps, or both the new.

    Rule 2: whichever it is, what was written meanwhile is marked.
    """
    images = [make_image(tmp_path / f"{name}.qcow2") for name in ("vda", "vdb")]
    engine = await open_engine(tmp_path, *images)
    disks = list(engine.disks.values())

    await engine.transact([add_to(disk, name) for disk in disks for name in ("gone", "old")])
    for disk in disks:
        await write(engine, disk.name, 0, b"x" * 512)
    copies: list[Path] = []
    original = FileNode.write

    async def copying_write(file: FileNode, offset: int, data: memoryview) -> None:
        await original(file, offset, data)
        copies.append(tmp_path / f"killed-{len(copies)}")
        copies[-1].mkdir()
        for image in images:
            shutil.copyfile(image, copies[-1] / image.name)

    with monkeypatch.context() as patch:
        patch.setattr(FileNode, "write", copying_write)
        changes: list[Action] = []
        for disk in disks:
            changes += [RemoveBitmap(disk, "gone"), SetRecording(disk, "old", enabled=False)]
            changes += [add_to(disk, "new"), MergeBitmaps(disk, "new", [(disk, "old")])]
        await engine.transact(changes)
    await engine.close()
    found = [await _after_kill(copy, images) for copy in copies]
    switched = found.index("new")
    assert found == ["old"] * switched + ["new"] * (len(found) - switched)
    assert 0 < switched < len(found) - 1
    for image in images:
        assert stored_bitmaps(image) == {"old": [], "new": ["auto"]}


async def _after_kill(folder: Path, images: list[Path]) -> str:
    """Which state the next start finds in all images; it marks what it must, and is settled."""
    paths = [folder / image.name for image in images]
    engine = await open_engine(folder, *paths)
    states = set()
    for disk in engine.disks.values():
        names = {name: bitmap.recording for name, bitmap in disk.state.bitmaps.items()}
        states.add("new" if "new" in names else "old")
        if "new" in names:
            assert names == {"old": False, "new": True}
        else:
            assert names == {"gone": True, "old": True}
        for name in names:
            assert (await disk.bits(name)).extents(0, 512).status.tolist() == [1]
        assert disk.state.chain.joint is None
        assert not any(disk.busy.values())
    await engine.close()
    for path in paths:
        stored_bitmaps(path, after_kill=True)
    (state,) = states
    return state


async def test_image_that_fails_while_two_are_prepared_leaves_both_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [make_image(tmp_path / f"{name}.qcow2") for name in ("vda", "vdb")]
    engine = await open_engine(tmp_path, *images)
    first, second = engine.disks.values()

    def add(name: str) -> list[AddBitmap]:
        return [add_to(disk, name) for disk in (first, second)]

    await engine.transact(add("a"))

    async def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "vdb.qcow2")

    with monkeypatch.context() as patch:
        patch.setattr(second._store, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            await engine.transact(add("b"))
    for disk in (first, second):
        assert set(disk.state.bitmaps) == {"a"}
        assert len(disk.node.recording) == 1
    await engine.transact(add("b"))
    await engine.close()
    for image in images:
        assert set(stored_bitmaps(image)) == {"a", "b"}


async def test_image_that_fails_once_it_is_decided_follows_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction has happened; guest writes are marked by the new bitmap all the same."""
    images = [make_image(tmp_path / f"{name}.qcow2") for name in ("vda", "vdb")]
    engine = await open_engine(tmp_path, *images)
    first, second = engine.disks.values()
    replace, calls = second._store.replace, []

    async def fail_late(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) > 2:  # identity and preparation
            raise OSError(5, "Input/output error", "vdb.qcow2")
        await replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(second._store, "replace", fail_late)
        await engine.transact([add_to(disk, "b") for disk in (first, second)])
        await write(engine, "vdb", CLUSTER, b"x" * 512)
        copies = await killed(engine, tmp_path)
    assert len(calls) > 2
    again = await open_engine(tmp_path, *copies)
    assert {name: set(disk.state.bitmaps) for name, disk in again.disks.items()} == {
        "vda": {"b"},
        "vdb": {"b"},
    }
    assert (await again.disk("vdb").bits("b")).extents(CLUSTER, 512).status.tolist() == [1]
    await again.close()
    await engine.close()


async def test_interrupted_transaction_waits_for_all_of_its_disks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can know from one disk whether it was decided: its bitmaps stay busy."""
    images = [make_image(tmp_path / f"{name}.qcow2") for name in ("vda", "vdb")]
    engine = await open_engine(tmp_path, *images)
    disks = list(engine.disks.values())

    def add(name: str) -> list[AddBitmap]:
        return [add_to(disk, name) for disk in disks]

    await engine.transact(add("a"))
    copies: list[Path] = []

    async def copy(part: Disk, state: DiskState) -> None:
        copies.extend(await killed(engine, tmp_path))
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(joint, "_finish", copy)
        with pytest.raises(OSError, match="Input/output"):
            await engine.transact([*add("b"), *(RemoveBitmap(disk, "a") for disk in disks)])
    await engine.close()
    alone = await open_engine(tmp_path, copies[0])
    with pytest.raises(StateError, match="currently in use"):
        await alone.transact([ClearBitmap(alone.disk("vda"), "a")])
    await alone.close()
    with pytest.raises(StateError, match="bitmap settle"):
        await offline.change_bitmaps([copies[0]], PendingChange(operation="add", bitmap="n"))
    with pytest.raises(StateError, match="bitmap settle"):
        await offline.resize_disk(copies[0], 1 << 30)
    with pytest.raises(StateError, match="bitmap settle"):
        await offline.settle_images([copies[0]])
    settled = [Path(shutil.copyfile(each, f"{each}.settled")) for each in copies]
    await offline.settle_images(settled)
    forgotten = shutil.copyfile(copies[1], f"{copies[1]}.forgotten")
    await offline.settle_images([Path(forgotten)], forget=True)
    for path in (*settled, Path(forgotten)):
        assert set(stored_bitmaps(path, after_kill=True)) == {"a"}
    together = await open_engine(tmp_path, *copies)
    assert [set(disk.state.bitmaps) for disk in together.disks.values()] == [{"a"}, {"a"}]
    await together.transact([ClearBitmap(disk, "a") for disk in together.disks.values()])
    await together.close()
