"""Pulling from a server that is a script: lies, failures, cuts, and going on."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdfleece.backup import (
    BackupDirectory,
    BackupError,
    DiskRequest,
    InterruptedPullError,
    Point,
    PullOptions,
    RateLimit,
    Resume,
    ServerError,
    discard,
    estimate,
    pull,
    verify,
)
from nbdfleece.backup.manifest import BLOCK_BYTES, Compression
from nbdfleece.errors import StateError, UsageError

from .fake_server import ALLOCATION, BITMAP, BLOCK_STATUS, READ, Script, serving, truthful
from .programs import content_of

BLOCK = 65536
COUNT = 4 * BLOCK_BYTES // BLOCK
SIZE = COUNT * BLOCK


def make_script(seed: int = 0, dirty: set[int] | None = None) -> Script:
    """A disk of random content, half of it zero."""
    source = random.Random(seed)
    zero = set(source.sample(range(COUNT), COUNT // 2))
    content = bytearray(source.randbytes(SIZE))
    for number in zero:
        content[number * BLOCK : (number + 1) * BLOCK] = bytes(BLOCK)
    return Script(
        content, truthful(set(range(COUNT)) if dirty is None else dirty, zero, SIZE, BLOCK)
    )


@pytest.fixture
def directory(tmp_path: Path) -> BackupDirectory:
    return BackupDirectory(tmp_path / "backup")


def full(uri: str, identity: str | None = None) -> list[DiskRequest]:
    return [DiskRequest(name="vda", uri=uri, identity=identity)]


def image_content(directory: BackupDirectory, point: Point) -> bytes:
    return content_of(directory.file_path(point.disks[0]))


async def pull_increment(directory: BackupDirectory, uri: str, parent: Point) -> Point:
    request = DiskRequest(name="vda", uri=uri, bitmap=BITMAP, parent=parent)
    return await pull([request], directory, point="second")


async def test_full_pull_reads_each_byte_that_is_not_zero_once(
    tmp_path: Path, directory: BackupDirectory
) -> None:
    script = make_script()
    async with serving(script, tmp_path) as uri:
        point = await pull(full(uri), directory, point="first")
    read = sorted(script.reads)
    assert sum(length for _, length in read) == SIZE // 2 == point.disks[0].read_bytes
    assert all(read[i][0] + read[i][1] <= read[i + 1][0] for i in range(len(read) - 1))
    assert image_content(directory, point) == script.content


async def test_increment_reads_only_what_is_dirty_and_writes_what_is_zero(
    tmp_path: Path, directory: BackupDirectory
) -> None:
    script = make_script()
    async with serving(script, tmp_path) as uri:
        first = await pull(full(uri), directory, point="first")
        before = bytes(script.content)
        script.content[5 * BLOCK : 9 * BLOCK] = b"n" * (2 * BLOCK) + bytes(2 * BLOCK)
        script.status = truthful({5, 6, 7, 8}, {7, 8}, SIZE, BLOCK)
        script.reads.clear()
        second = await pull_increment(directory, uri, first)
    assert script.reads == [(5 * BLOCK, 2 * BLOCK)]
    assert second.disks[0].extents[1:3] == [(2 * BLOCK, 1), (2 * BLOCK, 3)]
    assert image_content(directory, second) == script.content
    assert image_content(directory, first) == before


async def test_increment_of_nothing_is_a_restore_point(
    tmp_path: Path, directory: BackupDirectory
) -> None:
    script = make_script()
    async with serving(script, tmp_path) as uri:
        first = await pull(full(uri), directory, point="first")
        script.status = truthful(set(), set(), SIZE, BLOCK)
        second = await pull_increment(directory, uri, first)
    assert (second.parent, second.disks[0].changed_bytes()) == ("first", 0)
    assert image_content(directory, second) == script.content


async def test_zeroes_that_the_server_calls_data_are_stored_as_zeroes(
    tmp_path: Path, directory: BackupDirectory
) -> None:
    script = make_script()
    script.status = truthful(set(range(COUNT)), set(), SIZE, BLOCK)
    async with serving(script, tmp_path) as uri:
        point = await pull(full(uri), directory, point="first")
    assert point.disks[0].read_bytes == SIZE
    assert point.disks[0].data_bytes() == SIZE // 2
    assert directory.file_path(point.disks[0]).stat().st_size < SIZE * 5 // 8


async def test_server_without_contexts_is_pulled_whole(
    tmp_path: Path, directory: BackupDirectory
) -> None:
    script = make_script()
    script.contexts = []
    async with serving(script, tmp_path) as uri:
        point = await pull(full(uri), directory, point="first")
    assert image_content(directory, point) == script.content


async def test_disk_of_no_bytes_is_pulled(tmp_path: Path, directory: BackupDirectory) -> None:
    script = Script(bytearray(), lambda offset, length: [])
    async with serving(script, tmp_path) as uri:
        point = await pull(full(uri), directory, point="first")
    assert (point.disks[0].size, point.disks[0].extents) == (0, [])
    assert not (await verify(directory)).problems


async def test_estimate_reads_nothing(tmp_path: Path, directory: BackupDirectory) -> None:
    script = make_script()
    async with serving(script, tmp_path) as uri:
        found = await estimate(full(uri))
    assert (found[0].size, found[0].read_bytes, script.reads) == (SIZE, SIZE // 2, [])


async def test_server_that_does_not_offer_the_bitmap_is_an_error_and_nothing_is_begun(
    tmp_path: Path, directory: BackupDirectory
) -> None:
    script = make_script()
    async with serving(script, tmp_path) as uri:
        first = await pull(full(uri), directory, point="first")
        script.contexts = [ALLOCATION]
        with pytest.raises(ServerError, match="does not offer"):
            await pull_increment(directory, uri, first)
    assert (directory.point_names(), directory.cut_pulls()) == (["first"], [])


@pytest.mark.parametrize(
    "extents",
    [[(0, 0)], [(SIZE + 512, 1)], [(SIZE, 0), (512, 1)], [], [(BLOCK, 0), (0, 1), (BLOCK, 0)]],
)
async def test_server_that_lies_about_extents_leaves_no_backup(
    tmp_path: Path, directory: BackupDirectory, extents: list[tuple[int, int]]
) -> None:
    script = make_script()
    script.status = lambda offset, length: [(ALLOCATION, extents), (BITMAP, [(length, 1)])]
    async with serving(script, tmp_path) as uri:
        with pytest.raises(ServerError):
            await pull(full(uri), directory, point="first")
    assert (directory.point_names(), directory.cut_pulls()) == ([], [])


async def test_server_that_fails_block_status_leaves_no_backup(
    tmp_path: Path, directory: BackupDirectory
) -> None:
    script = make_script()
    script.fails = lambda number, kind: errno.EIO if kind == BLOCK_STATUS else None
    async with serving(script, tmp_path) as uri:
        with pytest.raises(ServerError, match="Input/output error"):
            await pull(full(uri), directory, point="first")
    assert directory.point_names() == []


async def test_connections_that_see_different_sizes_are_an_error(
    tmp_path: Path, directory: BackupDirectory
) -> None:
    script = make_script()
    script.sizes = [SIZE, SIZE - BLOCK]
    async with serving(script, tmp_path) as uri:
        with pytest.raises(ServerError, match="two connections"):
            await pull(full(uri), directory, point="first")


def cut_after(reads: int) -> Callable[[int, int], bool]:
    """Hang up at every read from some number on."""
    seen = 0

    def hangs_up(number: int, kind: int) -> bool:
        nonlocal seen
        seen += kind == READ
        return seen > reads

    return hangs_up


async def cut_pull(
    script: Script,
    tmp_path: Path,
    directory: BackupDirectory,
    identity: str | None = None,
    compression: Compression | None = None,
) -> None:
    """Pull one block after another, and be cut in the middle."""
    async with serving(script, tmp_path) as uri:
        limit = RateLimit()
        done = []

        def progress(state: object) -> None:
            done.append(state)
            if len(done) > 2:
                script.hangs_up = cut_after(0)

        with pytest.raises(InterruptedPullError, match="can go on"):
            await pull(
                full(uri, identity),
                directory,
                point="first",
                options=PullOptions(
                    connections=1,
                    limit=limit,
                    progress=progress,
                    journal_seconds=0.001,
                    compression=compression,
                ),
            )
    script.hangs_up = lambda number, kind: False
    assert directory.point_names() == []
    assert directory.cut_pulls() == ["first"]


@pytest.fixture
def script() -> Script:
    """A disk whose blocks cannot all be in flight at one time."""
    source = random.Random(7)
    content = bytearray(source.randbytes(1024) * (96 << 10))
    for number in range(len(content) // BLOCK_BYTES):
        content[number * BLOCK_BYTES] = number
    count = len(content) // BLOCK
    return Script(content, truthful(set(range(count)), set(), len(content), BLOCK))


@pytest.mark.parametrize("identity", ["snapshot-1", None])
async def test_cut_pull_goes_on_and_reads_only_what_is_left(
    tmp_path: Path, directory: BackupDirectory, script: Script, identity: str | None
) -> None:
    await cut_pull(script, tmp_path, directory, identity)
    script.reads.clear()
    options = PullOptions(resume=Resume.IF_SAME if identity else Resume.TRUST)
    async with serving(script, tmp_path) as uri:
        point = await pull(full(uri, identity), directory, point="first", options=options)
    again = sum(length for _, length in script.reads)
    assert again < len(script.content) + 16 * BLOCK_BYTES
    assert point.disks[0].read_bytes == len(script.content)
    assert image_content(directory, point) == script.content
    assert not (await verify(directory)).problems
    assert directory.cut_pulls() == []


async def test_cut_pull_without_identity_goes_on_only_if_the_user_says_so(
    tmp_path: Path, directory: BackupDirectory, script: Script
) -> None:
    await cut_pull(script, tmp_path, directory)
    async with serving(script, tmp_path) as uri:
        with pytest.raises(StateError, match="--resume"):
            await pull(full(uri), directory, point="first")
    assert directory.cut_pulls() == ["first"]


async def test_cut_pull_of_another_snapshot_does_not_go_on(
    tmp_path: Path, directory: BackupDirectory, script: Script
) -> None:
    await cut_pull(script, tmp_path, directory, "snapshot-1")
    options = PullOptions(resume=Resume.TRUST)
    async with serving(script, tmp_path) as uri:
        with pytest.raises(StateError, match="another snapshot"):
            await pull(full(uri, "snapshot-2"), directory, point="first", options=options)


async def test_cut_pull_does_not_go_on_with_other_extents(
    tmp_path: Path, directory: BackupDirectory, script: Script
) -> None:
    await cut_pull(script, tmp_path, directory)
    count = len(script.content) // BLOCK
    script.status = truthful(set(range(count)), {count - 1}, len(script.content), BLOCK)
    options = PullOptions(resume=Resume.TRUST)
    async with serving(script, tmp_path) as uri:
        with pytest.raises(StateError, match="the changes that the server tells"):
            await pull(full(uri), directory, point="first", options=options)


async def test_cut_pull_does_not_go_on_with_other_content(
    tmp_path: Path, directory: BackupDirectory, script: Script
) -> None:
    await cut_pull(script, tmp_path, directory)
    for offset in range(0, len(script.content), BLOCK_BYTES):
        script.content[offset + 5] ^= 1
    options = PullOptions(resume=Resume.TRUST)
    async with serving(script, tmp_path) as uri:
        with pytest.raises(StateError, match="other content"):
            await pull(full(uri), directory, point="first", options=options)


async def test_cut_pull_can_begin_anew(
    tmp_path: Path, directory: BackupDirectory, script: Script
) -> None:
    await cut_pull(script, tmp_path, directory)
    script.content[:] = bytes(reversed(script.content))
    options = PullOptions(resume=Resume.RESTART)
    async with serving(script, tmp_path) as uri:
        point = await pull(full(uri), directory, point="first", options=options)
    assert image_content(directory, point) == script.content


async def test_discard_removes_a_cut_pull_and_nothing_else(
    tmp_path: Path, directory: BackupDirectory, script: Script
) -> None:
    async with serving(make_script(), tmp_path) as uri:
        await pull(full(uri), directory, point="zeroth")
    script.hangs_up = lambda number, kind: False
    before = sorted(path.name for path in directory.path.iterdir())
    async with serving(script, tmp_path) as uri:
        script.fails = lambda number, kind: errno.EIO if kind == READ else None
        with pytest.raises(InterruptedPullError):
            await pull(full(uri), directory, point="first")
    discard(directory, "first")
    assert sorted(path.name for path in directory.path.iterdir()) == before
    with pytest.raises(StateError, match="complete"):
        discard(directory, "zeroth")


async def test_read_that_fails_cuts_the_pull(tmp_path: Path, directory: BackupDirectory) -> None:
    script = make_script()
    script.fails = lambda number, kind: errno.EIO if kind == READ and number > 5 else None
    async with serving(script, tmp_path) as uri:
        with pytest.raises(InterruptedPullError, match="Input/output error"):
            await pull(full(uri), directory, point="first")
    assert directory.point_names() == []


async def test_cancelled_pull_leaves_no_restore_point_and_can_go_on(
    tmp_path: Path, directory: BackupDirectory, script: Script
) -> None:
    async with serving(script, tmp_path) as uri:
        started = asyncio.Event()

        def progress(state: object) -> None:
            started.set()

        task = asyncio.create_task(
            pull(
                full(uri, "s"),
                directory,
                point="first",
                options=PullOptions(progress=progress, limit=RateLimit(16 << 20)),
            )
        )
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert directory.point_names() == []
        point = await pull(full(uri, "s"), directory, point="first")
    assert image_content(directory, point) == script.content


async def test_restore_point_that_exists_is_refused(
    tmp_path: Path, directory: BackupDirectory
) -> None:
    async with serving(make_script(), tmp_path) as uri:
        await pull(full(uri), directory, point="first")
        with pytest.raises(StateError, match="exists already"):
            await pull(full(uri), directory, point="first")


async def test_two_pulls_at_one_time_are_refused(
    tmp_path: Path, directory: BackupDirectory
) -> None:
    directory.create()
    async with serving(make_script(), tmp_path) as uri:
        with directory.writing(), pytest.raises(StateError, match="under way"):
            await pull(full(uri), directory, point="first")


@pytest.mark.parametrize("name", ["", ".x", "a/b", "../x", "prune", "a:b", "-x", "x" * 200, "a\n"])
async def test_name_that_cannot_be_a_file_is_refused(directory: BackupDirectory, name: str) -> None:
    with pytest.raises(UsageError, match="restore point's name"):
        await pull(full("nbd://nowhere"), directory, point=name)


async def test_disks_with_one_name_are_refused(directory: BackupDirectory) -> None:
    with pytest.raises(UsageError, match="name of its own"):
        await pull(full("nbd://a") + full("nbd://b"), directory, point="first")


async def test_several_disks_are_one_restore_point(
    tmp_path: Path, directory: BackupDirectory
) -> None:
    scripts = [make_script(1), make_script(2)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with serving(scripts[0], tmp_path / "a") as a, serving(scripts[1], tmp_path / "b") as b:
        requests = [DiskRequest(name="a.b", uri=a), DiskRequest(name="/c", uri=b, reason="new")]
        point = await pull(requests, directory, point="first")
    assert [disk.name for disk in point.disks] == ["a.b", "/c"]
    for disk, script in zip(point.disks, scripts, strict=True):
        assert content_of(directory.file_path(disk)) == script.content
    with pytest.raises(BackupError, match="no disk"):
        point.disk("x")


async def test_progress_ends_with_everything(tmp_path: Path, directory: BackupDirectory) -> None:
    seen = []
    async with serving(make_script(), tmp_path) as uri:
        await pull(full(uri), directory, point="first", options=PullOptions(progress=seen.append))
    assert seen[0][1:] == (0, SIZE // 2)
    assert seen[-1][1:] == (SIZE // 2, SIZE // 2)
    assert [state.done for state in seen] == sorted(state.done for state in seen)
