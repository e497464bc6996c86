"""Whole chains against foreign servers: every restore point is what the disk was then."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from nbdfleece.backup import (
    BackupDirectory,
    DiskUri,
    InterruptedPullError,
    Progress,
    PullOptions,
    RateLimit,
    Resume,
    auto_requests,
    full_requests,
    open_target,
    prune,
    pull,
    restore,
    verify,
)
from tests.tree import debian_13

from .programs import content_of, qemu_io, qemu_nbd, run, storage_daemon

MIB = 1 << 20
SIZE = 16 * MIB


def make_image(path: Path, size: int = SIZE) -> Path:
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(size))
    return path


WRITES = ("write -q -P", "discard -q")
"""Guest writes while a snapshot of qemu-storage-daemon 7.2 stands: its copy-before-write filter
does not see write-zeroes, and the snapshot changes (10.0's does not)."""
ALL = (*WRITES, "write -q -z", "write -q -z -u")


def random_commands(
    source: random.Random, count: int, size: int = SIZE, kinds: tuple[str, ...] = ALL
) -> list[str]:
    """Writes, zeroes and discards of all alignments to 512."""
    commands = []
    for _ in range(count):
        length = source.choice([512, 4096, 65536, 200 * 512, MIB])
        offset = source.randrange(0, size - length + 1, 512)
        kind = source.choice(kinds)
        if kind.endswith("-P"):
            kind += f" {source.randrange(1, 256)}"
        commands.append(f"{kind} {offset} {length}")
    return commands


async def check_point(directory: BackupDirectory, name: str, expected: bytes) -> None:
    """The restore point is sound, and is what it should be: to QEMU, and restored."""
    point = directory.point(name)
    image = directory.file_path(point.disks[0])
    run("qemu-img", "check", image)
    assert content_of(image)[: len(expected)] == expected
    target = directory.path.parent / f"restored-{name}.raw"
    await restore(
        directory, point, point.disks[0].name, await open_target(str(target), len(expected))
    )
    assert target.read_bytes() == expected
    target.unlink()


ROUNDS = int(os.environ.get("NBDFLEECE_HISTORY_ROUNDS", "8"))
"""Rounds of a history; 30 are the full run."""


async def test_chain_of_qemu_nbd_bitmaps_is_what_the_disk_was(tmp_path: Path) -> None:
    await check_bitmap_chain(tmp_path, 1, None)


async def test_chain_of_a_newer_qemu_nbd_is_what_the_disk_was(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    await check_bitmap_chain(tmp_path_factory.mktemp("tree"), 2, debian_13())


async def check_bitmap_chain(folder: Path, seed: int, tree: Path | None) -> None:
    """Writes, zeroes, discards and other sizes; increments, some compressed; some points go."""
    image = make_image(folder / "disk.qcow2")
    directory = BackupDirectory(folder / "backup")
    source = random.Random(seed)
    expected: dict[str, bytes] = {}
    size, previous = SIZE, None
    for number in range(ROUNDS):
        if source.random() < 0.3:
            size = source.randrange(SIZE // 2, 2 * SIZE, 512)
            run("qemu-img", "resize", "-q", "--shrink", image, str(size))
        qemu_io(image, *random_commands(source, 8, size))
        name = f"p{number}"
        if previous is not None:
            run("qemu-img", "bitmap", "--disable", image, previous)
        run("qemu-img", "bitmap", "--add", image, name)
        expected[name] = content_of(image)
        with qemu_nbd(image, "-r", *(["-B", previous] if previous else []), tree=tree) as uri:
            requests = await auto_requests(directory, [DiskUri("vda", uri)])
            assert (requests[0].parent is None) == (previous is None)
            options = PullOptions(compression=source.choice([None, "zlib", "zstd"]))
            await pull(requests, directory, point=name, checkpoint=name, options=options)
        previous = name
        if source.random() < 0.2 and len(expected) > 2:
            doomed = source.choice(sorted(expected.keys() - {name}))
            await prune(directory, [doomed])
            del expected[doomed]
    assert not (await verify(directory)).problems
    for name, content in expected.items():
        await check_point(directory, name, content)


@pytest.mark.parametrize("seed", [1, 2])
async def test_chain_of_fleeced_snapshots_is_what_the_disk_was(tmp_path: Path, seed: int) -> None:
    await check_fleeced_chain(tmp_path, seed, None, WRITES)


async def test_chain_of_a_newer_qemu_is_what_the_disk_was(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    await check_fleeced_chain(tmp_path_factory.mktemp("tree"), 3, debian_13(), ALL)


async def check_fleeced_chain(
    folder: Path, seed: int, tree: Path | None, kinds: tuple[str, ...]
) -> None:
    """Rounds of writing, freezing, writing on, and pulling.

    Some give the disk another size, and some points are pruned.
    """
    image = make_image(folder / "disk.qcow2")
    directory = BackupDirectory(folder / "backup")
    source = random.Random(seed)
    expected: dict[str, bytes] = {}
    previous = None
    with storage_daemon(image, tree) as daemon:
        size = SIZE
        for number in range(ROUNDS):
            if source.random() < 0.2:
                size = source.randrange(SIZE // 2, 2 * SIZE, 65536)
                daemon.resize(size)
            qemu_io(daemon.live, *random_commands(source, 6, size), image_format="raw")
            name = f"p{number}"
            uri = daemon.begin(previous, name)
            expected[name] = _content_of_uri(folder, uri)
            guest = random_commands(source, 3, size, kinds)
            qemu_io(daemon.live, *guest, image_format="raw")
            requests = await auto_requests(directory, [DiskUri("vda", uri)])
            assert (requests[0].parent is None) == (number == 0)
            await pull(requests, directory, point=name, checkpoint=name)
            daemon.end()
            previous = name
            if source.random() < 0.3 and len(expected) > 3:
                doomed = source.sample(sorted(expected.keys() - {name}), 2)
                await prune(directory, doomed)
                for each in doomed:
                    del expected[each]
    assert directory.point_names() == sorted(expected)
    assert not (await verify(directory)).problems
    for name, content in expected.items():
        await check_point(directory, name, content)


def _content_of_uri(folder: Path, uri: str) -> bytes:
    raw = folder / "expected.raw"
    run("nbdcopy", uri, raw)
    return raw.read_bytes()


@pytest.mark.parametrize("sizes", [(8, 20, 20), (20, 8, 8), (20, 8, 20), (8, 8, 9)])
async def test_resized_disk_is_what_it_was(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    image = make_image(tmp_path / "disk.qcow2", sizes[0] * MIB)
    directory = BackupDirectory(tmp_path / "backup")
    source = random.Random(3)
    qemu_io(image, f"write -P 9 0 {sizes[0]}M")
    previous = None
    expected = {}
    for number, size in enumerate(sizes):
        run("qemu-img", "resize", "-q", "--shrink", image, f"{size}M")
        qemu_io(image, *random_commands(source, 4, size * MIB))
        name = f"p{number}"
        run("qemu-img", "bitmap", "--add", image, name)
        expected[name] = content_of(image)
        with qemu_nbd(image, "-r", *(["-B", previous] if previous else [])) as uri:
            requests = await auto_requests(directory, [DiskUri("vda", uri)])
            await pull(requests, directory, point=name, checkpoint=name)
        run("qemu-img", "bitmap", "--disable", image, name)
        run("qemu-img", "bitmap", "--enable", image, name)
        previous = name
    for name, content in expected.items():
        await check_point(directory, name, content)
    await prune(directory, ["p1"])
    await check_point(directory, "p2", expected["p2"])
    await check_point(directory, "p0", expected["p0"])


async def test_chain_ends_where_the_disk_does_not_end_with_a_sector_or_cluster(
    tmp_path: Path,
) -> None:
    from .programs import nbdkit

    raw = tmp_path / "odd.raw"
    content = random.Random(5).randbytes(3 * MIB + 777)
    raw.write_bytes(content)
    directory = BackupDirectory(tmp_path / "backup")
    with nbdkit(tmp_path, "file", str(raw)) as uri:
        point = await pull(full_requests([DiskUri("odd", uri)]), directory, point="only")
    assert point.disks[0].size == len(content)
    assert point.disks[0].read_bytes == len(content)
    await check_point(directory, "only", content)


@pytest.mark.parametrize("trouble", [signal.SIGKILL, signal.SIGSTOP])
async def test_server_that_is_killed_or_stopped_cuts_the_pull_and_is_gone_on_with(
    tmp_path: Path, trouble: signal.Signals
) -> None:
    """Started again, or woken up: the image has not changed, which only the user knows."""
    image = make_image(tmp_path / "disk.qcow2", 64 * MIB)
    source = random.Random(6)
    qemu_io(image, *(f"write -q -P {source.randrange(1, 256)} {n}M 1M" for n in range(64)))
    directory = BackupDirectory(tmp_path / "backup")
    expected = content_of(image)
    pid = 0

    def harm(progress: Progress) -> None:
        nonlocal pid
        if progress.done >= 24 * MIB and pid:
            os.kill(pid, trouble)
            pid = 0  # it may be somebody else's soon

    options = PullOptions(
        progress=harm,
        limit=RateLimit(64 * MIB),
        journal_seconds=0.01,
        timeout_seconds=5 if trouble == signal.SIGSTOP else 60,
        compression="zstd",
    )
    with qemu_nbd(image, "-r") as uri:
        pid = server = server_pid(image)
        disks = full_requests([DiskUri("vda", uri)])
        with pytest.raises(InterruptedPullError, match="can go on"):
            await pull(disks, directory, point="p", options=options)
        if trouble == signal.SIGSTOP:
            os.kill(server, signal.SIGCONT)
    assert directory.point_names() == []
    with qemu_nbd(image, "-r") as uri:
        read = 0

        def count(progress: Progress) -> None:
            nonlocal read
            read = read or progress.done

        options = PullOptions(resume=Resume.TRUST, progress=count, compression="zstd")
        await pull(full_requests([DiskUri("vda", uri)]), directory, point="p", options=options)
    assert read >= 4 * MIB
    assert not (await verify(directory)).problems
    await check_point(directory, "p", expected)


def server_pid(image: Path) -> int:
    """The process of the one qemu-nbd that serves an image."""
    (pid_file,) = image.parent.glob("q*.pid")
    return int(pid_file.read_text())
