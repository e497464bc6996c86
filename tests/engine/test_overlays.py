"""Restores into an overlay that is committed or thrown away; snapshots that are written to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdfleece.engine.disk import ScratchOptions
from nbdfleece.engine.engine import Engine
from nbdfleece.engine.overlays import Overlays
from nbdfleece.errors import StateError
from tests.engine.rig import (
    CLUSTER,
    dirty_clusters,
    make_image,
    open_engine,
    read_export,
    stored_bitmaps,
    write,
)


async def _nobody(name: str) -> None:
    """Nobody is connected."""


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    engine = await open_engine(tmp_path, make_image(tmp_path / "vda.qcow2"))
    await write(engine, "vda", 0, b"old" * CLUSTER)
    yield engine
    await engine.close()


@pytest.fixture
def overlays(tmp_path: Path, engine: Engine) -> Overlays:
    return Overlays(engine, ScratchOptions(directory=tmp_path), _nobody)


async def write_overlay(engine: Engine, name: str, offset: int, data: bytes) -> None:
    export = engine.exports.find(name)
    assert export is not None
    assert not export.read_only
    await export.node.write(offset, memoryview(data))


async def test_committed_overlay_changes_the_disk_as_a_guest_would(
    engine: Engine, overlays: Overlays
) -> None:
    """The RFC's restore: bitmaps record what is committed, snapshots stay as they were."""
    await engine.create_checkpoint("before")
    await engine.create_snapshot("snap")
    await engine.add_export("snap", "vda")
    frozen = await read_export(engine, "vda")
    overlays.create("restore", "vda")
    await write_overlay(engine, "restore", CLUSTER, b"new")
    assert await read_export(engine, "vda") == frozen
    await overlays.commit("restore")
    expected = bytearray(frozen)
    expected[CLUSTER : CLUSTER + 3] = b"new"
    assert await read_export(engine, "vda") == expected
    assert await read_export(engine, "snap/vda") == frozen
    await engine.begin_backup("job", since="before")
    assert await dirty_clusters(engine, "job/vda", "before") == {1}
    assert not engine.exports.has("restore")


async def test_discarded_overlay_leaves_nothing(engine: Engine, overlays: Overlays) -> None:
    before = await read_export(engine, "vda")
    overlays.create("try", "vda")
    await write_overlay(engine, "try", 0, b"new")
    await overlays.discard("try")
    assert await read_export(engine, "vda") == before
    assert not engine.exports.has("try")
    assert list(overlays) == []


async def test_overlay_over_a_snapshot_commits_its_granules_into_the_disk(
    engine: Engine, overlays: Overlays
) -> None:
    await engine.create_snapshot("snap")
    await write(engine, "vda", 0, b"later")
    overlays.create("try", "vda", "snap")
    await write_overlay(engine, "try", 0, b"snapshot's")
    assert (await read_export(engine, "try"))[:12] == b"snapshot'sld"
    with pytest.raises(StateError, match="overlay 'try' stands on snapshot 'snap'"):
        await engine.drop_snapshot("snap")
    await overlays.commit("try")
    assert (await read_export(engine, "vda"))[:12] == b"snapshot'sld"
    await engine.drop_snapshot("snap")


async def test_commit_that_fails_keeps_the_overlay(
    engine: Engine, overlays: Overlays, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlays.create("restore", "vda")
    await write_overlay(engine, "restore", 0, b"new")

    async def fail(*_: object) -> None:
        raise OSError(28, "disk full")

    with monkeypatch.context() as patch:
        patch.setattr(engine.disk("vda").node, "write", fail)
        with pytest.raises(OSError, match="disk full"):
            await overlays.commit("restore")
    await overlays.commit("restore")
    assert (await read_export(engine, "vda"))[:4] == b"newo"


async def test_taken_and_unknown_names_are_refused(engine: Engine, overlays: Overlays) -> None:
    overlays.create("one", "vda")
    for arguments, text in (
        (("one", "vda"), "'one' exists"),
        (("vda", "vda"), "'vda' exists"),
        (("two", "vdz"), "no disk 'vdz'"),
        (("two", "vda", "none"), "no snapshot 'none'"),
    ):
        with pytest.raises(StateError, match=text):
            overlays.create(*arguments)
    with pytest.raises(StateError, match="no overlay 'two'"):
        await overlays.commit("two")
    await overlays.close()
    assert list(overlays) == []


async def test_image_is_sound_after_a_committed_restore(tmp_path: Path, engine: Engine) -> None:
    overlays = Overlays(engine, ScratchOptions(directory=tmp_path), _nobody)
    overlays.create("restore", "vda")
    for number in range(30):
        await write_overlay(engine, "restore", number * 100_000, bytes([number]) * 70_000)
    await overlays.commit("restore")
    expected = await read_export(engine, "vda")
    image = Path(engine.disk("vda").image.path)
    await engine.close()
    stored_bitmaps(image)
    again = await open_engine(tmp_path, image)
    assert await read_export(again, "vda") == expected
    await again.close()
