"""Verification finds every damage."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdfleece.backup import BackupDirectory, BackupError, ServerError, compare, verify
from nbdfleece.backup.manifest import BLOCK_BYTES

from .fake_server import Script, serving, truthful
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


async def test_every_byte_of_every_file_counts(tmp_path: Path) -> None:
    """A sample of all bytes of the images, most of their headers, and of the manifests."""
    history = History(tmp_path)
    await history.build(2, writes=2)
    for path in sorted(history.directory.path.iterdir()):
        if path.suffix not in (".json", ".qcow2"):
            continue
        size = path.stat().st_size
        positions = set(range(0, size, 65521)) | set(range(0, 1024, 17))
        if path.suffix == ".json":
            positions = set(range(0, size, 11))
        with path.open("r+b", buffering=0) as file:
            for position in positions:
                byte = os.pread(file.fileno(), 1, position)
                os.pwrite(file.fileno(), bytes([byte[0] ^ 0x41]), position)
                found = await verify(history.directory)
                assert found.problems, f"{path.name} at {position}"
                os.pwrite(file.fileno(), byte, position)
    assert not (await verify(history.directory)).problems


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
