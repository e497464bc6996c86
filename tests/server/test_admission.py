"""Who is let in, and when the last client has left."""

from __future__ import annotations

import asyncio

import pytest

from nbdfleece.nbd.constants import Option
from nbdfleece.server.limits import Limits
from nbdfleece.testing.memory_node import MemoryNode

from .harness import GREETING_BYTES, Serve, export_of, settled

MIB = 1 << 20
CAN_MULTI_CONN = 1 << 8


async def test_excess_client_waits_and_is_served_when_another_ends(serve: Serve) -> None:
    served = serve(MemoryNode(MIB), limits=Limits(connections_max=1, excess_waits=True))
    first = await served.open()
    second = await served.connect()
    greeting = asyncio.create_task(second.receive(GREETING_BYTES))
    await first.read(0, 512)
    await settled()
    assert not greeting.done()
    assert len(served.server.connections) == 1
    first.close()
    assert (await greeting)[:8] == b"NBDMAGIC"


async def test_excess_clients_are_served_one_after_the_other(serve: Serve) -> None:
    served = serve(MemoryNode(MIB), limits=Limits(connections_max=2, excess_waits=True))
    clients = [await served.connect() for _ in range(7)]
    for client in clients:
        await client.negotiate()
        assert len(served.server.connections) <= 2
        client.close()


async def test_server_shuts_down_while_clients_wait(serve: Serve) -> None:
    served = serve(MemoryNode(MIB), limits=Limits(connections_max=1, excess_waits=True))
    first = await served.open()
    waiting = await served.connect()
    await first.read(0, 512)
    await served.server.shut_down(0)
    assert await waiting.is_at_end()


async def test_last_client_with_an_export_that_leaves_is_told(serve: Serve) -> None:
    served = serve(MemoryNode(MIB))
    left = asyncio.create_task(served.server.wait_left())
    first, second = await served.open(), await served.open()
    first.close()
    await second.read(0, 512)
    await settled()
    assert not left.done()
    second.close()
    await left


async def test_client_that_only_looked_does_not_count_as_having_left(serve: Serve) -> None:
    served = serve(MemoryNode(MIB))
    left = asyncio.create_task(served.server.wait_left())
    looker = await served.connect()
    await looker.receive(GREETING_BYTES)
    await looker.send(bytes([0, 0, 0, 3]))
    await looker.option(Option.LIST)
    await looker.option_reply()
    looker.close()
    await served.server.wait_idle()
    assert not left.done()
    (await served.open()).close()
    await left


@pytest.mark.parametrize("can_multi_conn", [True, False])
async def test_multi_conn_is_told_as_the_export_says(serve: Serve, can_multi_conn: bool) -> None:
    served = serve([export_of(MemoryNode(MIB), can_multi_conn=can_multi_conn)])
    client = await served.connect()
    await client.receive(GREETING_BYTES)
    await client.send(bytes([0, 0, 0, 3]))
    await client.option(Option.EXPORT_NAME, b"x")
    flags = int.from_bytes((await client.receive(10))[8:], "big")
    assert bool(flags & CAN_MULTI_CONN) is can_multi_conn
