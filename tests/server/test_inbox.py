"""Received bytes stay where a waiting write needs them."""

from __future__ import annotations

import random

import pytest

from nbdfleece.server.buffers import BufferPool
from nbdfleece.server.inbox import (
    IN_PLACE_BYTES_MAX,
    INBOX_BYTES,
    LARGE_BYTES_MIN,
    BrokenChannelError,
    Inbox,
    needed_after,
)

KIB = 1 << 10
MESSAGE = 28 + 256 * KIB


class Source:
    """Has so many bytes to receive, or an error."""

    def __init__(self, *left: int | OSError) -> None:
        self.left = list(left)

    def recv_into(self, view: memoryview, /) -> int:
        if not self.left:
            raise BlockingIOError
        first = self.left.pop(0)
        if isinstance(first, OSError):
            raise first
        count = min(first, len(view))
        if first > count:
            self.left.insert(0, first - count)
        return count


def test_stream_of_messages_survives_every_cut_and_pin() -> None:
    pool = BufferPool(0)
    inbox = Inbox(pool, Source())
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
    inbox = Inbox(pool, Source())
    inbox.append(b"abc")
    inbox.give_back()
    assert pool.taken_bytes == INBOX_BYTES
    inbox.start = inbox.end
    inbox.give_back()
    assert (pool.taken_bytes, pool.idle_bytes) == (0, INBOX_BYTES)


def test_large_messages_are_received_one_at_a_time_into_the_same_memory() -> None:
    inbox = Inbox(BufferPool(0), Source(10 * MESSAGE))
    for _ in range(10):
        assert inbox.receive(MESSAGE) == MESSAGE
        assert (inbox.start, inbox.end) == (0, MESSAGE)
        inbox.start = inbox.end


def test_pinned_buffer_is_gone_on_behind_what_is_pinned() -> None:
    inbox = Inbox(BufferPool(0), Source(2 * MESSAGE))
    inbox.receive(MESSAGE)
    assert inbox.buffer is not None
    inbox.buffer.users += 1
    inbox.start = inbox.end
    inbox.receive(MESSAGE)
    assert (inbox.start, inbox.end) == (MESSAGE, 2 * MESSAGE)


def test_receive_large_finds_a_large_message_or_nothing() -> None:
    inbox = Inbox(BufferPool(0), Source(MESSAGE - 1, 10 * KIB))
    assert inbox.receive_large(LARGE_BYTES_MIN - 1) == 0, "no large message is meant"
    assert inbox.receive_large(MESSAGE) == MESSAGE - 1
    assert inbox.receive_large(MESSAGE - 1) == 0, "all of it is here"
    assert inbox.receive_large(MESSAGE) == 10 * KIB
    inbox.start = inbox.end
    assert inbox.receive_large(MESSAGE) == 0, "nothing is there"


def test_receive_large_after_the_end_takes_no_buffer() -> None:
    pool = BufferPool(0)
    inbox = Inbox(pool, Source(MESSAGE))
    inbox.close()
    assert inbox.receive_large(MESSAGE) == 0
    assert pool.taken_bytes == 0


def test_receive_large_from_a_broken_connection_says_so() -> None:
    inbox = Inbox(BufferPool(0), Source(ConnectionResetError("reset")))
    with pytest.raises(BrokenChannelError, match="reset"):
        inbox.receive_large(MESSAGE)


@pytest.mark.parametrize(
    ("length", "needed"),
    [
        (4 * KIB, 28),
        (256 * KIB, 28 + 256 * KIB),
        (IN_PLACE_BYTES_MAX, 28 + IN_PLACE_BYTES_MAX),
        (32 << 20, 28 + LARGE_BYTES_MIN),
    ],
)
def test_next_message_is_expected_to_be_like_the_last(length: int, needed: int) -> None:
    assert needed_after(28, length) == needed
