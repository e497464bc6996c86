"""The server itself: no descriptors left, and listeners that go."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Iterator

import pytest

from nbdfleece.server import server as server_module
from nbdfleece.testing.memory_node import MemoryNode

from .harness import GREETING_BYTES, Client, Serve, settled

MIB = 1 << 20


@pytest.fixture
def descriptor_limit() -> Iterator[tuple[int, int]]:
    """The soft and hard limits on descriptors, which are as they were at the end."""
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
    client = Client(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
    served.clients.append(client)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, descriptor_limit[1]))
    await client.loop.sock_connect(client.sock, served.path)
    await settled()
    assert "cannot accept" in caplog.text
    assert not served.server.connections
    resource.setrlimit(resource.RLIMIT_NOFILE, descriptor_limit)
    async with asyncio.timeout(60):
        assert (await client.receive(GREETING_BYTES))[:8] == b"NBDMAGIC"


async def test_removed_listener_lets_nobody_in_and_clients_stay(serve: Serve) -> None:
    served = serve(MemoryNode(b"abcd" * 128))
    client = await served.open()
    (listener,) = served.server.listeners
    served.server.remove_listener(listener)
    assert served.server.listeners == []
    with pytest.raises(FileNotFoundError):
        await served.connect()
    assert await client.read(0, 512) == b"abcd" * 128
