"""How connections end when the server wants it: what is finished, what is refused, what is lost."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from nbdfleece.bitmaps.bitmap import Bitmap
from nbdfleece.export.contexts import DirtyBitmap
from nbdfleece.nbd.constants import Command, Option, OptionReply
from nbdfleece.nbd.outcomes import Negotiated
from nbdfleece.server import connection as connection_module
from nbdfleece.server import server as server_module
from nbdfleece.server.channel import SocketChannel
from nbdfleece.server.delegation import DelegatedClient, Ending
from nbdfleece.server.limits import Limits
from nbdfleece.testing.memory_node import MemoryNode
from tests.loop_turns import until

from .harness import (
    SECONDS_MAX,
    Client,
    Serve,
    Served,
    export_of,
    pack_request,
    settled,
)
from .test_connection import HELLO, flood, tcp_pair

KIB = 1 << 10
MIB = 1 << 20


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has nothing left to finish is not waited for."""
    for module in (server_module, connection_module):
        monkeypatch.setattr(module, "LINGER_SECONDS", 0.05)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is cut off only because this process had to wait for the processor."""
    for module in (server_module, connection_module):
        monkeypatch.setattr(module, "LINGER_SECONDS", 2 * SECONDS_MAX)


@pytest.mark.usefixtures("hasty")
async def test_shutdown_refuses_options_and_requests_with_reasons(serve: Serve) -> None:
    """Requirements 23 and 113."""
    node = MemoryNode(MIB)
    served = serve(node)
    haggling, working, busy = await served.connect(), await served.open(), await served.open()
    await haggling.receive(18)
    await haggling.send(HELLO)
    gate = asyncio.get_running_loop().create_future()
    node.pause = lambda operation: gate
    await busy.request(Command.FLUSH)
    await settled()
    ending = asyncio.ensure_future(served.server.shut_down(SECONDS_MAX))
    await settled()
    await haggling.option(Option.LIST)
    assert (await haggling.option_reply())[0] == OptionReply.ERR_SHUTDOWN
    reply = await working.perform(Command.READ, 0, 512)
    assert reply.error == 108
    assert "shutting down" in reply.text
    gate.set_result(None)
    await ending
    assert await haggling.is_at_end()
    assert await working.is_at_end()


@pytest.mark.usefixtures("patient")
async def test_shutdown_refuses_for_a_while_what_was_on_its_way(serve: Serve) -> None:
    """Also if nothing was in flight; nobody waits once all have left."""
    served = serve(MemoryNode(MIB))
    client = await served.open()
    ending = asyncio.ensure_future(served.server.shut_down(4 * SECONDS_MAX))
    await settled()
    assert (await client.perform(Command.READ, 0, 512)).error == 108
    client.close()
    async with asyncio.timeout(SECONDS_MAX):
        await ending


@pytest.mark.usefixtures("hasty")
async def test_shutdown_waits_for_what_is_in_flight(serve: Serve) -> None:
    node = MemoryNode(MIB)
    served = serve(node)
    client = await served.open()
    gate = asyncio.get_running_loop().create_future()
    node.pause = lambda operation: gate
    await client.request(Command.WRITE, 0, payload=b"k" * 512)
    await settled()
    ending = asyncio.ensure_future(served.server.shut_down(SECONDS_MAX))
    await settled()
    assert not ending.done()
    gate.set_result(None)
    assert (await client.reply()).error == 0
    await ending
    assert node.content[:512] == b"k" * 512


async def test_shutdown_cancels_what_outlives_the_grace_time(serve: Serve) -> None:
    node = MemoryNode(MIB)
    served = serve(node)
    client = await served.open()
    gate = asyncio.get_running_loop().create_future()
    node.pause = lambda operation: gate
    await client.request(Command.WRITE, 0, payload=b"k" * 512)
    await client.request(Command.READ, 0, 512)
    await client.request(Command.WRITE, 0, payload=b"k" * 700_000)
    await client.request(Command.READ, 0, MIB)
    await settled()
    await served.server.shut_down(0.15)
    assert not served.server.connections
    assert gate.cancelled()


async def test_shutdown_under_load_ends_in_time(serve: Serve) -> None:
    limits = Limits(closing_seconds=2 * SECONDS_MAX)
    served = serve(MemoryNode(4 * MIB), limits=limits)

    async def work(client: Client) -> None:
        while (await client.perform(Command.WRITE, 0, payload=bytes(64 * KIB))).error == 0:
            pass

    workers = [asyncio.ensure_future(work(await served.open())) for _ in range(4)]
    hog = await served.open()
    await flood(hog, 1000, 64 * KIB)
    async with asyncio.timeout(SECONDS_MAX):
        await served.server.shut_down(0.3)
    assert not served.server.connections
    for ended in await asyncio.gather(*workers, return_exceptions=True):
        assert ended is None or isinstance(ended, (EOFError, ConnectionError))


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("hard", [False, True])
async def test_closed_export_loses_its_clients_and_no_others(serve: Serve, hard: bool) -> None:
    node = MemoryNode(MIB)
    served = serve([export_of(node), export_of(MemoryNode(b"y" * MIB), "y")])
    client, other = await served.open("x"), await served.open("y")
    gate = asyncio.get_running_loop().create_future()
    node.pause = lambda operation: gate
    await client.request(Command.FLUSH)
    await settled()
    closing = served.server.close_export("x", hard=hard, grace_seconds=SECONDS_MAX)
    ending = asyncio.ensure_future(closing)
    if not hard:
        await settled()
        assert not ending.done()
        gate.set_result(None)
    await ending
    assert served.server.exports.find("x") is None
    if not hard:
        assert (await client.reply()).error == 0
    assert await client.is_at_end()
    assert await other.read(0, 512) == b"y" * 512


async def test_closing_ends_although_the_client_reads_nothing(serve: Serve) -> None:
    served: Served = serve(MemoryNode(4 * MIB), limits=Limits(closing_seconds=0.2))
    client = await served.open()
    await flood(client, 200, 64 * KIB)
    client.sock.shutdown(socket.SHUT_WR)
    (connection,) = served.server.connections
    connection.finish("test")
    await served.server.wait_idle()


@pytest.mark.parametrize("wish", [Command.READ, Command.BLOCK_STATUS])
async def test_idle_client_is_closed_although_a_request_waits_for_it_to_read(
    serve: Serve, wish: Command
) -> None:
    """The rest of a long reply, and what is found ahead of the next request."""
    node = MemoryNode(32 * MIB)
    node.content[:] = b"x" * node.size
    bitmap = Bitmap(node.size, 512)
    bitmap.array()[:] = 0xAA
    export = export_of(node, contexts=(DirtyBitmap("b", bitmap),))
    limits = Limits(idle_seconds=0.2, closing_seconds=0.2, queued_bytes_max=64 * KIB)
    served = serve([export], limits=limits)
    client = await served.open(contexts=["qemu:dirty-bitmap:b"])
    await client.send(pack_request(wish, 0, 16 * MIB) * 64)
    async with asyncio.timeout(SECONDS_MAX):
        await served.server.wait_idle()


async def busy_client(served: Served) -> Client:
    """A client that has not read its replies: more than fit into the sockets."""
    client = await served.open(structured=False)
    for cookie in range(24):
        await client.request(Command.READ, 0, MIB, cookie=cookie)
    await settled(50)
    return client


@pytest.mark.usefixtures("patient")
async def test_everybody_is_refused_for_as_long_as_one_is_finished(serve: Serve) -> None:
    """Requirements 23 and 113: there is time to be told, however long the others take."""
    served = serve(MemoryNode(MIB), limits=Limits(closing_seconds=SECONDS_MAX))
    haggling, idle, busy = await served.connect(), await served.open(), await busy_client(served)
    await haggling.receive(18)
    await haggling.send(HELLO)
    ending = asyncio.ensure_future(served.server.shut_down(2 * SECONDS_MAX))
    for _ in range(3):
        await settled()
        await haggling.option(Option.GO, b"\0\0\0\1x\0\0")
        assert (await haggling.option_reply())[0] == OptionReply.ERR_SHUTDOWN
        assert (await idle.perform(Command.FLUSH)).error == 108
    await busy.request(Command.READ, 0, 512, cookie=99)
    errors = {reply.cookie: reply.error for reply in [await busy.reply(MIB) for _ in range(25)]}
    assert errors.pop(99) == 108
    assert len(errors) == 24
    assert set(errors.values()) <= {0, 108}
    for client in (haggling, idle, busy):
        client.close()
    await ending


@pytest.mark.usefixtures("patient")
async def test_starttls_during_shutdown_is_refused(serve: Serve) -> None:
    served = serve(MemoryNode(MIB))
    client = await served.connect()
    await client.receive(18)
    await client.send(HELLO)
    ending = asyncio.ensure_future(served.server.shut_down(SECONDS_MAX))
    await settled()
    await client.option(Option.STARTTLS)
    assert (await client.option_reply())[0] == OptionReply.ERR_SHUTDOWN
    await client.option(Option.ABORT)
    assert (await client.option_reply())[0] == OptionReply.ACK
    await ending


@pytest.mark.usefixtures("hasty")
async def test_client_that_asks_on_and_on_does_not_delay_the_end(serve: Serve) -> None:
    served = serve(MemoryNode(MIB))
    client = await served.open()

    async def ask() -> None:
        while True:
            await client.perform(Command.FLUSH)

    asking = asyncio.ensure_future(ask())
    async with asyncio.timeout(SECONDS_MAX):
        await served.server.shut_down(2 * SECONDS_MAX)
    await asyncio.wait([asking])
    assert isinstance(asking.exception(), EOFError | ConnectionError)


@pytest.mark.usefixtures("patient")
async def test_unread_requests_do_not_cost_the_replies_that_were_sent(serve: Serve) -> None:
    """A TCP socket that is closed with bytes unread is reset, and what it sent is lost."""
    served = serve(MemoryNode(b"t" * MIB))
    ours, theirs = tcp_pair()
    served.server.add_channel(SocketChannel(ours, "test"))
    client = Client(theirs)
    served.clients.append(client)
    await client.negotiate(structured=False)
    for _ in range(4):
        await client.request(Command.READ, 0, MIB)
    (connection,) = served.server.connections
    await until(lambda: connection.statistics.requests == 4)
    await settled(50)
    connection.finish("test")
    await client.send(pack_request(Command.READ, 0, 512) * 100)
    for _ in range(4):
        assert (await client.reply(MIB)).payload == b"t" * MIB
    assert await client.is_at_end()


async def test_client_that_does_not_notice_the_end_is_left(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "LINGER_SECONDS", 0.2)
    served = serve(MemoryNode(MIB))
    client = await served.open()
    (connection,) = served.server.connections
    connection.finish("test")
    assert await client.is_at_end()
    await client.send(pack_request(Command.READ, 0, 512) * 1000)
    await served.server.wait_idle()
    with pytest.raises(ConnectionError):
        await client.send(bytes(4))


async def test_client_that_reads_nothing_does_not_use_up_the_grace_time(serve: Serve) -> None:
    served = serve(MemoryNode(4 * MIB), limits=Limits(closing_seconds=0.2))
    await busy_client(served)
    async with asyncio.timeout(SECONDS_MAX):
        await served.server.shut_down(2 * SECONDS_MAX)


@pytest.mark.usefixtures("hasty")
async def test_client_that_is_over_is_not_drained_afterwards(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has left before the reply that the server's end waits for."""
    node = MemoryNode(MIB)
    served = serve(node)
    client = await served.open()
    heard: list[str] = []
    for name in ("drained", "closed"):
        tell = getattr(served.server, name)

        def note(connection: object, name: str = name, tell: Any = tell) -> None:
            heard.append(name)
            tell(connection)

        monkeypatch.setattr(served.server, name, note)
    gate = asyncio.get_running_loop().create_future()
    node.pause = lambda operation: gate
    await client.request(Command.FLUSH)
    await settled()
    ending = asyncio.ensure_future(served.server.shut_down(SECONDS_MAX))
    await settled()
    client.close()
    await settled()
    gate.set_result(None)
    await ending
    assert heard == ["closed"]


class FakeDeputy:
    """Notes what it is told, and does nothing."""

    def __init__(self) -> None:
        self.clients: list[DelegatedClient] = []
        self.told: list[str] = []

    def serve(self, client: DelegatedClient, sock: socket.socket, negotiated: Negotiated) -> None:
        self.clients.append(client)

    def end(self, client: DelegatedClient, how: Ending, reason: str) -> None:
        self.told.append(how)


@pytest.mark.usefixtures("hasty")
async def test_clients_of_a_deputy_finish_before_they_are_ended(serve: Serve) -> None:
    """Rule 8: as long as one has something in flight, each is told why no more is done."""
    deputy = FakeDeputy()
    served = serve(MemoryNode(MIB))
    served.server.deputy = lambda export: deputy
    for _ in range(2):
        await served.open()
    assert list(served.server.connections) == deputy.clients
    ending = asyncio.ensure_future(served.server.shut_down(SECONDS_MAX))
    await settled()
    first, second = deputy.clients
    first.drained()
    await asyncio.sleep(0.2)
    assert deputy.told == ["shut_down", "shut_down"]
    second.drained()
    await until(lambda: deputy.told[2:] == ["finish", "finish"])
    for client in (first, second):
        client.closed()
    await ending
    assert not served.server.connections


async def test_clients_of_a_deputy_that_do_not_end_are_aborted(serve: Serve) -> None:
    deputy = FakeDeputy()
    served = serve(MemoryNode(MIB))
    served.server.deputy = lambda export: deputy
    await served.open()
    ending = asyncio.ensure_future(served.server.shut_down(0.05))
    await until(lambda: deputy.told == ["shut_down", "finish", "abort"])
    deputy.clients[0].closed()
    await ending
