"""Replies leave whole and in order, whatever the socket takes."""

from __future__ import annotations

import contextlib
import random

from nbdfleece.server.buffers import BufferPool
from nbdfleece.server.outbox import ARENA_BYTES, SEGMENTS_MAX, Outbox


class Sink:
    """Takes a part of what is sent, and says no every now and then."""

    def __init__(self, step: int) -> None:
        self.data = bytearray()
        self.step = step
        self.ready = True

    def sendmsg(self, views: list[memoryview], /) -> int:
        assert len(views) <= SEGMENTS_MAX
        self.ready = not self.ready
        if self.ready:
            raise BlockingIOError
        taken = bytearray()
        for view in views:
            taken += view[: self.step - len(taken)]
        self.data += taken
        return len(taken)


def test_replies_leave_in_the_order_of_their_commits_whatever_the_socket_takes() -> None:
    pool = BufferPool(8 << 20)
    outbox = Outbox(pool)
    sink = Sink(step=300_000)
    rng = random.Random(5)
    expected = bytearray()
    reserved = []
    for _ in range(200):
        length = rng.choice([16, 4124, 70_000, ARENA_BYTES + 5])
        buffer, start = outbox.reserve(length)
        data = rng.randbytes(4) * (length // 4 + 1)
        buffer.view[start : start + length] = data[:length]
        reserved.append((buffer, start, data[:length]))
        rng.shuffle(reserved)
        while len(reserved) > 4:
            buffer, start, data = reserved.pop()
            outbox.commit(buffer, start, start + len(data))
            expected += data
        try:
            outbox.send(sink)
        except BlockingIOError:
            continue
    for buffer, _, _ in reserved:
        outbox.discard(buffer)
    while outbox.queued_bytes:
        try:
            outbox.send(sink)
        except BlockingIOError:
            continue
    assert sink.data == expected
    outbox.close()
    assert pool.taken_bytes == 0


def test_place_that_is_taken_back_is_the_next_one() -> None:
    """What is tried and must be waited for takes no more room than what is waited for."""
    pool = BufferPool(8 << 20)
    outbox = Outbox(pool)
    outbox.put(b"first ")
    for length in (16, ARENA_BYTES - 6):
        buffer, start = outbox.reserve(length)
        assert start == 6
        outbox.take_back(buffer, start)
    buffer, start = outbox.reserve(ARENA_BYTES + 1)
    outbox.take_back(buffer, start)
    assert pool.taken_bytes == ARENA_BYTES
    outbox.put(b"second")
    sink = Sink(step=1 << 30)
    outbox.send(sink)
    assert sink.data == b"first second"
    assert pool.taken_bytes == 0


def test_closed_outbox_swallows_late_replies() -> None:
    pool = BufferPool(0)
    outbox = Outbox(pool)
    outbox.put(b"queued")
    buffer, start = outbox.reserve(100)
    outbox.close()
    outbox.put(b"late")
    outbox.commit(buffer, start, start + 100)
    assert (outbox.queued_bytes, pool.taken_bytes) == (0, 0)


def test_small_reply_after_a_large_one_is_not_put_into_its_buffer() -> None:
    """A large reply has a buffer of its own, which may end where the shared one is filled to."""
    outbox = Outbox(BufferPool(8 << 20))
    sink = Sink(step=1 << 30)
    large, small = b"l" * (ARENA_BYTES + 1), b"s" * 16
    first, start = outbox.reserve(16)
    first.view[start : start + 16] = small
    outbox.commit(first, start, start + 16)
    buffer, start = outbox.reserve(len(large))
    buffer.view[: len(large)] = large
    outbox.commit(buffer, 0, 16)  # an end before the place's, as after a shorter read
    outbox.put(b"t" * 16)
    while outbox.queued_bytes:
        with contextlib.suppress(BlockingIOError):
            outbox.send(sink)
    assert sink.data == small + large[:16] + b"t" * 16
