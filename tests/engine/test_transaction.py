"""Transactions across a kill: what QEMU finds in the images is all of it or nothing (rule 6)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nbdfleece.block.file import FileNode
from nbdfleece.engine.bitmaps import AddBitmap, RemoveBitmap
from tests.engine.rig import make_image, open_engine, stored_bitmaps

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
    write = FileNode.write

    async def copying_write(file: FileNode, offset: int, data: memoryview) -> None:
        await write(file, offset, data)
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
