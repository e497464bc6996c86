"""A stranger on the way of a TLS connection: whatever is changed, nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from pathlib import Path

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdfleece.export.export import ExportTable
from nbdfleece.nbd.constants import Option, OptionReply
from nbdfleece.server.channel import SocketChannel
from nbdfleece.server.limits import Limits
from nbdfleece.server.server import NbdServer
from nbdfleece.server.tls import TlsSettings, load_certificates
from nbdfleece.testing.memory_node import MemoryNode
from tests.pki import make_pki

from .conftest import debug_loop
from .harness import GREETING_BYTES, export_of
from .test_noise import Loop, pair, read_to_the_end
from .test_tls import TlsClient, context_for, go

MIB = 1 << 20
SECONDS_MAX = 60.0
LIMITS = Limits(handshake_seconds=0.1, idle_seconds=0.1, closing_seconds=0.1)
"""Who waits for what was lost on the way does not wait long."""

Edit = tuple[int, str, bytes]
"""Where in what the client sends, how it is changed, and by what."""

edits = st.lists(
    st.tuples(
        # STARTTLS ends at 20, then come the hello, the key exchange, and the session.
        st.integers(0, 40) | st.integers(20, 700) | st.integers(500, 4000),
        st.sampled_from(["change", "insert", "lose", "cut"]),
        st.binary(min_size=1, max_size=40),
    ),
    max_size=3,
)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pki(tmp_path_factory.mktemp("pki"))


def spoil(data: bytes, position: int, changes: list[Edit]) -> bytes:
    """``data``, which begins at ``position`` of the stream, with its changes."""
    spoilt = bytearray(data)
    for place, how, what in sorted(changes, reverse=True):
        index = place - position
        if not 0 <= index < len(spoilt):
            continue
        if how == "insert":
            spoilt[index:index] = what
        elif how == "change":
            spoilt[index] ^= what[0] or 1
        else:
            del spoilt[index : None if how == "cut" else index + len(what)]
    return bytes(spoilt)


async def relay(source: socket.socket, target: socket.socket, changes: list[Edit]) -> None:
    """Pass bytes on until their end, as far as the other side takes them."""
    loop = asyncio.get_running_loop()
    position = 0
    with contextlib.suppress(ConnectionError):
        while data := await loop.sock_recv(source, 65536):
            await loop.sock_sendall(target, spoil(data, position, changes))
            position += len(data)
            if any(how == "cut" and place < position for place, how, _ in changes):
                break
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


async def talk(sock: socket.socket, context: ssl.SSLContext) -> None:
    """What an honest client does, until something goes wrong."""
    client = TlsClient(sock)
    await client.receive(GREETING_BYTES)
    await client.send(b"\0\0\0\3")
    await client.option(Option.STARTTLS)
    if await client.option_reply() != (OptionReply.ACK, b""):
        return
    await client.start_tls(context)
    if await go(client) == OptionReply.ACK:
        await client.read(0, 65536)


async def attack(tls: TlsSettings, context: ssl.SSLContext, changes: list[Edit]) -> None:
    """One spoilt connection beside one that works; afterwards nothing of it is left."""
    before = len(os.listdir("/proc/self/fd"))
    server = NbdServer(ExportTable([export_of(MemoryNode(MIB))]), limits=LIMITS, tls=tls)
    ours, theirs = pair()
    server.add_channel(SocketChannel(ours, "victim"))
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    relays = [
        asyncio.ensure_future(relay(far, theirs, changes)),
        asyncio.ensure_future(relay(theirs, far, [])),
    ]
    with contextlib.suppress(EOFError, OSError, AssertionError):
        async with asyncio.timeout(SECONDS_MAX):
            await talk(near, context)
    near.close()
    async with asyncio.timeout(SECONDS_MAX):
        await asyncio.gather(*relays)
        await read_to_the_end(theirs)
        theirs.close()
        far.close()
        await server.wait_idle()
    assert server.pool.taken_bytes == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}
    await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) <= before


async def serve_honestly(tls: TlsSettings, context: ssl.SSLContext) -> None:
    """The same without the stranger: the session above is a whole one."""
    server = NbdServer(ExportTable([export_of(MemoryNode(b"y" * MIB))]), tls=tls)
    ours, theirs = pair()
    server.add_channel(SocketChannel(ours, "client"))
    await talk(theirs, context)
    theirs.close()
    await server.wait_idle()


@pytest.mark.parametrize("loop", [debug_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_session_without_a_stranger_is_a_whole_one(loop: Loop, pki: Path) -> None:
    tls = TlsSettings(credentials=load_certificates(pki))
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(serve_honestly(tls, context_for(pki)))


@pytest.mark.parametrize("loop", [debug_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(changes=edits)
def test_changed_bytes_end_the_connection_and_leave_nothing(
    loop: Loop, pki: Path, changes: list[Edit]
) -> None:
    """CVE-2021-3716 and its kin: insertion behind STARTTLS, cut and changed handshakes."""
    tls = TlsSettings(credentials=load_certificates(pki))
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(attack(tls, context_for(pki), changes))
