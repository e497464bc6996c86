"""A client that lists exports believes no server more than it must."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdfleece.errors import NbdfleeceError, ProtocolError
from nbdfleece.standalone import listing
from nbdfleece.standalone.listing import ListedExport, ListingError, list_exports

GREETING = b"NBDMAGICIHAVEOPT\0\3"
ACK, SERVER, INFO, CONTEXT, UNSUP = 1, 2, 3, 4, (1 << 31) + 1
LIST, GO_INFO, STRUCTURED, LIST_CONTEXTS = 3, 6, 8, 9

Talk = Callable[[socket.socket], None]


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x0003E889045565A9, option, kind, len(data)) + data


@contextlib.contextmanager
def server(path: Path, talk: Talk) -> Iterator[str]:
    """A server of one client, which says what it is told to."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        client, _ = listener.accept()
        with client, contextlib.suppress(ConnectionError):
            talk(client)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield str(path)
    finally:
        thread.join(30)
        listener.close()


def says(data: bytes) -> Talk:
    def talk(client: socket.socket) -> None:
        client.sendall(data)
        while client.recv(4096):
            pass

    return talk


def test_everything_that_a_server_says_is_listed(tmp_path: Path) -> None:
    block_sizes = struct.pack(">HIII", 3, 1, 4096, 1 << 25)
    data = (
        GREETING
        + reply(LIST, SERVER, b"\0\0\0\3onetext")
        + reply(LIST, SERVER, b"\0\0\0\3two")
        + reply(LIST, ACK)
        + reply(STRUCTURED, ACK)
        + reply(GO_INFO, INFO, struct.pack(">HQH", 0, 1 << 40, 0x8003))
        + reply(GO_INFO, INFO, block_sizes)
        + reply(GO_INFO, INFO, struct.pack(">H", 99) + b"unknown")
        + reply(GO_INFO, ACK)
        + reply(LIST_CONTEXTS, CONTEXT, b"\0\0\0\0base:allocation")
        + reply(LIST_CONTEXTS, ACK)
        + reply(GO_INFO, UNSUP)
        + reply(LIST_CONTEXTS, UNSUP, b"no")
    )
    with server(tmp_path / "s", says(data)) as path:
        one, two = list_exports(path)
    assert list(one.lines()) == [
        " export: 'one'",
        "  description: text",
        "  size:  1099511627776",
        "  flags: 0x8003 ( readonly )",
        "  min block: 1",
        "  opt block: 4096",
        "  max block: 33554432",
        "  available meta contexts: 1",
        "   base:allocation",
    ]
    assert two == ListedExport("two")
    assert list(two.lines()) == [" export: 'two'"]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53" + bytes(2), ProtocolError),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", ProtocolError),
        (b"NBDMAGICIHAVEOPT\0\0", ProtocolError),
        (GREETING + bytes(20), ProtocolError),
        (GREETING + reply(STRUCTURED, ACK), ProtocolError),
        (GREETING + struct.pack(">QIII", 0x0003E889045565A9, LIST, SERVER, 1 << 31), ProtocolError),
        (GREETING + reply(LIST, UNSUP, b"not today"), ListingError),
    ],
)
def test_what_is_not_said_rightly_is_refused(
    tmp_path: Path, data: bytes, error: type[NbdfleeceError]
) -> None:
    with server(tmp_path / "s", says(data)) as path, pytest.raises(error):
        list_exports(path)


@pytest.mark.parametrize("count", [0, 10, 18, 30])
def test_connection_that_ends_is_said_to_have_failed(tmp_path: Path, count: int) -> None:
    data = (GREETING + reply(LIST, SERVER, b"\0\0\0\1x"))[:count]

    def talk(client: socket.socket) -> None:
        client.sendall(data)

    with server(tmp_path / "s", talk) as path, pytest.raises(ListingError, match="failed"):
        list_exports(path)


def test_server_that_says_nothing_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "TIMEOUT_SECONDS", 0.05)
    with server(tmp_path / "s", says(b"")) as path, pytest.raises(ListingError, match="timed out"):
        list_exports(path)


def test_server_that_does_not_end_its_list_is_not_listened_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "REPLIES_MAX", 10)
    data = GREETING + reply(LIST, SERVER, b"\0\0\0\1x") * 11
    with (
        server(tmp_path / "s", says(data)) as path,
        pytest.raises(ProtocolError, match="do not end"),
    ):
        list_exports(path)


def test_nobody_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ListingError, match="Failed to connect to"):
        list_exports(str(tmp_path / "s"))
