"""Verification finds every damage."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from nbdfleece.backup import (
    BackupDirectory,
    BackupError,
    DiskRequest,
    PullOptions,
    ServerError,
    compare,
    pull,
    verify,
)
from nbdfleece.backup.manifest import BLOCK_BYTES, Compression

from .fake_server import BITMAP, Script, serving, truthful
from .histories import BLOCK, SIZE, History


@pytest.fixture
async def history(tmp_path: Path) -> History:
    history = History(tmp_path)
    await history.build(3)
    return history


async def test_sound_backup_has_no_problems(history: History) -> None:
    found = await verify(history.directory)
    assert (found.points, found.files, found.problems) == (["p0", "p1", "p2"], 3, [])
    assert found.blocks >= 3


async def test_point_is_verified_with_what_it_stands_on(history: History) -> None:
    found = await verify(history.directory, ["p1"])
    assert (found.points, found.files) == (["p1"], 2)


FLIPS = int(os.environ.get("NBDFLEECE_FLIPS", "40"))
"""Bytes that are flipped, one after another; 0 for each byte of the backup: the full run."""


async def small_backup(folder: Path, compression: Compression | None) -> BackupDirectory:
    """Two clusters in full, and an increment of one."""
    directory = BackupDirectory(folder / "backup")
    content = bytearray(b"as it was then. " * 8192)
    options = PullOptions(compression=compression)
    parent = None
    for name in ("p0", "p1"):
        script = Script(content, truthful({0}, set(), len(content), 65536))
        async with serving(script, folder) as uri:
            bitmap = BITMAP if parent else None
            request = DiskRequest(name="vda", uri=uri, bitmap=bitmap, parent=parent)
            parent = await pull([request], directory, point=name, options=options)
        content[:65536] = b"as it is now..." * 4369 + b"!"
    return directory


@pytest.mark.parametrize("compression", [None, "zstd"])
async def test_every_byte_of_every_file_counts(
    tmp_path: Path, compression: Compression | None
) -> None:
    """Any byte that is not what it was is found."""
    directory = await small_backup(tmp_path, compression)
    assert [point.disks[0].data_bytes() for point in directory.points()] == [131072, 65536]
    files = [path for path in directory.path.iterdir() if path.name != ".lock"]
    places = [(path, offset) for path in sorted(files) for offset in range(path.stat().st_size)]
    source = random.Random(5)
    for path, offset in source.sample(places, FLIPS) if FLIPS else places:
        with path.open("r+b", buffering=0) as file:
            byte = os.pread(file.fileno(), 1, offset)
            os.pwrite(file.fileno(), bytes([byte[0] ^ source.randrange(1, 256)]), offset)
            found = await verify(directory)
            assert found.problems, f"{path.name} at {offset}"
            os.pwrite(file.fileno(), byte, offset)
    assert not (await verify(directory)).problems


async def test_checksum_of_a_block_says_where_the_damage_is(history: History) -> None:
    history.damage("p0", after=BLOCK_BYTES)
    problems = (await verify(history.directory)).problems
    assert any(f"between {BLOCK_BYTES} and {2 * BLOCK_BYTES}" in problem for problem in problems)
    assert any("p0.vda.qcow2: " in problem for problem in problems)


@pytest.mark.parametrize("missing", ["p0.vda.qcow2", "p1.vda.qcow2", "p0.json"])
async def test_missing_file_breaks_the_chain(history: History, missing: str) -> None:
    (history.directory.path / missing).unlink()
    found = await verify(history.directory, ["p2"])
    assert any(missing.split(".")[0] in problem for problem in found.problems)


async def test_file_of_another_point_is_not_taken_for_this_one(history: History) -> None:
    folder = history.directory.path
    (folder / "p1.vda.qcow2").write_bytes((folder / "p2.vda.qcow2").read_bytes())
    assert (await verify(history.directory)).problems


async def test_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="no such backup directory"):
        await verify(BackupDirectory(tmp_path / "nowhere"))


def script_of(content: bytes) -> Script:
    zero = {n for n in range(SIZE // BLOCK) if not any(content[n * BLOCK : (n + 1) * BLOCK])}
    return Script(bytearray(content), truthful(set(), zero, SIZE, BLOCK))


@pytest.mark.parametrize("name", ["p0", "p1", "p2"])
async def test_point_compared_with_the_same_content_is_identical(
    tmp_path: Path, history: History, name: str
) -> None:
    async with serving(script_of(history.contents[name]), tmp_path) as uri:
        found = await compare(history.directory, history.directory.point(name), "vda", uri)
    assert (found.ranges, found.bytes_different) == ([], 0)
    assert 0 < found.bytes_compared < SIZE


async def test_comparison_finds_single_bytes(tmp_path: Path, history: History) -> None:
    content = bytearray(history.contents["p2"])
    zero = content.index(bytes(8 * BLOCK)) + 3 * BLOCK
    for offset in (0, zero, SIZE - 1):
        content[offset] ^= 0xFF
    async with serving(script_of(bytes(content)), tmp_path) as uri:
        found = await compare(history.directory, history.directory.point("p2"), "vda", uri)
    for offset in (0, zero, SIZE - 1):
        assert any(start <= offset < start + length for start, length in found.ranges)
    assert 0 < found.bytes_different <= 3 * 65536


async def test_comparison_with_another_size_is_an_error(tmp_path: Path, history: History) -> None:
    script = Script(bytearray(SIZE + 512), truthful(set(), set(), SIZE + 512, BLOCK))
    async with serving(script, tmp_path) as uri:
        with pytest.raises(ServerError, match="bytes, disk 'vda'"):
            await compare(history.directory, history.directory.point("p2"), "vda", uri)
