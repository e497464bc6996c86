"""The test server: what it serves, and that each fault is what clients really meet."""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbd
import pytest

from nbdfleece.errors import ImageLockedError, StateError
from nbdfleece.testing import (
    BadMagic,
    Command,
    Cut,
    Delay,
    Drop,
    Fail,
    Lie,
    LiveServer,
    Lying,
    MemoryNode,
    WrongCookie,
)

KIB, MIB = 1 << 10, 1 << 20
Serve = Callable[..., LiveServer]


@contextmanager
def connected(server: LiveServer, *contexts: str) -> Iterator[nbd.NBD]:
    client = nbd.NBD()
    for context in contexts or [nbd.CONTEXT_BASE_ALLOCATION]:
        client.add_meta_context(context)
    client.connect_uri(server.uri)
    yield client
    if client.aio_is_ready():
        client.shutdown()


def status(client: nbd.NBD, length: int = MIB, offset: int = 0) -> list[tuple[str, list[int]]]:
    """What the server says, context by context, as it says it."""
    found: list[tuple[str, list[int]]] = []

    def take(context: str, position: int, entries: list[int], error: object) -> int:
        found.append((context, list(entries)))
        return 0

    client.block_status(length, offset, take)
    return found


# --- disks


def test_bytes_in_memory_are_served_and_written(nbd_server: Serve) -> None:
    server = nbd_server(b"x" * MIB + bytes(MIB), export="disk")
    with connected(server) as client:
        assert client.pread(4, 0) == b"xxxx"
        client.pwrite(b"new", 10)
        assert status(client, 2 * MIB) == [("base:allocation", [MIB, 0, MIB, 3])]
    assert isinstance(server.node, MemoryNode)
    assert server.node.content[9:14] == b"xnewx"
    assert [seen.command for seen in server.seen] == [
        Command.READ, Command.WRITE, Command.BLOCK_STATUS,
    ]  # fmt: skip
    assert server.seen[1][1:3] == (10, 3)


def test_dirty_bitmaps_are_shown(nbd_server: Serve) -> None:
    server = nbd_server(MIB, dirty={"b0": [(64 * KIB, 4096)], "none": []})
    with connected(server, "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:none") as client:
        assert status(client) == [
            ("qemu:dirty-bitmap:b0", [64 * KIB, 0, 4096, 1, MIB - 68 * KIB, 0]),
            ("qemu:dirty-bitmap:none", [MIB, 0]),
        ]


def test_qcow2_file_is_served_with_its_bitmaps_and_closed_at_the_end(
    nbd_server: Serve, tmp_path: Path
) -> None:
    image = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", image, "b0"], check=True)
    with LiveServer(image) as server, connected(server) as client:
        client.pwrite(b"kept", 0)
        with pytest.raises(ImageLockedError):
            nbd_server(image)
    server = nbd_server(image, read_only=True, bitmaps=["b0"])
    with connected(server, "qemu:dirty-bitmap:b0") as client:
        assert client.pread(4, 0) == b"kept"
        assert status(client) == [("qemu:dirty-bitmap:b0", [64 * KIB, 1, MIB - 64 * KIB, 0])]
        assert client.is_read_only()


def test_raw_file_is_served(nbd_server: Serve, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    with connected(nbd_server(path, format="raw")) as client:
        client.pwrite(b"into the file", 0, nbd.CMD_FLAG_FUA)
    assert path.read_bytes().startswith(b"into the file")


def test_disk_that_cannot_be_opened_leaves_nothing_behind(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    server = LiveServer(image, bitmaps=["none"])
    with pytest.raises(StateError, match="'none' is not found"):
        server.start()
    assert not Path(server.socket).parent.exists()
    subprocess.run(["qemu-img", "check", "-q", image], check=True)


def test_foreign_programs_are_served(nbd_server: Serve) -> None:
    server = nbd_server(b"x" * MIB)
    printed = subprocess.check_output(["qemu-img", "info", "--output=json", server.uri])
    assert json.loads(printed)["virtual-size"] == MIB


# --- faults


def test_error_befalls_the_range_the_command_and_the_count_that_were_said(
    nbd_server: Serve,
) -> None:
    fault = Fail(command=Command.READ, offset=4096, end=8192, skip=1, count=1, error=errno.ENOSPC)
    server = nbd_server(b"x" * MIB, faults=[fault])
    with connected(server) as client:
        client.pread(4096, 0)
        client.pread(4096, 8192)
        client.pwrite(b"y", 5000)
        client.pread(512, 8191)
        with pytest.raises(nbd.Error) as caught:
            client.pread(512, 4097)
        assert caught.value.errnum == errno.ENOSPC
        client.pread(512, 4097)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_no_request_to_a_file_passes_the_faults_by(
    nbd_server: Serve, tmp_path: Path, image_format: str
) -> None:
    """The server answers small ones of a file by a short way, without a coroutine."""
    image = tmp_path / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", image_format, image, "1M"], check=True)
    server = nbd_server(image, format=image_format)
    with connected(server) as client:
        for _ in range(2):  # the second time there is a cluster
            client.pwrite(b"x" * 512, 0)
            client.pread(512, 0)
        assert [seen.command for seen in server.seen] == [Command.WRITE, Command.READ] * 2
        server.inject(Fail(error=errno.EIO))
        for work in (lambda: client.pread(512, 0), lambda: client.pwrite(b"y" * 512, 0)):
            with pytest.raises(nbd.Error) as caught:
                work()
            assert caught.value.errnum == errno.EIO
        server.heal()
        assert client.pread(512, 0) == b"x" * 512


def test_failed_write_has_not_written(nbd_server: Serve) -> None:
    server = nbd_server(MIB, faults=[Fail(command=Command.WRITE)])
    with connected(server) as client:
        with pytest.raises(nbd.Error) as caught:
            client.pwrite(b"y", 0)
        assert caught.value.errnum == errno.EIO
        assert client.pread(1, 0) == b"\0"


def test_faults_come_and_go_while_clients_are_connected(nbd_server: Serve) -> None:
    server = nbd_server(MIB)
    with connected(server) as client:
        client.flush()
        server.inject(Fail(command=Command.FLUSH))
        with pytest.raises(nbd.Error):
            client.flush()
        server.heal()
        client.flush()


def test_delayed_request_is_carried_out_later(nbd_server: Serve) -> None:
    server = nbd_server(MIB, faults=[Delay(command=Command.WRITE, seconds=0.1, count=1)])
    with connected(server) as client:
        begun = time.monotonic()
        client.pwrite(b"late", 0)
        assert time.monotonic() - begun >= 0.09  # loops count whole milliseconds
        assert client.pread(4, 0) == b"late"


def test_delayed_request_is_overtaken(nbd_server: Serve) -> None:
    server = nbd_server(MIB, faults=[Delay(command=Command.WRITE, seconds=3600, count=1)])
    with connected(server) as client:
        cookie = client.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"late")), 0)
        assert client.pread(4, 0) == bytes(4)
        assert not client.aio_command_completed(cookie)
        server.stop()


def test_dropped_request_ends_its_connection_only(nbd_server: Serve) -> None:
    server = nbd_server(MIB, faults=[Drop(command=Command.WRITE)])
    with connected(server) as other, connected(server) as client:
        with pytest.raises(nbd.Error):
            client.pwrite(b"y", 0)
        assert client.aio_is_dead() or client.aio_is_closed()
        assert other.pread(1, 0) == b"\0"


@pytest.mark.parametrize("at_byte", [0, 1, 17, 18, 60, 200, 500, 5000])
def test_connection_is_cut_at_the_very_byte(nbd_server: Serve, at_byte: int) -> None:
    """Counted by hand, over a socket, against a client that asks for all it can get."""
    server = nbd_server(b"x" * MIB, faults=[Cut(at_byte=at_byte, count=1)])
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(server.socket)
        go = struct.pack(">QIIIH", 0x49484156454F5054, 7, 6, 0, 0)
        read = struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 8192)
        received = 0
        with contextlib.suppress(ConnectionError):  # it may be over before all is sent
            sock.sendall(struct.pack(">I", 3) + go + read)
        with contextlib.suppress(ConnectionResetError):
            while part := sock.recv(65536):
                received += len(part)
        assert received == at_byte
    with connected(server) as client:
        client.pread(8192, 0)


def test_wrong_cookie_and_bad_magic_are_noticed_by_clients(nbd_server: Serve) -> None:
    for fault in (WrongCookie(), BadMagic()):
        for structured in (True, False):
            server = nbd_server(MIB, faults=[fault])
            client = nbd.NBD()
            client.set_request_structured_replies(structured)
            client.connect_uri(server.uri)
            with pytest.raises(nbd.Error, match=r"cookie|magic|handle|command"):
                client.pread(512, 0)


LIES = {
    Lie.TOO_LONG: [64 * KIB, 0, 2 * MIB - 64 * KIB, 3],
    Lie.SHORT: [32 * KIB, 0],
    Lie.ZERO_LENGTH: [0, 0, 64 * KIB, 0, MIB - 64 * KIB, 3],
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_about_extents_are_sent_as_they_are(nbd_server: Serve, lie: Lie) -> None:
    server = nbd_server(b"x" * 64 * KIB + bytes(MIB - 64 * KIB), faults=[Lying(how=lie)])
    wire = raw_status(server)
    assert wire == [LIES[lie]]


def test_overlapping_lie_describes_a_context_twice(nbd_server: Serve) -> None:
    server = nbd_server(MIB, faults=[Lying(how=Lie.OVERLAPPING)])
    assert raw_status(server) == [[MIB, 3], [MIB, 3]]


def test_lie_of_ones_own_is_told(nbd_server: Serve) -> None:
    server = nbd_server(MIB, faults=[Lying(how=lambda offset, length, pairs: [(7, 9), (1, 1)])])
    assert raw_status(server) == [[7, 9, 1, 1]]


def test_lie_about_one_context_leaves_the_others_true(nbd_server: Serve) -> None:
    lie = Lying(context="qemu:dirty-bitmap:b0", how=lambda offset, length, pairs: [(length, 1)])
    server = nbd_server(MIB, dirty={"b0": [], "b1": []}, faults=[lie])
    with connected(server, "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1") as client:
        assert status(client) == [
            ("qemu:dirty-bitmap:b0", [MIB, 1]),
            ("qemu:dirty-bitmap:b1", [MIB, 0]),
        ]


def test_context_can_be_told_nothing_of(nbd_server: Serve) -> None:
    server = nbd_server(MIB, faults=[Lying(how=lambda offset, length, pairs: [])])
    assert raw_status(server) == [[]]


def raw_status(server: LiveServer) -> list[list[int]]:
    """The words of all block status chunks for the first MiB, unseen by any client library."""
    name = b"base:allocation"
    query = struct.pack(">III", 0, 1, len(name)) + name
    with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as stream:
        sock.connect(server.socket)
        option = struct.Struct(">QII")
        magic = 0x49484156454F5054
        sock.sendall(struct.pack(">I", 3))
        sock.sendall(option.pack(magic, 8, 0) + option.pack(magic, 10, len(query)) + query)
        sock.sendall(option.pack(magic, 7, 6) + bytes(6))
        sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 7, 1, 0, MIB))
        stream.read(18)
        while True:
            _, about, kind, length = struct.unpack(">QIII", stream.read(20))
            stream.read(length)
            if (about, kind) == (7, 1):
                break
        found: list[list[int]] = []
        done = 0
        while not done:
            _, done, kind, _, length = struct.unpack(">IHHQI", stream.read(20))
            assert kind == 5
            found.append(list(struct.unpack(f">{length // 4}I", stream.read(length))[1:]))
        return found
