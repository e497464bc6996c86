"""Images served by processes of their own; a whole server in this process."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbd
import pytest

from nbdfleece.daemon import Daemon, DaemonOptions
from nbdfleece.deputies import deputies, messages
from nbdfleece.deputies.deputies import Deputies, ProcessDeputy
from nbdfleece.deputies.link import Link
from nbdfleece.errors import StateError
from nbdfleece.export.export import Export
from nbdfleece.export.policy import ExportRule
from nbdfleece.nbd.outcomes import TlsMode
from nbdfleece.nbd.uri import NbdUri
from nbdfleece.qcow2.image import Qcow2Image
from nbdfleece.server import channel
from nbdfleece.server.connection import Connection
from nbdfleece.server.handshake import Handshake
from nbdfleece.server.limits import Limits
from nbdfleece.server.loop import LoopChoice, run
from nbdfleece.server.tls import TlsSettings, load_certificates
from tests.pki import make_pki
from tests.waiting import until

MIB = 1 << 20
CONTENT = random.Random(5).randbytes(2 * MIB)
SECONDS_MAX = 60

_IHAVEOPT = b"IHAVEOPT"
_GREETING_BYTES = 18
_EXPORT_NAME, _LIST = 1, 3


@pytest.fixture
def options(tmp_path: Path) -> DaemonOptions:
    """Two images, each with the same content, and two processes."""
    (tmp_path / "raw").write_bytes(CONTENT)
    images = {name: tmp_path / f"{name}.qcow2" for name in ("a", "b")}
    for image in images.values():
        words = ("-f", "raw", "-O", "qcow2", tmp_path / "raw", image)
        subprocess.run(["qemu-img", "convert", *words], check=True)
    return DaemonOptions(
        disks={},
        images=images,
        processes=2,
        listen=[NbdUri(transport="unix", socket=str(tmp_path / "nbd.sock"))],
        grace_seconds=5,
    )


async def connect(daemon: Daemon, name: str) -> nbd.NBD:
    handle = nbd.NBD()
    await asyncio.to_thread(handle.connect_uri, daemon.export_uris(name)[0])
    return handle


async def read(handle: nbd.NBD, offset: int = 0, length: int = 2 * MIB) -> bytes:
    return bytes(await asyncio.to_thread(handle.pread, length, offset))


def processes(daemon: Daemon) -> list[ProcessDeputy]:
    return daemon.deputies._processes


def pids(daemon: Daemon) -> list[int]:
    return [each._process.pid for each in processes(daemon)]


def export(daemon: Daemon, name: str) -> Export:
    found = daemon.exports.find(name)
    assert found is not None
    return found


def clients(daemon: Daemon, name: str) -> list[int]:
    """How many clients of an export each process has."""
    return [each.load(export(daemon, name))[1] for each in processes(daemon)]


def is_alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def is_negotiated(connection: object) -> bool:
    """Whether all options of a client are answered, and it has not read all of that."""
    is_here = isinstance(connection, Connection) and isinstance(connection._phase, Handshake)
    return is_here and connection._phase.outcome is not None


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_processes_serve_and_end_with_the_server(options: DaemonOptions, loop: LoopChoice) -> None:
    async def main() -> list[int]:
        async with Daemon(replace(options, loop=loop)) as daemon:
            handles = [await connect(daemon, name) for name in ("a", "b")]
            for handle in handles:
                assert await read(handle) == CONTENT
            assert len(daemon.server.connections) == 2
            assert [clients(daemon, name) for name in ("a", "b")] == [[1, 0], [0, 1]]
            for handle in handles:
                await asyncio.to_thread(handle.shutdown)
            await daemon.server.wait_idle()
            assert [export(daemon, name).connections for name in ("a", "b")] == [0, 0]
            return pids(daemon)

    assert not any(is_alive(pid) for pid in run(main(), loop, debug=True))


async def test_clients_of_one_image_are_spread_and_kept_from_those_of_another(
    options: DaemonOptions,
) -> None:
    """Rule 5: a stream of four connections leaves a process to whom was there before."""
    async with Daemon(options) as daemon:
        guest = await connect(daemon, "a")
        stream = [await connect(daemon, "b") for _ in range(4)]
        assert [clients(daemon, name) for name in ("a", "b")] == [[1, 0], [0, 4]]
        await asyncio.to_thread(guest.shutdown)
        await until(lambda: clients(daemon, "a") == [0, 0])
        stream += [await connect(daemon, "b") for _ in range(4)]
        assert clients(daemon, "b") == [4, 4]


async def test_requests_behind_the_handshake_go_along(options: DaemonOptions) -> None:
    """A client need not wait for the reply to EXPORT_NAME before it asks."""
    async with Daemon(options) as daemon:
        reader, writer = await asyncio.open_unix_connection(options.listen[0].socket)
        requests = b"".join(
            struct.pack(">IHHQQI", 0x25609513, 0, 0, cookie, cookie * MIB, MIB)
            for cookie in range(2)
        )
        go = _IHAVEOPT + struct.pack(">II", _EXPORT_NAME, 1) + b"a"
        writer.write(struct.pack(">I", 3) + go + requests)
        await reader.readexactly(_GREETING_BYTES + 10)
        for cookie in range(2):
            reply = await reader.readexactly(16 + MIB)
            assert reply[:16] == struct.pack(">IIQ", 0x67446698, 0, cookie)
            assert reply[16:] == CONTENT[cookie * MIB : (cookie + 1) * MIB]
        assert sum(clients(daemon, "a")) == 1
        writer.close()


async def test_client_that_has_not_read_its_handshake_is_handed_over_once_it_has(
    options: DaemonOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is owed is sent by the server, and then the process goes on."""
    monkeypatch.setattr(channel, "SOCKET_BUFFER_BYTES", 4096)
    lists = 250
    async with Daemon(options) as daemon:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(options.listen[0].socket)
        go = _IHAVEOPT + struct.pack(">II", _EXPORT_NAME, 1) + b"a"
        ask = struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, 5, 100)
        listing = (_IHAVEOPT + struct.pack(">II", _LIST, 0)) * lists
        sock.sendall(struct.pack(">I", 3) + listing + go + ask)
        await until(lambda: any(map(is_negotiated, daemon.server.connections)))
        assert sum(clients(daemon, "a")) == 0
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        await reader.readexactly(_GREETING_BYTES)
        for _ in range(3 * lists):  # two exports, and that these were all
            _, _, _, length = struct.unpack(">QIII", await reader.readexactly(20))
            await reader.readexactly(length)
        await reader.readexactly(10)
        assert await reader.readexactly(16) == struct.pack(">IIQ", 0x67446698, 0, 7)
        assert await reader.readexactly(100) == CONTENT[5:105]
        assert sum(clients(daemon, "a")) == 1
        writer.close()


async def test_limits_of_connections_count_the_clients_of_processes(
    options: DaemonOptions,
) -> None:
    rule = ExportRule(pattern="a", connections_max=1)
    limited = replace(options, export_rules=[rule], limits=Limits(connections_max=2))
    async with Daemon(limited) as daemon:
        first = await connect(daemon, "a")
        with pytest.raises(nbd.Error, match="policy"):
            await connect(daemon, "a")
        second = await connect(daemon, "b")
        with pytest.raises(nbd.Error):
            await connect(daemon, "b")
        await asyncio.to_thread(first.shutdown)
        await until(lambda: export(daemon, "a").connections == 0)
        assert await read(await connect(daemon, "a"), 5, 100) == CONTENT[5:105]
        assert await read(second, 5, 100) == CONTENT[5:105]


async def test_client_that_there_is_no_descriptor_for_is_refused_and_does_not_count(
    options: DaemonOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(link: Link, message: bytes, descriptor: int | None = None) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with Daemon(options) as daemon:
        with monkeypatch.context() as full:
            full.setattr(Link, "send", fail)
            with pytest.raises(nbd.Error):
                await read(await connect(daemon, "a"))
        await daemon.server.wait_idle()
        assert (export(daemon, "a").connections, clients(daemon, "a")) == (0, [0, 0])
        assert await read(await connect(daemon, "a")) == CONTENT
    assert any("cannot be handed over: Too many open files" in it for it in caplog.messages)


async def test_settings_of_an_export_hold_in_its_process(options: DaemonOptions) -> None:
    """An unaligned request is refused as the server would."""
    rule = ExportRule(pattern="a", minimum_block_size=4096, maximum_payload=65536)
    async with Daemon(replace(options, export_rules=[rule])) as daemon:
        handle = await connect(daemon, "a")
        assert handle.get_block_size(nbd.SIZE_MINIMUM) == 4096
        handle.set_strict_mode(0)
        with pytest.raises(nbd.Error, match="Invalid argument"):
            await read(handle, 512, 512)
        assert sum(clients(daemon, "a")) == 1


async def test_client_is_told_why_it_ends_when_the_server_ends(options: DaemonOptions) -> None:
    """Rule 8, and it does not take until a process is killed."""
    async with Daemon(options) as daemon:
        handle = await connect(daemon, "a")
        ending = asyncio.create_task(daemon.server.shut_down(5))
        await asyncio.sleep(0.1)
        with pytest.raises(nbd.Error) as refused:
            await read(handle)
        assert refused.value.errnum == errno.ESHUTDOWN
        await ending
        assert not daemon.server.connections


async def test_client_that_reads_its_handshake_when_the_server_ends_is_not_handed_over(
    options: DaemonOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who ends the server's clients would not know of one that begins anew elsewhere."""
    monkeypatch.setattr(channel, "SOCKET_BUFFER_BYTES", 4096)
    async with Daemon(options) as daemon:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(options.listen[0].socket)
        go = _IHAVEOPT + struct.pack(">II", _EXPORT_NAME, 1) + b"a"
        sock.sendall(struct.pack(">I", 3) + (_IHAVEOPT + struct.pack(">II", _LIST, 0)) * 250 + go)
        await until(lambda: any(map(is_negotiated, daemon.server.connections)))
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        ending = asyncio.create_task(daemon.server.shut_down(SECONDS_MAX))
        await asyncio.sleep(0)
        reading = asyncio.create_task(reader.read())
        await ending
        assert not daemon.server.connections
        await reading
        writer.close()


async def test_client_that_reads_nothing_does_not_hold_the_end_up(options: DaemonOptions) -> None:
    async with Daemon(replace(options, grace_seconds=0.3)) as daemon:
        dead = await connect(daemon, "a")
        buffers = [nbd.Buffer(2 * MIB) for _ in range(8)]
        for buffer in buffers:
            dead.aio_pread(buffer, 0)
        assert await read(await connect(daemon, "a")) == CONTENT
        found = pids(daemon)
    assert not any(is_alive(pid) for pid in found)
    assert dead.aio_in_flight() == 8


async def test_client_that_a_process_has_no_descriptor_for_is_closed_and_counts_no_more(
    options: DaemonOptions, caplog: pytest.LogCaptureFixture
) -> None:
    """The next one is served all the same."""
    async with Daemon(replace(options, processes=1)) as daemon:
        (pid,) = pids(daemon)
        kept = await connect(daemon, "a")
        assert await read(kept) == CONTENT
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, before[1]))
        lost = await connect(daemon, "a")
        with pytest.raises(nbd.Error):
            await read(lost)
        await until(lambda: clients(daemon, "a") == [1])
        assert export(daemon, "a").connections == 1
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        assert await read(kept) == CONTENT
        assert await read(await connect(daemon, "a")) == CONTENT
        assert clients(daemon, "a") == [2]
    assert any("no more descriptors are allowed" in each for each in caplog.messages)


async def test_nobody_waits_for_a_process_that_cannot_understand(options: DaemonOptions) -> None:
    """A bug of ours is told and ends the process, and with it who asked for something."""
    image = await Qcow2Image.open(options.images["a"], read_only=True)
    path, identity = os.fsencode(image.path), image.file.identity
    try:
        async with Deputies(1, Limits()) as started:
            odd = messages.Open(
                export=7,
                image=messages.Image(path=path, identity=identity),
                settings={"unknown": 1},
            )
            with pytest.raises(StateError, match=r"process \d+ has ended"):
                await started._processes[0]._ask(odd)
    finally:
        await image.close()


async def test_processes_have_the_priority_that_is_asked_for(options: DaemonOptions) -> None:
    """Rule 5: they may yield to the guests. Each of their threads does."""
    async with Daemon(replace(options, processes_nice=7)) as daemon:
        assert await read(await connect(daemon, "a")) == CONTENT
        (pid,) = (pid for pid, each in zip(pids(daemon), clients(daemon, "a"), strict=True) if each)
        own = os.getpriority(os.PRIO_PROCESS, 0)
        threads = [int(each) for each in os.listdir(f"/proc/{pid}/task")]
        assert {os.getpriority(os.PRIO_PROCESS, each) for each in threads} == {min(19, own + 7)}


async def test_server_has_the_lower_priority_if_that_is_asked_for() -> None:
    """Who may not raise anybody's can have pulls preferred, too."""

    async def priorities() -> list[int]:
        before = os.getpriority(os.PRIO_PROCESS, 0)
        async with Deputies(2, Limits(), nice=-5) as started:
            pids = [0, *(each._process.pid for each in started._processes)]
            return [os.getpriority(os.PRIO_PROCESS, pid) - before for pid in pids]

    # In a thread that ends: it is a thread that has a priority.
    assert await asyncio.to_thread(asyncio.run, priorities()) == [5, 0, 0]


async def test_what_ends_a_server_does_not_end_its_processes(options: DaemonOptions) -> None:
    """A terminal's signals go to all of them; the server says when it is time."""
    async with Daemon(options) as daemon:
        handle = await connect(daemon, "a")
        for pid in pids(daemon):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(pid, number)
        assert await read(handle) == CONTENT
        assert all(is_alive(pid) for pid in pids(daemon))


async def test_signals_do_not_end_a_process_that_has_just_begun(options: DaemonOptions) -> None:
    """Nor do they leave a traceback of one that was importing."""
    image = await Qcow2Image.open(options.images["a"], read_only=True)
    try:
        async with Deputies(1, Limits()) as started:
            pid = started._processes[0]._process.pid
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(pid, number)
            await started.add_image(Export(name="a", node=image), image)
            assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        await image.close()


@pytest.mark.parametrize("isolation", [(), ("-I",)], ids=["usual", "isolated"])
def test_processes_import_nothing_from_where_the_server_was_started(
    options: DaemonOptions, tmp_path: Path, isolation: tuple[str, ...]
) -> None:
    """Whoever may write there must not be able to have the server run it."""
    (tmp_path / "msgspec.py").write_text("raise SystemExit('not this one')")
    words = ["serve", "--read-only", f"a={options.images['a']}", "--processes", "1"]
    words += ["--listen", "unix:here", "--control", "none"]
    program = f"import sys; sys.path = {sys.path!r}; from nbdfleece.cli.main import main; main()"
    with subprocess.Popen(
        [sys.executable, *isolation, "-c", program, *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        try:
            ready = server.stdout.readline()
        finally:
            server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=SECONDS_MAX)
    assert (ready.startswith("nbdfleece: ready: "), errors, server.returncode) == (True, "", 0)


async def test_killed_process_takes_its_clients_along_and_no_others(
    options: DaemonOptions, caplog: pytest.LogCaptureFixture
) -> None:
    """New ones go to the process that is left, and with none left to the server."""
    async with Daemon(options) as daemon:
        first, second = pids(daemon)
        lost, kept = await connect(daemon, "a"), await connect(daemon, "b")
        os.kill(first, signal.SIGKILL)
        await until(lambda: len(daemon.server.connections) == 1)
        assert export(daemon, "a").connections == 0
        with pytest.raises(nbd.Error):
            await read(lost)
        assert await read(kept) == CONTENT
        again = await connect(daemon, "a")
        assert [clients(daemon, name) for name in ("a", "b")] == [[0, 1], [0, 1]]
        assert await read(again) == CONTENT
        os.kill(second, signal.SIGKILL)
        await until(lambda: not daemon.server.connections)
        assert await read(await connect(daemon, "b")) == CONTENT
        assert [clients(daemon, name) for name in ("a", "b")] == [[0, 0], [0, 0]]
        assert len(daemon.server.connections) == 1
    ends = [each.message for each in caplog.records if "has ended" in each.message]
    assert ends == [
        f"process {first} has ended: its 1 clients are disconnected, and it serves no more",
        f"process {second} has ended: its 2 clients are disconnected, and it serves no more",
    ]


async def test_process_that_hangs_is_killed_when_its_image_is_to_be_closed(
    options: DaemonOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An image that is removed is unlocked, whatever happens (rule 7)."""
    monkeypatch.setattr(deputies, "END_SECONDS", 0.5)
    async with Daemon(options) as daemon:
        (first, second) = pids(daemon)
        os.kill(first, signal.SIGSTOP)
        await daemon.node_exports.remove("a", hard=True)
        assert processes(daemon)[0]._process.returncode == -signal.SIGKILL
        await daemon.graph.remove("a")
        subprocess.run(["qemu-io", "-c", "write -q 0 512", options.images["a"]], check=True)
        assert await read(await connect(daemon, "b")) == CONTENT
        os.kill(second, signal.SIGSTOP)
    assert not is_alive(second)
    assert [each.message for each in caplog.records if "killed" in each.message] == [
        f"process {first} does not answer: killed",
        f"process {second} does not answer: killed",
    ]


async def test_process_that_does_not_end_is_killed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(deputies, "END_SECONDS", 0.5)
    async with Deputies(1, Limits()) as started:
        pid = started._processes[0]._process.pid
        os.kill(pid, signal.SIGSTOP)
    assert not is_alive(pid)
    assert caplog.messages == [f"process {pid} does not end: killed"]


async def test_processes_write_into_the_log_of_the_server(
    options: DaemonOptions, caplog: pytest.LogCaptureFixture
) -> None:
    """With names, levels and the client that it is about; debugging lines only where wanted."""
    caplog.set_level(logging.INFO)
    async with Daemon(options) as daemon:
        handle = await connect(daemon, "a")
        await read(handle)
        with socket.socket(socket.AF_UNIX) as broken:
            broken.connect(options.listen[0].socket)
            go = _IHAVEOPT + struct.pack(">II", _EXPORT_NAME, 1) + b"a"
            broken.sendall(struct.pack(">I", 3) + go + b"x" * 28)
            await until(lambda: any("protocol error" in it for it in caplog.messages))
    (record,) = (each for each in caplog.records if "protocol error" in each.message)
    assert (record.name, record.levelname) == ("nbdfleece.server", "WARNING")
    assert f"unix:pid={os.getpid()},uid=" in record.message
    assert sum("opened export 'a'" in each for each in caplog.messages) == 2
    assert not any("connected" in each.message for each in caplog.records)


async def test_clients_with_tls_stay_with_the_server(
    options: DaemonOptions, tmp_path: Path
) -> None:
    folder = make_pki(tmp_path)
    settings = TlsSettings(credentials=load_certificates(folder), mode=TlsMode.SELECTIVETLS)
    async with Daemon(replace(options, tls=settings)) as daemon:
        handle = nbd.NBD()
        handle.set_tls(nbd.TLS_REQUIRE)
        handle.set_tls_certificates(str(folder))
        handle.set_tls_verify_peer(False)
        handle.set_export_name("a")
        await asyncio.to_thread(handle.connect_unix, options.listen[0].socket)
        assert await read(handle) == CONTENT
        assert (sum(clients(daemon, "a")), len(daemon.server.connections)) == (0, 1)
        assert await read(await connect(daemon, "a")) == CONTENT
        assert sum(clients(daemon, "a")) == 1


async def test_image_that_was_replaced_meanwhile_is_refused(options: DaemonOptions) -> None:
    """What the server has checked and what a process would serve are one file."""
    path = options.images["a"]
    image = await Qcow2Image.open(path, read_only=True)
    try:
        os.replace(options.images["b"], path)
        async with Deputies(1, Limits()) as started:
            shown = Export(name="a", node=image)
            with pytest.raises(StateError, match="another file has taken its place"):
                await started.add_image(shown, image)
            assert started.of(shown) is None
            os.unlink(path)
            with pytest.raises(StateError, match="No such file"):
                await started.add_image(shown, image)
    finally:
        await image.close()


async def test_answer_that_nobody_waits_for_any_more_is_no_trouble(
    options: DaemonOptions, caplog: pytest.LogCaptureFixture
) -> None:
    """It comes when the process was given up already."""
    image = await Qcow2Image.open(options.images["a"], read_only=True)
    try:
        async with Deputies(1, Limits()) as started:
            (process,) = started._processes
            await started.add_image(Export(name="a", node=image), image)
            os.kill(process._process.pid, signal.SIGSTOP)
            closing = asyncio.create_task(started.remove("a", unless=None))
            await until(lambda: bool(process._waiters))
            closing.cancel()
            os.kill(process._process.pid, signal.SIGCONT)
            await until(lambda: not process._waiters)
            async with asyncio.timeout(SECONDS_MAX):
                await started.add_image(Export(name="a", node=image), image)
    finally:
        await image.close()
    assert not caplog.messages


async def test_names_of_files_need_not_be_utf8(options: DaemonOptions, tmp_path: Path) -> None:
    """In what a process says of them, too."""
    path = tmp_path / "\udce9.qcow2"
    options.images["a"].rename(path)
    images = {"a": path}
    async with Daemon(replace(options, images=images)) as daemon:
        assert await read(await connect(daemon, "a")) == CONTENT
        assert sum(clients(daemon, "a")) == 1
    image = await Qcow2Image.open(path, read_only=True)
    try:
        async with Deputies(1, Limits()) as started:
            os.replace(options.images["b"], path)
            with pytest.raises(
                StateError, match=r"\\udce9.qcow2: another file has taken its place"
            ):
                await started.add_image(Export(name="a", node=image), image)
            path.unlink()
            with pytest.raises(StateError, match=r"No such file or directory: .*udce9.qcow2"):
                await started.add_image(Export(name="a", node=image), image)
    finally:
        await image.close()


async def test_second_process_that_does_not_start_ends_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin, begun = deputies._start, []

    def fail(descriptor: int, loop: LoopChoice, nice: int) -> subprocess.Popen[bytes]:
        if begun:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        begun.append(begin(descriptor, loop, nice))
        return begun[0]

    monkeypatch.setattr(deputies, "_start", fail)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(BlockingIOError):
        async with Deputies(2, Limits()):
            pass
    assert not is_alive(begun[0].pid)
    assert len(os.listdir("/proc/self/fd")) == len(before)


async def test_process_that_does_not_start_is_told(
    options: DaemonOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StateError, match=r"process \d+ has ended"):
        async with Daemon(options):
            pass
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with pytest.raises(FileNotFoundError):
        async with Daemon(options):
            pass
