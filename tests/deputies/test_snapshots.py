"""Snapshots that other processes read, beside a guest that writes; a whole server in this one."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import resource
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import nbd
import pytest

from nbdfleece.block import shared_codes
from nbdfleece.block.file import FileNode
from nbdfleece.block.host_file import Places
from nbdfleece.block.snapshot_access import SnapshotAccess
from nbdfleece.daemon import Daemon, DaemonOptions
from nbdfleece.deputies import deputies
from nbdfleece.deputies.link import Link
from nbdfleece.engine.disk import ScratchOptions
from nbdfleece.engine.snapshot import Release
from nbdfleece.export.export import Export
from nbdfleece.nbd.uri import NbdUri
from nbdfleece.qcow2.image import Qcow2Image
from nbdfleece.testing.memory_node import MemoryNode
from tests.waiting import until

from .test_deputies import clients, connect, is_alive, pids, processes, read

MIB = 1 << 20
SIZE = 8 * MIB + 1536
CONTENT = random.Random(6).randbytes(3 * MIB) + b"compresses well " * (MIB // 8)
"""The first 5 MiB; the rest is zeroes."""

KINDS = {
    "plain": ("-o", "cluster_size=64k"),
    "small clusters": ("-o", "cluster_size=4k"),
    "large clusters": ("-o", "cluster_size=2M"),
    "subclusters": ("-o", "extended_l2=on"),
    "compressed": ("-c",),
    "over a backing file": (),
    "over a smaller raw file": (),
    "shared with an internal snapshot": (),
    "external data file": ("-o", "data_file=data,data_file_raw=on"),
}


def make_disk(folder: Path, kind: str = "plain") -> Path:
    path = folder / "disk.qcow2"
    raw = folder / "raw"
    raw.write_bytes(CONTENT)
    os.truncate(raw, SIZE)

    def qemu_img(*words: object) -> None:
        subprocess.run(["qemu-img", *map(str, words)], check=True, cwd=folder, capture_output=True)

    if kind == "over a backing file":
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, "base.qcow2")
        qemu_img("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", path)
    elif kind == "over a smaller raw file":
        raw.write_bytes(CONTENT)
        qemu_img("create", "-f", "qcow2", "-b", "raw", "-F", "raw", path, SIZE)
    else:
        qemu_img("convert", "-f", "raw", "-O", "qcow2", *KINDS[kind], raw, path)
    if kind == "shared with an internal snapshot":
        qemu_img("snapshot", "-c", "before", path)
    return path


@pytest.fixture
def options(tmp_path: Path) -> DaemonOptions:
    """One disk, and two processes."""
    (tmp_path / "scratch").mkdir()
    return DaemonOptions(
        disks={"vda": make_disk(tmp_path)},
        scratch=ScratchOptions(directory=tmp_path / "scratch"),
        processes=2,
        listen=[NbdUri(transport="unix", socket=str(tmp_path / "nbd.sock"))],
        grace_seconds=5,
    )


async def snapshot(daemon: Daemon, name: str = "s") -> Export:
    """Take one, and export it under its name."""
    await daemon.engine.create_snapshot(name)
    return await daemon.engine.add_export(name, "vda", name=name)


def whole() -> bytes:
    return CONTENT + bytes(SIZE - len(CONTENT))


class Guest:
    """Writes at random until it is told to stop, and remembers."""

    def __init__(self, handle: nbd.NBD, seed: int) -> None:
        self._handle = handle
        self._chance = random.Random(seed)
        self.content = bytearray(whole())
        self.writes = 0
        self.start()

    def start(self) -> None:
        self._is_stopping = False
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        self._is_stopping = True
        await self._task

    async def _run(self) -> None:
        while not self._is_stopping:
            await asyncio.to_thread(self._write_some, 50)

    def _write_some(self, count: int) -> None:
        chance, handle = self._chance, self._handle
        for _ in range(count):
            offset = chance.randrange(SIZE)
            length = min(SIZE - offset, chance.choice([512, 4096, 4096, 70_000, 300_000]))
            kind = chance.random()
            if kind < 0.75:
                data = chance.randbytes(length)
                handle.pwrite(data, offset)
                self.content[offset : offset + length] = data
            elif kind < 0.9:
                handle.zero(length, offset)
                self.content[offset : offset + length] = bytes(length)
            else:
                handle.trim(length, offset)
                self.content[offset : offset + length] = handle.pread(length, offset)
            self.writes += 1


@asynccontextmanager
async def writing(daemon: Daemon, seed: int = 0) -> AsyncIterator[Guest]:
    handle = await connect(daemon, "vda")
    guest = Guest(handle, seed)
    try:
        yield guest
    finally:
        await guest.stop()
        await asyncio.to_thread(handle.shutdown)


@pytest.mark.parametrize("kind", KINDS)
async def test_snapshot_stays_as_it_was_whatever_the_guest_writes(
    options: DaemonOptions, tmp_path: Path, kind: str
) -> None:
    """Rule 1, with a guest that moves, shares, frees and reuses clusters under two processes."""
    make_disk(tmp_path, kind)
    chance = random.Random(kind)
    async with Daemon(options) as daemon, writing(daemon) as guest:
        for number in range(3):
            await guest.stop()
            expected = bytes(guest.content)
            shown = await snapshot(daemon, f"s{number}")
            guest.start()
            begun = guest.writes
            handles = [await connect(daemon, shown.name) for _ in range(2)]
            assert clients(daemon, shown.name) == [1, 1]
            for handle in handles:
                assert await read(handle, 0, SIZE) == expected
            await until(lambda begun=begun: guest.writes > begun + 100)
            for _ in range(40):
                offset = chance.randrange(SIZE)
                length = min(SIZE - offset, chance.choice([1, 4096, 65536, 300_000]))
                found = await read(handles[number % 2], offset, length)
                assert found == expected[offset : offset + length]
            for handle in handles:
                await asyncio.to_thread(handle.shutdown)
            if number == 1:
                await daemon.engine.drop_snapshot("s0")
    subprocess.run(["qemu-img", "check", "-q", options.disks["vda"]], check=True, cwd=tmp_path)


async def test_replies_in_the_socket_of_a_slow_client_hold_still(options: DaemonOptions) -> None:
    """Rule 1 includes bytes that were handed to the kernel already."""
    async with Daemon(options) as daemon:
        shown = await snapshot(daemon)
        slow = await connect(daemon, shown.name)
        buffers = [nbd.Buffer(MIB) for _ in range(5)]
        cookies = [slow.aio_pread(each, at * MIB) for at, each in enumerate(buffers)]
        guest = await connect(daemon, "vda")
        for offset in range(0, 5 * MIB, MIB):
            await asyncio.to_thread(guest.pwrite, b"\xee" * MIB, offset)

        def finish() -> None:
            for cookie in cookies:
                while not slow.aio_command_completed(cookie):
                    slow.poll(1000)

        await asyncio.to_thread(finish)
        assert b"".join(bytes(each.to_bytearray()) for each in buffers) == CONTENT


async def describe(handle: nbd.NBD, context: str) -> list[int]:
    """What a context says of the whole disk, as (length, flags, length, flags, ...)."""
    found: list[int] = []

    def collect(name: str, offset: int, entries: list[int], error: object) -> int:
        if name == context:
            found.extend(entries)
        return 0

    while sum(found[::2]) < SIZE:
        done = sum(found[::2])
        await asyncio.to_thread(handle.block_status, SIZE - done, done, collect)
    return found


CONTEXTS = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:c"]


async def connect_with_contexts(daemon: Daemon, name: str) -> nbd.NBD:
    handle = nbd.NBD()
    for context in CONTEXTS:
        handle.add_meta_context(context)
    await asyncio.to_thread(handle.connect_uri, daemon.export_uris(name)[0])
    return handle


@pytest.mark.parametrize("kind", ["plain", "compressed", "over a backing file"])
async def test_contexts_say_what_the_server_says(
    options: DaemonOptions, tmp_path: Path, kind: str
) -> None:
    make_disk(tmp_path, kind)
    said = []
    for count in (0, 2):
        make_disk(tmp_path, kind)
        async with Daemon(replace(options, processes=count)) as daemon:
            await daemon.engine.create_checkpoint("c")
            guest = await connect(daemon, "vda")
            await asyncio.to_thread(guest.pwrite, b"1" * 100_000, MIB)
            await asyncio.to_thread(guest.zero, 2 * MIB, 6 * MIB)
            await daemon.engine.create_snapshot("s")
            await daemon.engine.add_export("s", "vda", name="s", since={"c": "c"})
            await asyncio.to_thread(guest.pwrite, b"2" * 100_000, 7 * MIB)
            await asyncio.to_thread(guest.trim, MIB, 3 * MIB)
            handle = await connect_with_contexts(daemon, "s")
            assert sum(clients(daemon, "s")) == (1 if count else 0)
            said.append([await describe(handle, each) for each in CONTEXTS])
    assert said[0] == said[1]


async def test_snapshots_that_give_up_ranges_stay_with_the_server(options: DaemonOptions) -> None:
    async with Daemon(options) as daemon:
        for release in (Release.ON_TRIM, Release.ON_READ):
            await daemon.engine.create_snapshot(release.value, release=release)
            shown = await daemon.engine.add_export(release.value, "vda", name=release.value)
            handle = await connect(daemon, shown.name)
            assert await read(handle, 0, MIB) == CONTENT[:MIB]
            assert (clients(daemon, shown.name), shown.connections) == ([0, 0], 1)


async def test_snapshot_that_breaks_is_refused_and_the_guest_writes_on(
    options: DaemonOptions, tmp_path: Path
) -> None:
    """Rules 5 and 8: told as by the server."""
    small = replace(options, scratch=ScratchOptions(directory=tmp_path / "scratch", quota=MIB))
    async with Daemon(small) as daemon:
        handle = await connect(daemon, (await snapshot(daemon)).name)
        assert await read(handle, 0, MIB) == CONTENT[:MIB]
        guest = await connect(daemon, "vda")
        await asyncio.to_thread(guest.pwrite, b"1" * 2 * MIB, 0)
        with pytest.raises(nbd.Error) as refused:
            await read(handle, 0, 4096)
        assert sum(clients(daemon, "s")) == 1
        assert refused.value.errnum == errno.EIO
        assert await read(guest, 0, 4096) == b"1" * 4096


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def test_deleted_snapshot_is_given_up_by_all_processes(options: DaemonOptions) -> None:
    """Its space is free, its clients are told, and what it was of can be opened by others."""
    async with Daemon(options) as daemon:
        await snapshot(daemon)
        await daemon.engine.drop_snapshot("s")
        before = [open_files(pid) for pid in pids(daemon)]
        for name in ("s", "s", "t"):
            handle = await connect(daemon, (await snapshot(daemon, name)).name)
            assert await read(handle, 0, MIB) == CONTENT[:MIB]
            assert [open_files(pid) for pid in pids(daemon)] != before
            await daemon.engine.drop_snapshot(name)
            assert [open_files(pid) for pid in pids(daemon)] == before
            with pytest.raises(nbd.Error):
                await read(handle, 0, 10)
        assert not daemon.engine.disks["vda"].copies.scratch_bytes


async def test_killed_process_takes_neither_guest_nor_snapshot_along(
    options: DaemonOptions, caplog: pytest.LogCaptureFixture
) -> None:
    """And nobody is told of it again with the next snapshot."""
    async with Daemon(options) as daemon:
        shown = await snapshot(daemon)
        lost, kept = [await connect(daemon, shown.name) for _ in range(2)]
        guest = await connect(daemon, "vda")
        os.kill(pids(daemon)[0], signal.SIGKILL)
        await until(lambda: shown.connections == 1)
        with pytest.raises(nbd.Error):
            await read(lost, 0, 10)
        await asyncio.to_thread(guest.pwrite, b"1" * MIB, 0)
        assert await read(kept, 0, SIZE) == whole()
        os.kill(pids(daemon)[1], signal.SIGKILL)
        await until(lambda: shown.connections == 0)
        last = await connect(daemon, shown.name)
        assert await read(last, 0, SIZE) == whole()
        assert clients(daemon, shown.name) == [0, 0]
        assert await read(await connect(daemon, (await snapshot(daemon, "t")).name), 0, 10)
    assert not any("not by process" in each for each in caplog.messages)


async def test_process_that_hangs_does_not_keep_a_snapshot_from_being_exported(
    options: DaemonOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 5: it is killed, and the others serve."""
    monkeypatch.setattr(deputies, "END_SECONDS", 0.5)
    async with Daemon(options) as daemon:
        await snapshot(daemon, "before")
        hanging = pids(daemon)[0]
        os.kill(hanging, signal.SIGSTOP)
        guest = await connect(daemon, "vda")
        adding = asyncio.create_task(snapshot(daemon))
        await asyncio.to_thread(guest.pwrite, b"1" * MIB, 0)
        shown = await adding
        await until(lambda: not is_alive(hanging))
        assert await read(await connect(daemon, shown.name), 0, 10) == CONTENT[:10]
        assert clients(daemon, shown.name) == [0, 1]


@pytest.mark.parametrize("left", [0, 1, 2])
async def test_process_without_descriptors_leaves_a_snapshot_to_the_others(
    options: DaemonOptions, caplog: pytest.LogCaptureFixture, left: int
) -> None:
    """And takes the next one, with none of its descriptors lost."""
    async with Daemon(options) as daemon:
        pid = pids(daemon)[0]
        await snapshot(daemon, "first")
        await daemon.engine.drop_snapshot("first")
        files = open_files(pid)
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        numbers = sorted(map(int, os.listdir(f"/proc/{pid}/fd")))
        free = [each for each in range(numbers[-1] + 4) if each not in numbers]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[left], before[1]))
        shown = await snapshot(daemon)
        assert not processes(daemon)[0].has(shown)
        assert await read(await connect(daemon, "s"), 0, 10) == CONTENT[:10]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        assert open_files(pid) == files
        assert processes(daemon)[0].has(await snapshot(daemon, "t"))
    assert any("no more descriptors are allowed" in each for each in caplog.messages)


async def test_backing_file_that_was_replaced_is_not_read_by_others(
    options: DaemonOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The server has the one that the disk was opened over."""
    make_disk(tmp_path, "over a backing file")
    async with Daemon(options) as daemon:
        (tmp_path / "other.qcow2").write_bytes((tmp_path / "base.qcow2").read_bytes())
        os.replace(tmp_path / "other.qcow2", tmp_path / "base.qcow2")
        shown = await snapshot(daemon)
        assert await read(await connect(daemon, "s"), 0, SIZE) == whole()
        assert clients(daemon, shown.name) == [0, 0]
    assert sum("another file has taken its place" in each for each in caplog.messages) == 2


async def test_image_over_what_its_header_does_not_name_is_not_shared(tmp_path: Path) -> None:
    """Another process would read what it does name."""

    async def open_other(file: FileNode, header: object, chain: object) -> MemoryNode:
        return MemoryNode(SIZE)

    file = FileNode.open(make_disk(tmp_path, "over a backing file"), read_only=False)
    image = await Qcow2Image.from_file(file, open_backing=open_other)
    assert image.host_file() is None
    await image.close()


async def test_server_without_descriptors_serves_a_snapshot_by_itself(
    options: DaemonOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: str, flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with Daemon(options) as daemon:
        await daemon.engine.create_snapshot("s")
        with monkeypatch.context() as full:
            full.setattr(deputies.os, "open", fail)
            shown = await daemon.engine.add_export("s", "vda", name="s")
        assert await read(await connect(daemon, "s"), 0, 10) == CONTENT[:10]
        assert clients(daemon, shown.name) == [0, 0]
    assert "export 's' has no other processes: [Errno 24] Too many open files" in caplog.messages


async def test_machine_that_shows_stores_in_any_order_serves_snapshots_by_itself(
    options: DaemonOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 1."""
    monkeypatch.setattr(shared_codes.platform, "machine", lambda: "aarch64")
    async with Daemon(options) as daemon:
        shown = await snapshot(daemon)
        assert await read(await connect(daemon, "s"), 0, 10) == CONTENT[:10]
        assert clients(daemon, shown.name) == [0, 0]


async def test_export_by_a_command_of_qemu_is_served_by_processes(options: DaemonOptions) -> None:
    """``block-export-add`` of a snapshot's node, and its removal amid."""
    async with Daemon(options) as daemon:
        await daemon.engine.create_snapshot("s")
        adding = asyncio.create_task(daemon.node_exports.add("e", "s/vda", name="e"))
        await until(lambda: daemon.exports.has("e"))
        await daemon.node_exports.remove("e", hard=True)
        await adding
        assert not any(each._exports for each in processes(daemon))
        await daemon.node_exports.add("e", "s/vda", name="e")
        assert await read(await connect(daemon, "e"), 0, 10) == CONTENT[:10]
        assert sum(clients(daemon, "e")) == 1
        await daemon.node_exports.remove("e", hard=True)
        assert not any(each._exports for each in processes(daemon))


async def test_backup_of_changes_only_is_refused_what_is_not_kept(options: DaemonOptions) -> None:
    async with Daemon(options) as daemon:
        await daemon.engine.create_checkpoint("c")
        guest = await connect(daemon, "vda")
        await asyncio.to_thread(guest.pwrite, b"1" * 65536, 0)
        (part,) = await daemon.engine.begin_backup("b", since="c", only_changes=True)
        handle = await connect(daemon, part.export)
        assert await read(handle, 0, 65536) == b"1" * 65536
        with pytest.raises(nbd.Error):
            await read(handle, MIB, 4096)
        await daemon.engine.abort_backup("b")


async def test_image_can_be_opened_by_others_once_the_server_has_ended(
    options: DaemonOptions,
) -> None:
    """Rule 7: no process holds a lock of the server's, or outlives it."""
    async with Daemon(options) as daemon:
        await connect(daemon, (await snapshot(daemon)).name)
        found = pids(daemon)
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(options.listen[0].socket)
    assert not any(map(is_alive, found))
    subprocess.run(["qemu-io", "-c", "write -q 0 512", options.disks["vda"]], check=True)


async def test_name_that_is_used_again_at_once_is_that_of_the_newer_export(
    options: DaemonOptions, caplog: pytest.LogCaptureFixture
) -> None:
    """By two clients of QEMU's commands, while a process has not taken the older one yet."""
    async with Daemon(options) as daemon:
        await daemon.engine.create_snapshot("s")
        os.kill(pids(daemon)[0], signal.SIGSTOP)
        working = [asyncio.create_task(daemon.node_exports.add("1", "s/vda", name="e"))]
        await until(lambda: bool(processes(daemon)[0]._waiters))
        working.append(asyncio.create_task(daemon.node_exports.remove("1")))
        await until(lambda: not daemon.exports.has("e"))
        working.append(asyncio.create_task(daemon.node_exports.add("2", "s/vda", name="e")))
        await until(lambda: daemon.exports.has("e"))
        os.kill(pids(daemon)[0], signal.SIGCONT)
        await asyncio.gather(*working)
        shown = daemon.exports.find("e")
        assert shown is not None
        assert [[it.export for it in each._exports.values()] for each in processes(daemon)] == [
            [shown],
            [shown],
        ]
        for handle in [await connect(daemon, "e") for _ in range(2)]:
            assert await read(handle, 0, 10) == CONTENT[:10]
        assert clients(daemon, "e") == [1, 1]
    assert not [each for each in caplog.records if each.levelname in ("WARNING", "ERROR")]


@pytest.mark.parametrize("lent", [0, 1, 2])
async def test_server_that_runs_out_of_descriptors_amid_leaves_none_with_a_process(
    options: DaemonOptions, monkeypatch: pytest.MonkeyPatch, lent: int
) -> None:
    """The scratch's would keep its space."""
    send, left = Link.send, lent

    def fail(link: Link, message: bytes, descriptor: int | None = None) -> None:
        nonlocal left
        if descriptor is not None:
            left -= 1
            if left < 0:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        send(link, message, descriptor)

    async with Daemon(replace(options, processes=1)) as daemon:
        (pid,) = pids(daemon)
        await snapshot(daemon, "first")
        await daemon.engine.drop_snapshot("first")
        before = open_files(pid)
        with monkeypatch.context() as full:
            full.setattr(Link, "send", fail)
            shown = await snapshot(daemon)
        assert not processes(daemon)[0].has(shown)
        assert open_files(pid) == before
        assert await read(await connect(daemon, "s"), 0, 10) == CONTENT[:10]
        assert processes(daemon)[0].has(await snapshot(daemon, "t"))


async def test_snapshot_is_not_given_up_while_it_is_read_for_a_process_that_has_ended(
    options: DaemonOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk might be closed, and the descriptor be another file's."""
    begun, go_on = asyncio.Event(), asyncio.Event()
    locate = SnapshotAccess.locate

    async def wait(node: SnapshotAccess, part: int) -> Places:
        begun.set()
        await go_on.wait()
        return await locate(node, part)

    monkeypatch.setattr(SnapshotAccess, "locate", wait)
    async with Daemon(replace(options, processes=1)) as daemon:
        shown = await snapshot(daemon)
        handle = await connect(daemon, shown.name)
        handle.aio_pread(nbd.Buffer(4096), 0)
        await begun.wait()
        os.kill(pids(daemon)[0], signal.SIGKILL)
        await until(lambda: not processes(daemon)[0]._exports)
        dropping = asyncio.create_task(daemon.engine.drop_snapshot("s"))
        await asyncio.sleep(0.1)
        assert not dropping.done()
        go_on.set()
        await dropping
