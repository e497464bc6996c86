"""Received bytes stay where a waiting write needs them."""

from __future__ import annotations

import random

from nbdfleece.server.buffers import BufferPool
from nbdfleece.server.inbox import INBOX_BYTES, Inbox


def test_stream_of_messages_survives_every_cut_and_pin() -> None:
    pool = BufferPool(0)
    inbox = Inbox(pool)
    rng = random.Random(4)
    stream = rng.randbytes(12 << 20)
    sent = taken = 0
    pins = []
    while taken < len(stream):
        length = min(rng.choice([1, 500, 70_000, 400_000]), len(stream) - taken)
        while len(inbox) < length:
            space = inbox.space(length)
            count = min(len(space), len(stream) - sent, rng.randrange(1, 200_000))
            space[:count] = stream[sent : sent + count]
            inbox.received(count)
            sent += count
        view = inbox.peek(length)
        assert view == stream[taken : taken + length]
        if rng.random() < 0.3:
            inbox.buffer.users += 1
            pins.append((inbox.buffer, view, taken))
        inbox.start += length
        taken += length
        if len(pins) > 5:
            buffer, view, begin = pins.pop(0)
            assert view == stream[begin : begin + len(view)]
            buffer.release()
    for buffer, _, _ in pins:
        buffer.release()
    inbox.close()
    assert pool.taken_bytes == 0


def test_inbox_that_is_empty_gives_its_buffer_back() -> None:
    pool = BufferPool(4 << 20)
    inbox = Inbox(pool)
    inbox.append(b"abc")
    inbox.give_back()
    assert pool.taken_bytes == INBOX_BYTES
    inbox.start = inbox.end
    inbox.give_back()
    assert (pool.taken_bytes, pool.idle_bytes) == (0, INBOX_BYTES)
