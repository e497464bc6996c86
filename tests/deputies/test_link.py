"""Messages and descriptors between two processes."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from nbdfleece.deputies.link import Link
from nbdfleece.server.loop import LoopChoice, run

SECONDS_MAX = 60


class End:
    """One end of a link, and what came out of it."""

    def __init__(self, sock: socket.socket) -> None:
        self.messages: list[bytes] = []
        self.is_over = False
        self.changed = asyncio.Event()
        self.link = Link(sock, self.receive, self.end)

    def receive(self, message: memoryview) -> None:
        self.messages.append(bytes(message))
        self.changed.set()

    def end(self) -> None:
        self.is_over = True
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(SECONDS_MAX):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


def pair() -> tuple[End, End]:
    ours, theirs = socket.socketpair()
    return End(ours), End(theirs)


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_messages_of_any_length_arrive_whole_and_in_order(loop: LoopChoice) -> None:
    """Those that no buffer of the kernel holds, too; both ends speak at the same time."""
    messages = [b"", b"x", os.urandom(5 << 20), b"y" * 70_000, *[bytes([n]) for n in range(200)]]

    async def main() -> None:
        ours, theirs = pair()
        for message in messages:
            ours.link.send(message)
            theirs.link.send(message[::-1])
        await theirs.until(lambda: len(theirs.messages) == len(messages))
        await ours.until(lambda: len(ours.messages) == len(messages))
        assert theirs.messages == messages
        assert ours.messages == [message[::-1] for message in messages]
        ours.link.close()
        theirs.link.close()

    run(main(), loop, debug=True)


async def test_descriptors_belong_to_their_messages() -> None:
    """Among large messages without one, sent before anything was received."""
    ours, theirs = pair()
    before = descriptors()
    with pipe() as (_, first), pipe() as (_, second):
        numbers = [os.fstat(each).st_ino for each in (first, second)]
        ours.link.send(b"none" * 100_000)
        ours.link.send(b"first", first)
        ours.link.send(b"none" * 100_000)
        ours.link.send(b"second" * 100_000, second)
    await theirs.until(lambda: len(theirs.messages) == 4)
    assert [message[:5] for message in theirs.messages] == [b"nonen", b"first", b"nonen", b"secon"]
    for number in numbers:
        taken = theirs.link.take_descriptor()
        assert taken is not None
        assert os.fstat(taken).st_ino == number
        os.close(taken)
    assert descriptors() == before, "the sender has closed its duplicates"
    ours.link.close()
    theirs.link.close()


async def test_descriptor_that_there_is_no_room_for_is_told_and_the_next_is_right() -> None:
    ours, theirs = pair()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pipe() as (_, lost), pipe() as (_, found):
        ours.link.send(b"lost", lost)
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
        holes = []
        try:
            while True:  # use up what is free below the limit
                holes.append(os.dup(0))
        except OSError:
            pass
        try:
            await theirs.until(lambda: len(theirs.messages) == 1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for hole in holes:
                os.close(hole)
        ours.link.send(b"found", found)
        await theirs.until(lambda: len(theirs.messages) == 2)
        assert theirs.link.take_descriptor() is None
        taken = theirs.link.take_descriptor()
        assert taken is not None
        assert os.fstat(taken).st_ino == os.fstat(found).st_ino
        os.close(taken)
    ours.link.close()
    theirs.link.close()


async def test_end_comes_after_all_that_was_said() -> None:
    ours, theirs = pair()
    ours.link.send(b"last")
    ours.link.close()
    await theirs.until(lambda: theirs.is_over)
    assert theirs.messages == [b"last"]
    assert not theirs.link.is_open


async def test_nothing_is_left_of_a_link_whose_other_end_never_received() -> None:
    """Waiting messages and descriptors are dropped, and sending on is no error."""
    before = descriptors()
    ours, theirs = pair()
    with pipe() as (_, writer):
        ours.link.send(b"x" * (8 << 20))
        ours.link.send(b"y", writer)
        theirs.link.close()
        await ours.until(lambda: ours.is_over)
        ours.link.send(b"z", writer)
    assert descriptors() == before
    theirs.link.close()


async def test_message_that_cannot_be_sent_ends_the_link_on_both_sides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What comes behind half a message would be taken for the rest of it."""
    ours, theirs = pair()
    send = ours.link._send

    def fail(view: memoryview, descriptor: int | None) -> int:
        if len(view) < 5 << 20:
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        return send(view, descriptor)

    monkeypatch.setattr(ours.link, "_send", fail)
    theirs.link.send(b"heard")
    ours.link.send(b"x" * (5 << 20))
    ours.link.send(b"y" * (5 << 20))
    await theirs.until(lambda: theirs.is_over)
    await ours.until(lambda: ours.is_over)
    assert (ours.messages, theirs.messages) == ([b"heard"], [])


async def test_message_that_makes_trouble_is_received_once_and_the_next_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours, theirs = pair()
    receive = theirs.receive

    def fail(message: memoryview) -> None:
        receive(message)
        if message == b"bad":
            raise KeyError("a bug")

    theirs.link._receive = fail
    for message in (b"good", b"bad", b"next"):
        ours.link.send(message)
    await theirs.until(lambda: len(theirs.messages) == 3)
    ours.link.send(b"last")
    await theirs.until(lambda: theirs.messages[-1] == b"last")
    assert theirs.messages == [b"good", b"bad", b"next", b"last"]
    assert [(each.message, each.exc_info is not None) for each in caplog.records] == [
        ("internal error", True)
    ]
    ours.link.close()
    theirs.link.close()


async def test_descriptors_that_nobody_took_are_closed_with_the_link() -> None:
    before = descriptors()
    ours, theirs = pair()
    with pipe() as (_, writer):
        ours.link.send(b"x", writer)
    await theirs.until(lambda: len(theirs.messages) == 1)
    theirs.link.close()
    ours.link.close()
    assert descriptors() == before


async def test_receiver_may_close_the_link() -> None:
    """What came behind that message is not looked at."""
    ours, theirs = pair()
    receive = theirs.receive

    def close(message: memoryview) -> None:
        receive(message)
        theirs.link.close()

    theirs.link._receive = close
    ours.link.send(b"a")
    ours.link.send(b"b")
    await ours.until(lambda: ours.is_over)
    assert theirs.messages == [b"a"]
