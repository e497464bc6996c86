"""Calls in threads: how many at a time, and that they never stop the loop."""

from __future__ import annotations

import asyncio
import threading

import pytest

from nbdfleece.nbdkit.calls import Client, current
from nbdfleece.nbdkit.gate import Gate, Threads

SECONDS_MAX = 120


def wait(event: threading.Event) -> None:
    assert event.wait(SECONDS_MAX)


async def turns(condition: threading.Event) -> None:
    """Wait for a thread, the loop running."""
    async with asyncio.timeout(SECONDS_MAX):
        while not condition.is_set():
            await asyncio.sleep(0.001)


async def test_as_many_run_as_the_gate_is_wide_and_the_others_wait_in_order() -> None:
    gate, go, order = Gate(Threads(), 2), threading.Event(), []
    begun = [threading.Event() for _ in range(4)]

    def job(number: int) -> int:
        order.append(number)
        begun[number].set()
        wait(go)
        return number

    tasks = [asyncio.create_task(gate.run(None, lambda n=number: job(n))) for number in range(4)]
    await turns(begun[0])
    await turns(begun[1])
    assert not begun[2].is_set()
    go.set()
    assert await asyncio.gather(*tasks) == [0, 1, 2, 3]
    assert sorted(order[:2]) == [0, 1]


async def test_cancelled_call_keeps_its_place_until_it_returns() -> None:
    """A serialised script stays serialised, though nobody waits for the first call any more."""
    gate, begun, go = Gate(Threads(), 1), threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        wait(go)

    first = asyncio.create_task(gate.run(None, hang))
    await turns(begun)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(gate.run(None, lambda: go.is_set()))
    await asyncio.sleep(0)
    go.set()
    assert await second is True


async def test_call_that_was_given_up_while_waiting_never_runs() -> None:
    gate, go, ran = Gate(Threads(), 1), threading.Event(), []
    first = asyncio.create_task(gate.run(None, lambda: wait(go)))
    second = asyncio.create_task(gate.run(None, lambda: ran.append("second")))
    await asyncio.sleep(0)
    second.cancel()
    go.set()
    await first
    await gate.run(None, lambda: ran.append("third"))
    assert ran == ["third"]


async def test_failure_is_raised_where_it_is_waited_for() -> None:
    def fail() -> None:
        raise SystemExit("no")

    with pytest.raises(SystemExit):
        await Gate(Threads(), 1).run(None, fail)


async def test_each_call_has_its_client_and_no_old_error() -> None:
    gate, seen = Gate(Threads(), 1), []

    def job() -> None:
        call = current.get()
        assert call is not None
        seen.append((call.client, call.error))
        call.error = 5

    clients = [Client(disconnect=lambda force: None), None]
    for client in clients:
        await gate.run(client, job)
    assert seen == [(clients[0], 0), (None, 0)]
