"""Replies leave whole and in order, whatever the socket takes."""

from __future__ import annotations

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


def test_closed_outbox_swallows_late_replies() -> None:
    pool = BufferPool(0)
    outbox = Outbox(pool)
    outbox.put(b"queued")
    buffer, start = outbox.reserve(100)
    outbox.close()
    outbox.put(b"late")
    outbox.commit(buffer, start, start + 100)
    assert (outbox.queued_bytes, pool.taken_bytes) == (0, 0)
