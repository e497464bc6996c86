"""The walk over block status believes nothing that cannot be true; merging is exact."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.backup.block_status import ALLOCATION, merge, overlay, walk
from nbdfleece.backup.errors import ServerError
from nbdfleece.extents import Extents

BITMAP = "qemu:dirty-bitmap:b0"
SIZE = 1000
Answers = list[tuple[str, list[int]]]


class Answering:
    """Answers with what a function says, and notes the requests."""

    def __init__(self, answer: Callable[[int, int], Answers]) -> None:
        self.answer = answer
        self.requests: list[tuple[int, int]] = []

    async def block_status(self, offset: int, length: int) -> Answers:
        self.requests.append((offset, length))
        assert len(self.requests) <= SIZE
        return self.answer(offset, length)


async def walked(answer: Callable[[int, int], Answers]) -> dict[str, Extents]:
    return await walk(Answering(answer), "uri", SIZE, (ALLOCATION, BITMAP))


async def test_answers_of_different_lengths_are_put_together() -> None:
    def answer(offset: int, length: int) -> Answers:
        first = min(length, 100 if offset < 500 else 7)
        return [(BITMAP, [min(length, 33), 1]), (ALLOCATION, [first, 3])]

    found = await walked(answer)
    assert found[ALLOCATION].pairs() == [(SIZE, 3)]
    assert found[BITMAP].pairs() == [(SIZE, 1)]


async def test_last_extent_past_the_request_is_cut_there() -> None:
    server = Answering(lambda offset, length: [(ALLOCATION, [5, 0, SIZE - offset - 5, 3])])
    found = await walk(server, "uri", SIZE, (ALLOCATION,))
    assert found[ALLOCATION].pairs() == [(5, 0), (SIZE - 5, 3)]


LIES: dict[str, Callable[[int, int], Answers]] = {
    "no extents": lambda o, n: [(ALLOCATION, [n, 0]), (BITMAP, [])],
    "an odd number of words": lambda o, n: [(ALLOCATION, [n, 0]), (BITMAP, [n])],
    "an extent of no bytes first": lambda o, n: [(ALLOCATION, [0, 0, n, 0]), (BITMAP, [n, 0])],
    "an extent of no bytes last": lambda o, n: [(ALLOCATION, [n, 0]), (BITMAP, [n - 1, 0, 0, 1])],
    "only an extent of no bytes": lambda o, n: [(ALLOCATION, [0, 0]), (BITMAP, [n, 0])],
    "past the disk": lambda o, n: [(ALLOCATION, [SIZE - o + 1, 0]), (BITMAP, [n, 0])],
    "far past the disk": lambda o, n: [(ALLOCATION, [n, 0]), (BITMAP, [(1 << 64) - 1, 0])],
    "together past the disk": lambda o, n: [(ALLOCATION, [n, 0]), (BITMAP, [n - 1, 0, 2, 1])],
    "sum wraps": lambda o, n: [(ALLOCATION, [n, 0]), (BITMAP, [n, 0, n, 1] * 3)],
    "after the request": lambda o, n: [(ALLOCATION, [n, 0, 1, 0]), (BITMAP, [n, 0])],
    "a context is missing": lambda o, n: [(ALLOCATION, [n, 0])],
    "no context at all": lambda o, n: [],
    "a context twice": lambda o, n: [(BITMAP, [n, 0]), (ALLOCATION, [n, 0]), (BITMAP, [n, 1])],
    "another context": lambda o, n: [(ALLOCATION, [n, 0]), (BITMAP, [n, 0]), ("x:y", [n, 0])],
}


@pytest.mark.parametrize("lie", LIES)
async def test_lie_is_an_error(lie: str) -> None:
    with pytest.raises(ServerError, match="cannot be trusted"):
        await walked(LIES[lie])


@pytest.mark.parametrize("lie", LIES)
async def test_lie_after_honest_answers_is_an_error(lie: str) -> None:
    def answer(offset: int, length: int) -> Answers:
        if offset < 600:
            return [(ALLOCATION, [200, 0]), (BITMAP, [200, 1])]
        return LIES[lie](offset, length)

    with pytest.raises(ServerError, match="cannot be trusted"):
        await walked(answer)


async def test_unknown_bits_of_a_bitmap_count_as_dirty() -> None:
    found = await walked(lambda o, n: [(ALLOCATION, [n, 1]), (BITMAP, [10, 1 << 40, n - 10, 4])])
    assert merge(found[ALLOCATION], found[BITMAP]).pairs() == [(SIZE, 1)]


async def test_requests_stay_below_what_servers_sign() -> None:
    server = Answering(lambda offset, length: [(ALLOCATION, [length, 3])])
    size = 5 << 30
    found = await walk(server, "uri", size, (ALLOCATION,))
    assert found[ALLOCATION].total() == size
    assert max(length for _, length in server.requests) < 1 << 31


@st.composite
def two_descriptions(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    size = draw(st.integers(1, 60))
    one = st.lists(st.integers(0, 3), min_size=size, max_size=size)
    return draw(one), draw(one)


def packed(states: list[int]) -> Extents:
    return Extents.from_pairs((1, state) for state in states)


def unpacked(extents: Extents) -> list[int]:
    return np.repeat(extents.status, extents.lengths).tolist()


@given(two_descriptions())
def test_overlay_keeps_both_descriptions(states: tuple[list[int], list[int]]) -> None:
    first, second = overlay(packed(states[0]), packed(states[1]))
    assert (first.lengths == second.lengths).all()
    assert (unpacked(first), unpacked(second)) == states


@given(two_descriptions())
def test_merge_says_dirty_and_zero_of_every_byte(states: tuple[list[int], list[int]]) -> None:
    merged = merge(packed(states[0]), packed(states[1]))
    expected = [
        (1 if dirty else 0) | (2 if allocation & 2 else 0)
        for allocation, dirty in zip(*states, strict=True)
    ]
    assert unpacked(merged) == expected
    assert (merged.lengths > 0).all()


def test_merge_is_linear_in_the_number_of_extents() -> None:
    count = 400_000
    lengths = np.full(count, 65536, dtype=np.int64)
    alternating = (np.arange(count) % 2).astype(np.uint32)
    shifted = np.roll(alternating, 1)
    merged = merge(Extents(lengths, alternating * np.uint32(3)), Extents(lengths, shifted))
    assert len(merged.lengths) == count
