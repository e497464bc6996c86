"""Restore points as block nodes: the bytes, the zeroes, the differences, and damage."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from nbdfleece.backup import BackupDirectory, BackupError, DiskRequest, pull
from nbdfleece.backup.manifest import BLOCK_BYTES
from nbdfleece.backup.serving import PointNode, ServedDisk, ServedPoints
from nbdfleece.errors import StateError
from nbdfleece.extents import Extents

from .fake_server import Script, serving, truthful
from .histories import BLOCK, SIZE, History


@pytest.fixture
async def history(tmp_path: Path) -> History:
    history = History(tmp_path)
    await history.build(4)
    return history


async def content(node: PointNode, offset: int = 0, length: int | None = None) -> bytes:
    view = bytearray(node.size - offset if length is None else length)
    await node.read_into(offset, memoryview(view))
    return bytes(view)


def expand(extents: Extents) -> bytes:
    return b"".join(bytes([status]) * length for length, status in extents.pairs())


async def status_of(disk: ServedDisk, name: str) -> bytes:
    """What a difference says of each byte, asked for in pieces."""
    found = next(each for each in disk.differences if each.name == f"qemu:dirty-bitmap:{name}")
    said = b""
    while len(said) < disk.node.size:
        length = min(disk.node.size - len(said), 777_777)
        extents = await found.extents(len(said), length, extents_max=7)
        assert 0 < extents.total() <= length
        assert len(extents.lengths) <= 7
        said += expand(extents)
    return said


async def test_every_point_reads_as_the_disk_was(history: History) -> None:
    async with ServedPoints(history.directory) as served:
        assert [(each.point, each.disk) for each in served.disks] == [
            (f"p{number}", "vda") for number in range(4)
        ]
        source = random.Random(1)
        for disk in served.disks:
            expected = history.contents[disk.point]
            for _ in range(50):
                offset = source.randrange(SIZE)
                length = source.randrange(1, min(SIZE - offset, 100_000) + 1)
                assert await content(disk.node, offset, length) == expected[offset:][:length]
            assert await content(disk.node) == expected


async def test_zeroes_are_told_and_nothing_else_is_called_zero(history: History) -> None:
    async with ServedPoints(history.directory, ["p3"]) as served:
        (disk,) = served.disks
        offset = zeroes = 0
        while offset < SIZE:
            found = await disk.node.block_status(offset, SIZE - offset, extents_max=5)
            for length, status in found.pairs():
                part = history.contents["p3"][offset : offset + length]
                assert status & 0xFF in (0, 3)
                assert not status & 2 or not any(part)
                assert status & 2 or any(part)
                zeroes += length if status & 2 else 0
                offset += length
        assert zeroes


async def test_difference_to_each_earlier_point_misses_nothing(history: History) -> None:
    async with ServedPoints(history.directory) as served:
        for number, disk in enumerate(served.disks):
            names = [each.name.rpartition(":")[2] for each in disk.differences]
            assert names == [f"p{earlier}" for earlier in reversed(range(number))]
            for name in names:
                here, there = history.contents[disk.point], history.contents[name]
                said = await status_of(disk, name)
                assert all(
                    here[n : n + BLOCK] == there[n : n + BLOCK] or said[n]
                    for n in range(0, SIZE, BLOCK)
                )
        last = await status_of(served.disks[-1], "p2")
        dirty = sum(last)
        entry = history.directory.point("p3").disks[0]
        assert dirty == entry.changed_bytes() < SIZE


async def test_difference_between_points_that_build_on_nothing_in_common(
    tmp_path: Path, history: History
) -> None:
    """And of a disk that has shrunk and grown."""
    directory = history.directory
    for name, size in (("q0", SIZE - 9 * BLOCK), ("q1", SIZE + 3 * BLOCK)):
        fresh = bytearray(history.contents["p3"][:size].ljust(size, b"\3"))
        fresh[: 2 * BLOCK] = random.Random(size).randbytes(2 * BLOCK)
        script = Script(fresh, truthful(set(), set(), size, BLOCK))
        async with serving(script, tmp_path) as uri:
            await pull([DiskRequest(name="vda", uri=uri)], directory, point=name)
        history.contents[name] = bytes(fresh)
    async with ServedPoints(directory, ["q0", "q1"]) as served:
        for disk in served.disks:
            for difference in disk.differences:
                name = difference.name.rpartition(":")[2]
                here, there = history.contents[disk.point], history.contents[name]
                said = await status_of(disk, name)
                assert len(said) == len(here)
                for n in range(0, len(here), BLOCK):
                    assert here[n : n + BLOCK] == there[n : n + BLOCK] or said[n]


async def test_damaged_block_is_an_error_and_the_rest_is_served(history: History) -> None:
    damaged = history.damage("p0", after=BLOCK_BYTES)
    async with ServedPoints(history.directory, ["p0"]) as served:
        node = served.disks[0].node
        for _ in range(2):
            with pytest.raises(OSError, match="not what was pulled") as caught:
                await content(node, damaged, 1)
            assert caught.value.errno == errno.EIO
        assert await content(node, 0, BLOCK_BYTES) == history.contents["p0"][:BLOCK_BYTES]


@pytest.mark.parametrize("damage", ["cut", "gone", "header"])
async def test_damaged_file_is_refused_or_an_error(history: History, damage: str) -> None:
    path = history.directory.file_path(history.directory.point("p1").disks[0])
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
    else:
        with path.open("r+b") as file:
            file.write(b"XXXX")
    with pytest.raises((BackupError, OSError)):
        async with ServedPoints(history.directory, ["p3"]) as served:
            await content(served.disks[0].node)


async def test_no_prune_while_points_are_served(history: History) -> None:
    from nbdfleece.backup import prune

    async with ServedPoints(history.directory):
        with pytest.raises(StateError, match="in use"):
            await prune(history.directory, ["p0"])
    await prune(history.directory, ["p0"])


async def test_point_that_is_not_there_is_an_error(history: History) -> None:
    for directory, names in (
        (history.directory, ["x"]),
        (BackupDirectory(history.directory.path / "none"), None),
    ):
        with pytest.raises(BackupError, match="there is no"):
            async with ServedPoints(directory, names):
                raise AssertionError
