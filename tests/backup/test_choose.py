from __future__ import annotations

from pathlib import Path

import pytest

from nbdfleece.backup import (
    BackupDirectory,
    BackupError,
    DiskRequest,
    DiskUri,
    auto_requests,
    full_requests,
    pull,
    since_requests,
)
from nbdfleece.errors import UsageError

from .fake_server import BITMAP, Script, serving, truthful

SIZE = 1 << 20


@pytest.fixture
def script() -> Script:
    return Script(bytearray(SIZE), truthful(set(), set(), SIZE, 65536))


async def build(directory: BackupDirectory, uri: str, checkpoints: list[str | None]) -> None:
    for number, checkpoint in enumerate(checkpoints):
        await pull(
            full_requests([DiskUri("vda", uri)]),
            directory,
            point=f"p{number}",
            checkpoint=checkpoint,
        )


async def choose(folder: Path, script: Script, checkpoints: list[str | None]) -> DiskRequest:
    directory = BackupDirectory(folder / "backup")
    async with serving(script, folder) as uri:
        await build(directory, uri, checkpoints)
        return (await auto_requests(directory, [DiskUri("vda", uri)]))[0]


async def test_first_pull_of_all_is_full_without_a_reason(tmp_path: Path, script: Script) -> None:
    chosen = await choose(tmp_path, script, [])
    assert (chosen.parent, chosen.reason) == (None, None)


async def test_newest_point_whose_bitmap_is_offered_is_built_on(
    tmp_path: Path, script: Script
) -> None:
    script.contexts.append("qemu:dirty-bitmap:b1")
    chosen = await choose(tmp_path, script, ["b0", "b1", "b2", None])
    assert chosen.parent is not None
    assert (chosen.parent.name, chosen.bitmap) == ("p1", "qemu:dirty-bitmap:b1")


@pytest.mark.parametrize(
    ("checkpoints", "reason"),
    [([None], "made without|with a checkpoint"), (["other"], "offers no dirty bitmap")],
)
async def test_full_one_has_its_reason(
    tmp_path: Path, script: Script, checkpoints: list[str | None], reason: str
) -> None:
    chosen = await choose(tmp_path, script, checkpoints)
    assert chosen.reason is not None
    assert any(words in chosen.reason for words in reason.split("|"))


async def test_disk_that_is_new_is_full_and_the_others_are_not(
    tmp_path: Path, script: Script
) -> None:
    directory = BackupDirectory(tmp_path / "backup")
    async with serving(script, tmp_path) as uri:
        await build(directory, uri, ["b0"])
        old, new = await auto_requests(directory, [DiskUri("vda", uri), DiskUri("vdb", uri)])
        point = await pull([old, new], directory, point="next")
    assert (old.bitmap, new.bitmap) == (BITMAP, None)
    assert "no restore point of this disk" in (new.reason or "")
    assert [disk.kind for disk in point.disks] == ["incremental", "full"]


async def test_since_takes_the_bitmap_that_is_named(tmp_path: Path, script: Script) -> None:
    directory = BackupDirectory(tmp_path / "backup")
    async with serving(script, tmp_path) as uri:
        await build(directory, uri, [None])
    disks = [DiskUri("vda", uri)]
    with pytest.raises(UsageError, match="--bitmap"):
        since_requests(directory, disks, "p0")
    for name in ("b0", BITMAP):
        chosen = since_requests(directory, disks, "p0", bitmaps={"vda": name})[0]
        assert chosen.bitmap == BITMAP
    with pytest.raises(BackupError, match="no disk 'vdb'"):
        since_requests(directory, [DiskUri("vdb", uri)], "p0", bitmaps={"vdb": "b0"})


def test_bitmap_without_a_parent_is_refused() -> None:
    with pytest.raises(UsageError, match="needs a bitmap and a parent"):
        DiskRequest(name="vda", uri="nbd://x", bitmap=BITMAP)
