"""A whole server in this process, on both event loops."""

from __future__ import annotations

import asyncio
import random
import subprocess
from dataclasses import replace
from pathlib import Path

import nbd
import pytest

from nbdfleece.control.client import ControlClient
from nbdfleece.daemon import Daemon, DaemonOptions
from nbdfleece.engine.disk import ScratchOptions
from nbdfleece.errors import StateError
from nbdfleece.nbd.uri import NbdUri
from nbdfleece.server.channel import SocketChannel
from nbdfleece.server.loop import LoopChoice, run


@pytest.fixture
def options(tmp_path: Path) -> DaemonOptions:
    image = tmp_path / "vda.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "16M"], check=True)
    return DaemonOptions(
        disks={"vda": image},
        listen=[
            NbdUri(transport="unix", socket=str(tmp_path / "nbd.sock")),
            NbdUri(transport="tcp", host="127.0.0.1", port=0),
        ],
        control=tmp_path / "control.sock",
        scratch=ScratchOptions(directory=tmp_path),
    )


async def test_read_only_images_are_sent_without_a_copy(
    options: DaemonOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 1: "Zero-copy is allowed only from bytes that cannot be overwritten while in flight"."""
    content = random.Random(1).randbytes(8 << 20)
    (tmp_path / "raw").write_bytes(content)
    image, sent = tmp_path / "t.qcow2", 0
    for path in (image, options.disks["vda"]):
        words = ("qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "raw", path)
        subprocess.run(words, check=True)
    sendfile = SocketChannel.sendfile

    def counted(channel: SocketChannel, fd: int, offset: int, length: int) -> int:
        nonlocal sent
        count = sendfile(channel, fd, offset, length)
        sent += count
        return count

    monkeypatch.setattr(SocketChannel, "sendfile", counted)
    async with Daemon(replace(options, images={"t": image})) as daemon:
        for name, is_still in (("vda", False), ("t", True)):
            uri = daemon.export_uris(name)[0]
            copying = await asyncio.create_subprocess_exec("nbdcopy", uri, tmp_path / name)
            assert await copying.wait() == 0
            assert (tmp_path / name).read_bytes() == content
            assert bool(sent) is is_still


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_foreign_clients_read_every_listener(options: DaemonOptions, loop: LoopChoice) -> None:
    async def main() -> None:
        async with Daemon(options) as daemon:
            uris = daemon.export_uris("vda")
            assert len(uris) == 2
            for uri in uris:
                asked = await asyncio.create_subprocess_exec(
                    "nbdinfo", "--size", uri, stdout=asyncio.subprocess.PIPE
                )
                output, _ = await asked.communicate()
                assert (asked.returncode, output) == (0, b"16777216\n")

    run(main(), loop, debug=True)


def test_control_client_works_beside_the_loop(options: DaemonOptions) -> None:
    def ask() -> list[str]:
        assert options.control is not None
        with ControlClient(options.control) as client:
            return [disk["name"] for disk in client.execute("query-disks")]

    async def main() -> None:
        async with Daemon(options):
            assert await asyncio.to_thread(ask) == ["vda"]

    run(main())


async def test_end_leaves_no_sockets(options: DaemonOptions, tmp_path: Path) -> None:
    async with Daemon(options):
        assert {path.name for path in tmp_path.glob("*.sock")} == {"nbd.sock", "control.sock"}
    assert list(tmp_path.glob("*.sock")) == []


async def test_failed_start_raises_what_failed_and_leaves_no_sockets(
    options: DaemonOptions, tmp_path: Path
) -> None:
    disks = {**options.disks, "vdb": tmp_path / "none"}
    with pytest.raises(FileNotFoundError, match="none"):
        async with Daemon(replace(options, disks=disks)):
            raise AssertionError("it started")
    assert list(tmp_path.glob("*.sock")) == []


async def test_two_servers_cannot_have_one_socket(options: DaemonOptions) -> None:
    async with Daemon(options) as first:
        with pytest.raises(StateError, match="another server listens there"):
            async with Daemon(options):
                raise AssertionError("it started")
        assert first.export_uris("vda")


async def test_first_reason_to_stop_counts(options: DaemonOptions) -> None:
    async with Daemon(options) as daemon:
        daemon.request_stop("host-qmp-quit")
        daemon.request_stop("host-signal")
        await daemon.wait_stop_requested()
        assert daemon._stop_reason == "host-qmp-quit"


async def test_exception_inside_ends_the_server_in_good_order(
    options: DaemonOptions, tmp_path: Path
) -> None:
    with pytest.raises(KeyError):
        async with Daemon(options):
            raise KeyError
    assert list(tmp_path.glob("*.sock")) == []
    subprocess.run(["qemu-img", "check", "-q", options.disks["vda"]], check=True)


async def test_client_that_reads_no_replies_stalls_neither_guest_nor_backup(
    options: DaemonOptions,
) -> None:
    """Rule 5: it asks for the whole snapshot, takes nothing of it, and is closed in the end."""
    async with Daemon(replace(options, grace_seconds=0.5)) as daemon:
        disk = daemon.engine.disk("vda")
        await disk.node.write(0, memoryview(b"a" * disk.size))
        await daemon.engine.create_snapshot("s")
        export = await daemon.engine.add_export("s", "vda")
        (uri, _) = daemon.export_uris(export.name)
        dead = nbd.NBD()
        await asyncio.to_thread(dead.connect_uri, uri)
        buffers = [nbd.Buffer(1 << 20) for _ in range(16)]
        for number, buffer in enumerate(buffers):
            dead.aio_pread(buffer, number << 20)
        for offset in range(0, disk.size, 1 << 20):
            await disk.node.write(offset, memoryview(b"b" * (1 << 20)))
        copied = await asyncio.create_subprocess_exec(
            "nbdcopy", uri, "-", stdout=asyncio.subprocess.PIPE
        )
        output, _ = await copied.communicate()
        assert output == b"a" * disk.size
        assert daemon.engine.snapshot("s").error is None
        assert dead.aio_in_flight() > 0
