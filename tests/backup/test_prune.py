"""Pruning removes points and changes no other; a crash leaves it done or not begun."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from pathlib import Path

import pytest

from nbdfleece.backup import BackupError, ChecksumError, prune, surplus, verify
from nbdfleece.backup.directory import BackupDirectory
from nbdfleece.backup.manifest import Compression
from nbdfleece.errors import StateError, UsageError

from .histories import SIZE, History
from .programs import content_of, run

COUNT = 4


@pytest.fixture
async def history(tmp_path: Path) -> History:
    history = History(tmp_path)
    await history.build(COUNT)
    return history


async def check(history: History, names: set[str]) -> None:
    """These points are there, sound, and what they were."""
    directory = history.directory
    assert set(directory.point_names()) == names
    assert (await verify(directory)).problems == []
    for name in names:
        image = directory.file_path(directory.point(name).disks[0])
        run("qemu-img", "check", image)
        assert content_of(image)[:SIZE] == history.contents[name]
    expected = {f"{name}{ending}" for name in names for ending in (".json", ".vda.qcow2")}
    assert {path.name for path in directory.path.iterdir()} == {".lock", *expected}


ALL = [f"p{number}" for number in range(COUNT)]


@pytest.mark.parametrize(
    "doomed",
    [words for count in range(COUNT) for words in itertools.combinations(ALL, count)],
    ids=",".join,
)
async def test_any_points_can_go(history: History, doomed: tuple[str, ...]) -> None:
    await prune(history.directory, doomed)
    await check(history, set(ALL) - set(doomed))


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("doomed", [("p0",), ("p1", "p2")])
async def test_merged_point_is_compressed_as_what_it_is_made_of(
    tmp_path: Path, compression: Compression, doomed: tuple[str, ...]
) -> None:
    history = History(tmp_path, compression=compression)
    await history.build(COUNT)
    await prune(history.directory, doomed)
    await check(history, set(ALL) - set(doomed))
    for point in history.directory.points():
        assert point.disks[0].compression == compression
        image = history.directory.file_path(point.disks[0])
        assert f"compression type: {compression}" in run("qemu-img", "info", image)
        assert "% compressed" in run("qemu-img", "check", image)


async def test_points_that_build_on_one_point_all_get_its_changes(
    tmp_path: Path, history: History
) -> None:
    """Two points on ``p1``: ``p2``, and ``p2`` pulled again as ``p9``."""
    other = BackupDirectory(tmp_path / "other")
    shutil.copytree(history.directory.path, other.path)
    await prune(other, ["p0"])
    shutil.copy(history.directory.path / "p2.vda.qcow2", history.directory.path / "p9.vda.qcow2")
    point = history.directory.point("p2")
    point.name = "p9"
    point.disks[0].file = "p9.vda.qcow2"
    history.directory.publish(point)
    history.contents["p9"] = history.contents["p2"]
    await prune(history.directory, ["p1"])
    await check(history, {"p0", "p2", "p3", "p9"})


async def test_keeping_the_newest_merges_all_others(history: History) -> None:
    assert surplus(history.directory, 10) == []
    doomed = surplus(history.directory, 1)
    assert doomed == ALL[:-1]
    await prune(history.directory, doomed)
    await check(history, {"p3"})
    assert history.directory.point("p3").disks[0].kind == "full"


async def test_nothing_left_or_unknown_is_refused(history: History) -> None:
    with pytest.raises(UsageError, match="no restore point would be left"):
        await prune(history.directory, ALL)
    with pytest.raises(BackupError, match="no restore point 'x'"):
        await prune(history.directory, ["x"])
    await check(history, set(ALL))


async def test_directory_in_use_is_refused(history: History) -> None:
    with history.directory.reading(), pytest.raises(StateError, match="in use"):
        await prune(history.directory, ["p0"])
    with history.directory.writing(), pytest.raises(StateError, match="under way"):
        await prune(history.directory, ["p0"])
    await check(history, set(ALL))


async def test_damaged_layer_is_not_merged(history: History) -> None:
    path = history.directory.path / "p1.vda.qcow2"
    whole = path.read_bytes()
    history.damage("p1")
    with pytest.raises(ChecksumError):
        await prune(history.directory, ["p1"])
    path.write_bytes(whole)
    await prune(history.directory, [])
    await check(history, set(ALL))


class Crash(Exception):
    """Stands for SIGKILL: nothing after it happens."""


@pytest.mark.parametrize("steps", range(12))
async def test_prune_cut_anywhere_is_done_or_not_begun(
    history: History, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut before the n-th rename or removal, of all that the prune does."""
    left = steps

    def count(function: object) -> object:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal left
            if left == 0:
                raise Crash
            left -= 1
            return function(*args, **kwargs)  # type: ignore[operator]  # Path's methods

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", count(Path.rename))
        patch.setattr(Path, "unlink", count(Path.unlink))
        patch.setattr("os.rename", count(os.rename))
        with contextlib.suppress(Crash):
            await prune(history.directory, ["p0", "p2"])
    with history.directory.reading():
        pass  # whoever comes next finishes it
    names = set(history.directory.point_names())
    assert names in (set(ALL), {"p1", "p3"})
    await prune(history.directory, [])
    await check(history, names)
