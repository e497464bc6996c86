"""Rule 5: one client, whatever it asks for, leaves the others their turn."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from nbdfleece.export.export import Export
from nbdfleece.extents import Extents
from nbdfleece.nbd.constants import Command, CommandFlag, Option
from nbdfleece.nbd.requests import EXTENDED_REQUEST
from nbdfleece.server.channel import SocketChannel
from nbdfleece.server.connection import Connection
from nbdfleece.server.limits import Limits
from nbdfleece.server.listener import Listener
from nbdfleece.server.tls import Authorization
from nbdfleece.server.turns import STREAM_TURNS
from nbdfleece.testing.memory_node import MemoryNode

from .harness import GREETING_BYTES, Client, Serve, export_of, pack_request, settled

KIB, MIB = 1 << 10, 1 << 20
REPLY_BYTES = 28
"""Of a READ, beside the data."""
GO_X = struct.pack(">I", 1) + b"x\0\0"


@dataclass
class Counter:
    """Counts what is done between two turns of the watcher: in two of the loop at most."""

    total: int = 0
    most: int = 0
    _before: int = field(default=0)

    def count(self, *_: object) -> None:
        self.total += 1

    async def watch(self, total: int) -> None:
        """Until so much is done in all."""
        async with asyncio.timeout(120):
            while self.total < total:
                await asyncio.sleep(0)
                self.most = max(self.most, self.total - self._before)
                self._before = self.total


class CountedContext:
    """A metadata context that counts how often it is searched."""

    def __init__(self, counter: Counter, name: str) -> None:
        self.name = name
        self._counter = counter

    async def extents(self, offset: int, length: int, *, extents_max: int) -> Extents:
        self._counter.count()
        return Extents.single(length, 0)


def status_export(counter: Counter, contexts: int) -> Export:
    named = tuple(CountedContext(counter, f"x-test:{n}") for n in range(contexts))
    return export_of(MemoryNode(MIB), contexts=named)


async def test_options_sent_at_once_are_answered_one_in_a_turn(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter()
    served = serve(MemoryNode(MIB))
    find = served.server.catalogue.find

    def counted(name: str) -> object:
        counter.count()
        return find(name)

    monkeypatch.setattr(served.server.catalogue, "find", counted)
    client = await served.connect()
    await client.receive(GREETING_BYTES)
    await client.send(
        struct.pack(">I", 3) + (b"IHAVEOPT" + struct.pack(">II", Option.INFO, 7) + GO_X) * 100
    )
    await counter.watch(100)
    assert counter.most <= 2
    for _ in range(300):
        await client.option_reply()


async def test_block_status_requests_sent_at_once_take_several_turns(serve: Serve) -> None:
    counter = Counter()
    served = serve([status_export(counter, 1)])
    client = await served.open(contexts=["x-test:0"])
    await client.send(pack_request(Command.BLOCK_STATUS, 0, MIB) * 64)
    await counter.watch(64)
    assert counter.most <= 8
    for _ in range(64):
        await client.reply()


async def test_block_status_requests_with_a_payload_take_several_turns(serve: Serve) -> None:
    counter = Counter()
    served = serve([status_export(counter, 1)])
    client = await served.connect()
    await client.receive(GREETING_BYTES)
    await client.send(struct.pack(">I", 3))
    await client.option(Option.EXTENDED_HEADERS)
    await client.option_reply()
    await client._select(b"x", [b"x-test:0"])
    await client.option(Option.GO, GO_X)
    for _ in range(3):
        await client.option_reply()
    flags = int(CommandFlag.PAYLOAD_LEN)
    ask = EXTENDED_REQUEST.pack(0x21E41C71, flags, Command.BLOCK_STATUS, 1, 0, 12)
    await client.send((ask + struct.pack(">QI", MIB, 0)) * 64)
    await counter.watch(64)
    assert counter.most <= 8


async def test_block_status_of_many_contexts_takes_several_turns(serve: Serve) -> None:
    counter = Counter()
    served = serve([status_export(counter, 30)])
    client = await served.open(contexts=[f"x-test:{n}" for n in range(30)])
    await client.request(Command.BLOCK_STATUS, 0, MIB)
    await counter.watch(30)
    assert counter.most <= 8
    assert len(await client.replies()) == 30


async def test_extended_reads_count_for_their_length(serve: Serve) -> None:
    counter = Counter()
    node = MemoryNode(MIB)
    node.fail = counter.count
    served = serve(node, limits=Limits(wake_up_bytes_max=64 * KIB))
    client = await served.connect()
    await client.receive(GREETING_BYTES)
    await client.send(struct.pack(">I", 3))
    await client.option(Option.EXTENDED_HEADERS)
    await client.option_reply()
    await client.option(Option.GO, GO_X)
    for _ in range(3):
        await client.option_reply()
    read = EXTENDED_REQUEST.pack(0x21E41C71, 0, Command.READ, 1, 0, 64 * KIB)
    await client.send(read * 20)
    await counter.watch(20)
    assert counter.most <= 2


async def test_paused_clients_that_read_again_go_on_one_in_a_turn(serve: Serve) -> None:
    counter = Counter()
    node = MemoryNode(b"x" * MIB)
    node.fail = counter.count
    limits = Limits(wake_up_bytes_max=64 * KIB, queued_bytes_max=64 * KIB, flush_bytes=64 * KIB)
    served = serve(node, limits=limits)
    clients = [await served.open() for _ in range(6)]
    for client in clients:
        await client.send(pack_request(Command.READ, 0, 64 * KIB) * 200)
    async with asyncio.timeout(60):
        while any(each._is_reading for each in served.server.connections):
            await asyncio.sleep(0)
    begun = counter.total
    for client in clients:  # no turn of the server between them: all can be written to at once
        with contextlib.suppress(BlockingIOError):
            while client.sock.recv(MIB):
                pass
    counter._before = begun
    await counter.watch(begun + len(clients))
    assert counter.most <= 2


async def test_long_reads_of_several_clients_take_one_turn_for_each_chunk(serve: Serve) -> None:
    counter = Counter()
    node = MemoryNode(b"x" * MIB)
    node.fail = counter.count
    limits = Limits(read_chunk_bytes_max=16 * KIB, queued_bytes_max=64 * MIB)
    served = serve(node, limits=limits)
    clients = [await served.open() for _ in range(6)]
    for client in clients:
        client.sock.send(pack_request(Command.READ, 0, MIB))
    await counter.watch(12)  # a client's first chunk is of the turn in which it asks
    counter.most = 0
    await counter.watch(6 * 64)
    assert counter.most <= 3
    for client in clients:
        assert sum(len(chunk.payload) for chunk in await client.replies()) == MIB


async def test_busy_client_has_a_turn_after_a_few_of_those_who_stream(serve: Serve) -> None:
    """A guest does not have one after each of theirs, and waits for no more however many stream."""
    node = MemoryNode(b"x" * MIB)
    turns: list[str] = []
    node.fail = lambda operation, offset: turns.append("s" if offset else "b")
    # With so much room, no stream ever waits for its client to read.
    served = serve(node, limits=Limits(wake_up_bytes_max=64 * KIB, queued_bytes_max=64 * MIB))
    streams, busy = [await served.open() for _ in range(12)], await served.open()

    async def ask() -> None:
        await busy.send(pack_request(Command.READ, 0, 512) * 4)
        await busy.receive(4 * (REPLY_BYTES + 512))

    await ask()
    for client in streams:
        client.sock.send(pack_request(Command.READ, 64 * KIB, 64 * KIB) * 40)
    while turns.count("s") < 400:
        await ask()
    between = [len(part) for part in "".join(turns).split("bbbb")[2:-1]]
    assert sum(between) / len(between) >= STREAM_TURNS, between
    assert max(between) < len(streams), between


async def test_refusals_are_logged_once_and_not_by_list(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    exports = [export_of(MemoryNode(MIB), name) for name in ("x", "y")]
    served = serve(exports, authorization=Authorization(otherwise=["nobody"]))
    client = await served.connect()
    await client.receive(GREETING_BYTES)
    await client.send(struct.pack(">I", 3))
    for _ in range(20):
        await client.option(Option.LIST)
        await client.option_reply()
    assert "refused" not in caplog.text
    for _ in range(20):
        await client.option(Option.INFO, GO_X)
        await client.option_reply()
    assert caplog.text.count("refused: export 'x'") == 1


async def test_clients_that_come_together_do_not_exceed_the_limit(serve: Serve) -> None:
    served = serve([export_of(MemoryNode(MIB), connections_max=1)])
    clients = [await served.connect() for _ in range(3)]
    for client in clients:
        await client.receive(GREETING_BYTES)
        await client.send(struct.pack(">I", 3))
    await settled()
    for client in clients:  # no turn of the server between them
        go = b"IHAVEOPT" + struct.pack(">II", Option.GO, 7) + GO_X
        client.sock.send(go)
    await settled()
    (export,) = served.server.exports
    assert export.connections == 1
    for client in clients:
        client.close()
    await served.server.wait_idle()
    assert export.connections == 0
    assert await (await served.open()).read(0, 512) == bytes(512)


class HoardingChannel(SocketChannel):
    """Gives one request at a time, and says when it has more, as TLS does."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock, "hoarder")
        self._hoard = bytearray()
        self.recv_into = self._take

    def _take(self, view: memoryview) -> int:
        if not self._hoard:
            self._hoard += self.sock.recv(MIB)
        count = min(28, len(self._hoard), len(view))
        view[:count] = self._hoard[:count]
        del self._hoard[:count]
        return count

    def has_pending(self) -> bool:
        return bool(self._hoard)


async def test_what_was_received_after_the_end_is_not_carried_out(serve: Serve) -> None:
    node = MemoryNode(MIB)
    served = serve(node)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    connection: Connection = served.server.add_channel(HoardingChannel(ours))
    client = Client(theirs)
    served.clients.append(client)
    await client.negotiate()
    writes = Counter()

    def end_soon(operation: str, offset: int) -> None:
        writes.count()
        asyncio.get_running_loop().call_soon(connection.finish, "the test says so")

    node.fail = end_soon
    await client.send(pack_request(Command.TRIM, 0, 4096) * 3)
    await client.reply()
    assert await client.is_at_end()
    assert writes.total == 1


@dataclass
class FakeSocket:
    """A listening socket whose accept(2) goes as told."""

    outcomes: Iterator[Callable[[], tuple[socket.socket, str]]]

    def accept(self) -> tuple[socket.socket, str]:
        return next(self.outcomes)()


async def test_client_lost_before_it_is_accepted_costs_the_next_nothing(serve: Serve) -> None:
    served = serve(MemoryNode(MIB))
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def lost() -> tuple[socket.socket, str]:
        raise OSError(errno.EPROTO, "protocol error")

    def nobody() -> tuple[socket.socket, str]:
        raise BlockingIOError

    sock = FakeSocket(iter([lost, lambda: (ours, ""), nobody]))
    served.server._accept(Listener(sock, "fake"))
    client = Client(theirs)
    served.clients.append(client)
    await client.negotiate()
    assert await client.read(0, 512) == bytes(512)
