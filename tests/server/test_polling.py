"""Where a client is about to send the loop looks on a moment: at all sockets, and if it pays."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import weakref
from collections.abc import Callable
from itertools import pairwise

import pytest

from nbdfleece.nbd.constants import Command
from nbdfleece.server import polling as module
from nbdfleece.server.limits import Limits
from nbdfleece.server.polling import SKIPPED_MAX, Polling
from nbdfleece.server.turns import BUSY_REQUESTS
from nbdfleece.testing.memory_node import MemoryNode
from tests.loop_turns import until

from .harness import SECONDS_MAX, Client, Serve, pack_request, settled

POLL_SECONDS = Limits().poll_seconds


class Loop:
    """Runs what it is given, one callback at a time, and has its own time."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[], None]] = []
        self.now = 1.0

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)

    def run(self, seconds: float = 0.0) -> None:
        """All that is due now, some time later."""
        self.now += seconds
        callbacks, self.callbacks = self.callbacks, []
        for callback in callbacks:
            callback()

    @property
    def is_awake(self) -> bool:
        return bool(self.callbacks)


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    fake = Loop()
    monkeypatch.setattr(module, "perf_counter", lambda: fake.now)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    return fake


def looks(loop: Loop, polling: Polling) -> bool:
    """Whether the loop looks on after a small request; nothing arrives."""
    polling.begin("client")
    is_awake = loop.is_awake
    loop.run(POLL_SECONDS)
    assert not loop.is_awake, "it looks on for longer than it should"
    return is_awake


async def test_loop_stays_awake_until_the_time_is_up(loop: Loop) -> None:
    polling = Polling(loop, POLL_SECONDS)
    polling.begin("client")
    for _ in range(3):
        loop.run(POLL_SECONDS / 4)
        assert loop.is_awake
    loop.run(POLL_SECONDS / 4)
    assert not loop.is_awake


async def test_loop_looks_on_once_however_many_have_been_answered(loop: Loop) -> None:
    polling = Polling(loop, POLL_SECONDS)
    for _ in range(10):
        polling.begin("client")
        polling.found("client")
    assert len(loop.callbacks) == 1


async def test_client_is_forgotten_when_the_time_is_up(loop: Loop) -> None:
    """One that has left takes its memory with it."""
    polling = Polling(loop, POLL_SECONDS)
    client = Count()
    left = weakref.ref(client)
    polling.begin(client)
    del client
    loop.run(POLL_SECONDS)
    assert left() is None


async def test_looks_that_find_nothing_become_rare(loop: Loop) -> None:
    """Rule 5: a client with pauses between its requests costs next to nothing more."""
    polling = Polling(loop, POLL_SECONDS)
    taken = [number for number in range(1000) if looks(loop, polling)]
    gaps = [after - before - 1 for before, after in pairwise(taken)]
    assert gaps[:6] == [1, 3, 7, 15, 31, SKIPPED_MAX]
    assert set(gaps[6:]) == {SKIPPED_MAX}


async def test_one_that_finds_something_is_taken_again(loop: Loop) -> None:
    polling = Polling(loop, POLL_SECONDS)
    assert [looks(loop, polling) for _ in range(2)] == [True, False]
    polling.begin("client")
    polling.found("client")
    loop.run(POLL_SECONDS)
    assert not loop.is_awake, "what was looked for is here"
    assert looks(loop, polling)
    assert not looks(loop, polling)
    assert looks(loop, polling), "one failure after a success skips one request only"


async def test_one_that_finds_another_client_is_not(loop: Loop) -> None:
    """With others beside it the loop is awake anyway, and processors are not idle."""
    polling = Polling(loop, POLL_SECONDS)
    polling.begin("client")
    polling.found("another")
    loop.run()
    assert not loop.is_awake
    assert not looks(loop, polling), "it is left out once"


async def test_what_arrives_when_nobody_looks_changes_nothing(loop: Loop) -> None:
    polling = Polling(loop, POLL_SECONDS)
    assert [looks(loop, polling) for _ in range(2)] == [True, False]
    polling.found("client")
    assert looks(loop, polling)
    assert [looks(loop, polling) for _ in range(4)] == [False, False, False, True]


async def test_with_one_processor_the_client_has_it(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert not looks(loop, Polling(loop, POLL_SECONDS))


async def test_it_can_be_switched_off(loop: Loop) -> None:
    assert not looks(loop, Polling(loop, 0))


async def test_all_sockets_are_looked_at_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 5: what others send while the loop looks on is handled at once."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    loop = asyncio.get_running_loop()
    polling = Polling(loop, 60.0)
    near, far = socket.socketpair()
    arrived = loop.create_future()

    def receive() -> None:
        polling.found("client")
        arrived.set_result(near.recv(1))

    with near, far:
        loop.add_reader(near.fileno(), receive)
        try:
            polling.begin("client")
            await asyncio.sleep(0)
            far.send(b"x")
            assert await asyncio.wait_for(arrived, 30.0) == b"x"
        finally:
            loop.remove_reader(near.fileno())
    await settled(3)


async def test_timers_and_threads_are_not_kept_waiting_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    polling = Polling(asyncio.get_running_loop(), 3600.0)
    polling.begin("client")
    try:
        async with asyncio.timeout(SECONDS_MAX):
            await asyncio.sleep(0.001)
            assert await asyncio.to_thread(threading.get_ident) != threading.get_ident()
    finally:
        polling.found("client")
    await settled(3)


class Count:
    """Stands in for the server's polling."""

    def __init__(self) -> None:
        self.begun = 0
        self.was_found = 0

    def begin(self, client: object) -> None:
        self.begun += 1

    def found(self, client: object) -> None:
        self.was_found += 1


async def open_counted(serve: Serve, node: MemoryNode) -> tuple[Client, Count]:
    served = serve(node)
    client = await served.open()
    await settled()
    served.server.polling = count = Count()
    return client, count


async def test_it_begins_after_a_small_request(serve: Serve) -> None:
    client, count = await open_counted(serve, MemoryNode(1 << 20))
    await client.perform(Command.READ, 0, 4096)
    await settled()
    assert (count.begun, count.was_found) == (1, 1)


async def test_it_does_not_begin_for_a_client_with_several_requests_at_a_time(
    serve: Serve,
) -> None:
    client, count = await open_counted(serve, MemoryNode(1 << 20))
    reads = [pack_request(Command.READ, 0, 512, cookie=n) for n in range(BUSY_REQUESTS)]
    await client.send(b"".join(reads))
    for _ in reads:
        await client.reply()
    await settled()
    assert (count.begun, count.was_found) == (0, 1)


async def test_it_begins_only_when_a_request_is_answered(serve: Serve) -> None:
    """Rule 5: one who sends a byte now and then does not keep a processor busy."""
    client, count = await open_counted(serve, MemoryNode(1 << 20))
    write = pack_request(Command.WRITE, 0, 8) + b"payload."
    for number in range(len(write)):
        assert not count.begun
        await client.send(write[number : number + 1])
        await until(lambda number=number: count.was_found > number)
        await settled()
    assert count.begun == 1
    assert not (await client.reply()).error


async def test_it_begins_for_the_rest_of_a_large_request(serve: Serve) -> None:
    """It comes as soon as there is room for it, which the receive has made."""
    client, count = await open_counted(serve, MemoryNode(1 << 20))
    write = pack_request(Command.WRITE, 0, 256 << 10) + bytes(256 << 10)
    for number, at in enumerate(range(0, len(write), 64 << 10)):
        assert count.begun == number
        await client.send(write[at : at + (64 << 10)])
        await until(lambda number=number: count.begun > number)
        await settled()
    assert not (await client.reply()).error


async def test_it_does_not_begin_while_replies_wait_for_the_client(serve: Serve) -> None:
    """It must be woken first."""
    client, count = await open_counted(serve, MemoryNode(1 << 20))
    (connection,) = serve.served[-1].server.connections

    async def ask(length: int) -> None:
        asked = connection.statistics.requests + 1
        await client.request(Command.READ, 0, length)
        await until(lambda: connection.statistics.requests == asked)
        await settled()

    for _ in range(1000):
        if connection.outbox.queued_bytes:
            break
        await ask(64 << 10)
    begun = count.begun
    assert begun
    await ask(512)
    assert count.begun == begun


async def test_it_does_not_begin_while_a_reply_waits_for_the_disk(serve: Serve) -> None:
    gate = asyncio.get_running_loop().create_future()
    node = MemoryNode(1 << 20)
    node.pause = lambda operation: gate
    client, count = await open_counted(serve, node)
    await client.send(pack_request(Command.FLUSH, 0, 0, cookie=1))
    await until(lambda: count.was_found)
    await settled()
    assert not count.begun
    gate.set_result(None)
    await client.reply()
