"""Changes of bitmaps over several images: all or nothing, wherever the process is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nbdfleece.block.file import FileNode
from nbdfleece.engine import offline
from nbdfleece.engine.chain import PendingChange
from nbdfleece.engine.disk import Disk, ScratchOptions
from nbdfleece.engine.engine import Engine
from nbdfleece.errors import ImageLockedError, StateError
from nbdfleece.export.export import ExportTable

from .rig import make_image, open_engine, stored_bitmaps, write

NAMES = ("one", "two", "three")


class Killed(BaseException):
    """The process is no more."""


def make_images(folder: Path) -> list[Path]:
    """Images with a bitmap ``b`` that marks something and an empty ``c``, made by QEMU."""
    paths = [folder / name for name in NAMES]
    for path in paths:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "16M"], check=True)
        subprocess.run(["qemu-img", "bitmap", "--add", path, "b"], check=True)
        subprocess.run(["qemu-img", "bitmap", "--add", "--disable", path, "c"], check=True)
        subprocess.run(["qemu-io", "-c", "write 1M 64k", path], check=True, capture_output=True)
    return paths


def as_qemu_sees(path: Path) -> dict[str, list[str]]:
    """Names and flags of bitmaps."""
    printed = subprocess.check_output(["qemu-img", "info", "--output=json", path])
    data: dict[str, Any] = json.loads(printed)["format-specific"]["data"]
    return {each["name"]: each["flags"] for each in data.get("bitmaps", [])}


async def dirty(path: Path) -> dict[str | None, int | None]:
    return {each.name: each.dirty_bytes for each in await offline.list_bitmaps(path)}


CHANGES = {
    "add": PendingChange(operation="add", bitmap="new", granularity=4096),
    "remove": PendingChange(operation="remove", bitmap="b"),
    "clear": PendingChange(operation="clear", bitmap="b"),
    "enable": PendingChange(operation="enable", bitmap="c"),
    "disable": PendingChange(operation="disable", bitmap="b"),
    "merge": PendingChange(operation="merge", bitmap="c", sources=("b",)),
}
EXPECTED = {
    "add": ({"b": ["auto"], "c": [], "new": ["auto"]}, {"b": 65536, "c": 0, "new": 0}),
    "remove": ({"c": []}, {"c": 0}),
    "clear": ({"b": ["auto"], "c": []}, {"b": 0, "c": 0}),
    "enable": ({"b": ["auto"], "c": ["auto"]}, {"b": 65536, "c": 0}),
    "disable": ({"b": [], "c": []}, {"b": 65536, "c": 0}),
    "merge": ({"b": ["auto"], "c": []}, {"b": 65536, "c": 65536}),
}
UNCHANGED = ({"b": ["auto"], "c": []}, {"b": 65536, "c": 0})


async def outcome(path: Path) -> tuple[dict[str, list[str]], dict[str | None, int | None]]:
    return as_qemu_sees(path), await dirty(path)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", CHANGES)
async def test_change_is_done_on_all_images(tmp_path: Path, name: str, count: int) -> None:
    """And QEMU sees it."""
    paths = make_images(tmp_path)[:count]
    await offline.change_bitmaps(paths, CHANGES[name])
    for path in paths:
        assert await outcome(path) == EXPECTED[name]
        done = subprocess.run(["qemu-img", "check", "-q", path])
        assert done.returncode == 0
        async with offline.open_images([path], read_only=True) as [opened]:
            assert opened.chain.change is None


class Mortal:
    """Kills the process, as far as files can tell, at one of their writes."""

    def __init__(self, patch: pytest.MonkeyPatch, writes_left: int) -> None:
        self.writes_left = writes_left
        self.is_dead = False
        for name in ("write", "write_zeroes", "trim", "grow", "shrink", "flush"):
            patch.setattr(FileNode, name, self._mortal(getattr(FileNode, name), name))

    def _mortal(self, original: Any, name: str) -> Any:
        async def call(node: FileNode, *arguments: Any, **options: Any) -> Any:
            if name == "write" and not self.is_dead:
                self.is_dead = self.writes_left == 0
                self.writes_left -= 1
            if self.is_dead:
                raise Killed
            return await original(node, *arguments, **options)

        return call


async def kill_at(paths: list[Path], change: PendingChange, write: int) -> bool:
    """Change, and be killed at a write; whether it was reached."""
    with pytest.MonkeyPatch.context() as patch:
        mortal = Mortal(patch, write)
        with contextlib.suppress(Killed):
            await offline.change_bitmaps(paths, change)
        return mortal.is_dead


@pytest.mark.parametrize("name", ["clear", "add", "merge"])
async def test_kill_at_any_write_leaves_all_or_nothing(tmp_path: Path, name: str) -> None:
    """Rule 6: what the next command over the same images settles is the same on all of them."""
    before, work = tmp_path / "before", tmp_path / "work"
    before.mkdir()
    make_images(before)
    outcomes = set()
    write, is_reached = 0, True
    while is_reached:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(before, work)
        paths = [work / each for each in NAMES]
        is_reached = await kill_at(paths, CHANGES[name], write)
        # The order in which images are named is of no matter.
        await offline.settle_images(paths[::-1])
        found = [await dirty(path) for path in paths]
        assert found[0] == found[1] == found[2], f"killed at write {write}"
        assert found[0] in (UNCHANGED[1], EXPECTED[name][1])
        outcomes.add(found[0] == EXPECTED[name][1])
        write += 1
        assert write < 200
    assert outcomes == {True, False}
    assert write > 3 * 3 * 3
    for path in paths:
        assert as_qemu_sees(path) == EXPECTED[name][0]


@pytest.mark.parametrize("size", [40 << 20, 1 << 20])
async def test_kill_at_any_write_of_a_resize_leaves_whole_checkpoints_or_none(
    tmp_path: Path, size: int
) -> None:
    """Rule 2: a bitmap is there with all that is new, or is not; rule 4: the image is sound."""
    before, work = tmp_path / "before", tmp_path / "work"
    make_image(before, 16 << 20, "cluster_size=4k")
    engine = await open_engine(tmp_path, before)
    await engine.create_checkpoint("monday")
    await write(engine, "before", 0, b"x")
    await engine.close()
    outcomes = set()
    count, is_reached = 0, True
    while is_reached:
        shutil.copyfile(before, work)
        with pytest.MonkeyPatch.context() as patch:
            mortal = Mortal(patch, count)
            with contextlib.suppress(Killed):
                await offline.resize_disk(work, size, shrink=True)
            is_reached = mortal.is_dead
        stored_bitmaps(work, after_kill=True)
        async with offline.open_images([work], read_only=True) as [opened]:
            now = opened.image.size
            found = []
            if opened.store.entries:
                found = [*(await opened.changes_since("monday")).dirty_ranges()]
            else:
                with pytest.raises(StateError, match="'monday' is missing in the image"):
                    await opened.changes_since("monday")
        new = [(16 << 20, now - (16 << 20))] if now > 16 << 20 else []
        assert found in ([], [(0, 4096), *new])
        outcomes.add((now, bool(found)))
        count += 1
        assert count < 200
    assert outcomes == {(16 << 20, True), (16 << 20, False), (size, False), (size, True)}


async def interrupted(folder: Path, name: str) -> list[Path]:
    """Images of which only the first has done a change."""
    paths = make_images(folder)
    opened = []
    with pytest.MonkeyPatch.context() as patch:
        original = offline.OfflineImage.replace

        async def replace(image: offline.OfflineImage, bitmaps: Any, chain: Any) -> None:
            if chain.change is not None and chain.change.done and opened:
                raise Killed
            await original(image, bitmaps, chain)
            if chain.change is not None and chain.change.done:
                opened.append(image)

        patch.setattr(offline.OfflineImage, "replace", replace)
        with pytest.raises(Killed):
            await offline.change_bitmaps(paths, CHANGES[name])
    return paths


async def test_interrupted_images_are_refused_unless_all_are_there(tmp_path: Path) -> None:
    """By other changes and by the engine; the message names them all."""
    paths = await interrupted(tmp_path, "clear")
    expected = "'clear' of bitmap 'b' was interrupted on the images one, two, three"
    with pytest.raises(StateError, match=expected):
        await offline.change_bitmaps(paths[:2], CHANGES["add"])
    with pytest.raises(StateError, match=expected):
        await Disk.open("vda", paths[2], ScratchOptions(directory=tmp_path))
    with pytest.raises(StateError, match=expected):
        await offline.resize_disk(paths[0], 32 << 20)
    await offline.change_bitmaps(paths, CHANGES["add"])
    for path in paths:
        assert await dirty(path) == {"b": 0, "c": 0, "new": 0}


async def test_change_is_not_done_late_where_qemu_has_recorded_since(tmp_path: Path) -> None:
    """Rule 2: clearing would lose what was recorded in between."""
    paths = await interrupted(tmp_path, "clear")
    subprocess.run(["qemu-io", "-c", "write 9M 64k", paths[2]], check=True, capture_output=True)
    with pytest.raises(StateError, match="written by another program"):
        await offline.settle_images(paths)
    assert (await dirty(paths[2]))["b"] == 2 * 65536
    await offline.settle_images(paths, forget=True)
    assert [(await dirty(path))["b"] for path in paths] == [0, 65536, 2 * 65536]
    await offline.change_bitmaps(paths, CHANGES["clear"])
    assert [(await dirty(path))["b"] for path in paths] == [0, 0, 0]


async def test_change_that_one_image_refuses_is_done_on_none(tmp_path: Path) -> None:
    paths = make_images(tmp_path)
    await offline.change_bitmaps(paths[2:], CHANGES["add"])
    contents = [path.read_bytes() for path in paths]
    with pytest.raises(StateError, match="three: bitmap 'new' exists already"):
        await offline.change_bitmaps(paths, CHANGES["add"])
    assert [path.read_bytes() for path in paths] == contents


async def test_image_without_room_for_the_note_leaves_the_others_alone(tmp_path: Path) -> None:
    """512-byte clusters have hardly room for a record; alone such an image needs none."""
    name = random.Random(1).randbytes(120).hex()
    change = PendingChange(operation="add", bitmap=name)
    paths = make_images(tmp_path)
    small = tmp_path / "small"
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", small, "1M"]
    subprocess.run(words, check=True)
    with pytest.raises(StateError, match="use larger clusters"):
        await offline.change_bitmaps([*paths, small], change)
    for path in paths:
        assert await outcome(path) == UNCHANGED
        async with offline.open_images([path], read_only=True) as [opened]:
            assert opened.chain.change is None
    await offline.change_bitmaps([small], change)
    assert as_qemu_sees(small) == {name: ["auto"]}


async def test_bitmap_of_a_checkpoint_is_refused_with_its_name(tmp_path: Path) -> None:
    path = make_images(tmp_path)[0]
    engine = Engine(ExportTable(), ScratchOptions(directory=tmp_path))
    await engine.open_disk("vda", path)
    await engine.create_checkpoint("monday")
    await engine.close()
    change = PendingChange(operation="clear", bitmap="monday")
    with pytest.raises(StateError, match="belongs to checkpoint 'monday'"):
        await offline.change_bitmaps([path], change)
    await offline.change_bitmaps([path], CHANGES["remove"])
    [found] = await offline.list_checkpoints([path])
    assert (found.name, found.state) == ("monday", "committed")
    assert found.disks[str(path)].problem is None


async def test_inconsistent_bitmap_can_only_be_removed(tmp_path: Path) -> None:
    path = make_images(tmp_path)[0]
    with subprocess.Popen(
        ["qemu-io", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(b"write 0 64k\n")
        other.stdin.flush()
        await asyncio.to_thread(other.stdout.readline)
        other.kill()
    for name in ("clear", "disable"):
        with pytest.raises(StateError, match="inconsistent and can only be removed"):
            await offline.change_bitmaps([path], CHANGES[name])
    await offline.change_bitmaps([path], CHANGES["remove"])
    assert list(as_qemu_sees(path)) == ["c"]


async def test_image_named_twice_is_refused(tmp_path: Path) -> None:
    path = make_images(tmp_path)[0]
    linked = tmp_path / "linked"
    linked.hardlink_to(path)
    with pytest.raises((StateError, ImageLockedError)):
        await offline.change_bitmaps([path, linked], CHANGES["add"])


async def test_changes_since_a_checkpoint_are_the_union_of_the_chain(tmp_path: Path) -> None:
    """Rule 2: what is not known to be complete is refused, with the link that is broken."""
    path = make_images(tmp_path)[0]
    engine = await open_engine(tmp_path, path)
    for number, name in enumerate(["monday", "tuesday"]):
        await engine.create_checkpoint(name)
        await write(engine, path.stem, (number + 4) << 20, b"x")
    await engine.close()
    async with offline.open_images([path], read_only=True) as [image]:
        both = list((await image.changes_since("monday")).dirty_ranges())
        last = list((await image.changes_since("tuesday")).dirty_ranges())
        with pytest.raises(StateError, match="there is no checkpoint 'sunday'"):
            await image.changes_since("sunday")
    assert [offset for offset, _ in both] == [4 << 20, 5 << 20]
    assert [offset for offset, _ in last] == [5 << 20]
    subprocess.run(["qemu-img", "bitmap", "--remove", path, "tuesday"], check=True)
    async with offline.open_images([path], read_only=True) as [image]:
        with pytest.raises(StateError, match="not known: bitmap 'tuesday' is missing"):
            await image.changes_since("monday")
