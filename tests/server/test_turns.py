"""Turns are taken one after the other, with a look at the sockets between them."""

from __future__ import annotations

import asyncio
import socket
from functools import partial

from nbdfleece.server.turns import STREAM_TURNS, Turns


async def test_sockets_are_looked_at_between_two_turns() -> None:
    """Rule 5: what arrives during a turn is seen before the next one, or the one after."""
    loop = asyncio.get_running_loop()
    turns = Turns(loop)
    events: list[str] = []
    near, far = socket.socketpair()
    done = loop.create_future()

    def readable() -> None:
        near.recv(1)
        events.append("readable")

    def first() -> None:
        events.append("first")
        far.send(b"x")
        turns.add(last)

    def last() -> None:
        events.append("last")
        done.set_result(None)

    loop.add_reader(near.fileno(), readable)
    turns.add(first)
    turns.add(lambda: events.append("second"))
    await done
    loop.remove_reader(near.fileno())
    near.close()
    far.close()
    assert [event for event in events if event != "readable"] == ["first", "second", "last"]
    # asyncio's loop looks first, but calls what was due before.
    assert events.index("readable") <= 2


async def test_cancelled_turn_is_passed_over_and_a_failing_one_keeps_nobody_from_theirs() -> None:
    loop = asyncio.get_running_loop()
    problems: list[str] = []
    loop.set_exception_handler(lambda loop, context: problems.append(str(context["exception"])))
    turns = Turns(loop)
    events: list[str] = []
    done = loop.create_future()

    def fail() -> None:
        raise ValueError("on purpose")

    turns.add(fail)
    cancelled = turns.add(lambda: events.append("cancelled"))
    turns.add(lambda: done.set_result(None))
    cancelled.cancel()
    await done
    only = turns.add(lambda: events.append("cancelled"))
    only.cancel()
    await asyncio.sleep(0)
    again = loop.create_future()
    turns.add(lambda: again.set_result(None))
    await again
    assert (events, problems) == ([], ["on purpose"])


async def test_busy_clients_have_theirs_after_a_few_of_the_streams_however_many_these_are() -> None:
    turns = Turns(asyncio.get_running_loop())
    events: list[str] = []
    done = asyncio.get_running_loop().create_future()

    def stream() -> None:
        events.append("s")
        turns.add(stream)
        if len(events) > 100 and not done.done():
            done.set_result(None)

    def busy(name: str) -> None:
        events.append(name)
        turns.add_busy(partial(busy, name))

    for _ in range(10):
        turns.add(stream)
    for name in "ab":
        turns.add_busy(partial(busy, name))
    await done
    each_round = "s" * STREAM_TURNS + "ab"
    assert "".join(events[:96]) == (each_round * 100)[:96]


async def test_busy_clients_alone_take_all_turns() -> None:
    turns = Turns(asyncio.get_running_loop())
    events: list[str] = []
    done = asyncio.get_running_loop().create_future()
    assert turns.is_idle
    for name in "abc":
        turns.add_busy(partial(events.append, name))
    assert not turns.is_idle
    turns.add_busy(lambda: done.set_result(None))
    await done
    await asyncio.sleep(0)
    assert "".join(events) == "abc"
    assert turns.is_idle
