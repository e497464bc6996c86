"""The server itself: no descriptors left, listeners that go, clients that are gone."""

from __future__ import annotations

import asyncio
import resource
import signal
from collections.abc import Iterator

import pytest

from nbdfleece.nbd.constants import Command
from nbdfleece.server import server as server_module
from tests.memory_node import MemoryNode

from .harness import GREETING_BYTES, Serve, pack_request, settled

MIB = 1 << 20


@pytest.fixture
def descriptor_limit() -> Iterator[tuple[int, int]]:
    """The limits on descriptors, which are as they were at the end."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield limits
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def test_server_without_descriptors_accepts_once_there_are_some(
    serve: Serve,
    descriptor_limit: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(server_module, "_ACCEPT_PAUSE_SECONDS", 0.01)
    served = serve(MemoryNode(MIB))
    client = await served.connect()
    free = client.sock.dup()  # the lowest descriptor that is free once it is closed
    limit = free.fileno()
    free.close()
    second = await served.connect()
    await second.receive(GREETING_BYTES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, descriptor_limit[1]))
    with pytest.raises(OSError, match="Too many open files"):
        await served.connect()
    resource.setrlimit(resource.RLIMIT_NOFILE, descriptor_limit)
    assert "cannot accept" not in caplog.text


async def test_removed_listener_lets_nobody_in_and_clients_stay(serve: Serve) -> None:
    served = serve(MemoryNode(b"abcd" * 128))
    client = await served.open()
    (listener,) = served.server.listeners
    served.server.remove_listener(listener)
    assert served.server.listeners == []
    with pytest.raises(FileNotFoundError):
        await served.connect()
    assert await client.read(0, 512) == b"abcd" * 128


async def test_client_gone_before_its_replies_ends_nothing_else(serve: Serve) -> None:
    """Where SIGPIPE is not ignored, as in a program that embeds the server, sending raises it."""
    served = serve(MemoryNode(MIB))
    gone, stays = await served.open(), await served.open()
    await gone.send(pack_request(Command.READ, 0, MIB // 2) * 8)
    gone.close()
    assert await stays.read(0, 512) == bytes(512)
    await settled()
    assert len(served.server.connections) == 1
    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN
