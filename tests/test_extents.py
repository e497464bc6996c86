"""Extents: merging, clipping and limiting without losing or inventing a byte."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.extents import Extents

pairs = st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 3)), min_size=1, max_size=40)


def expand(extents: Extents) -> list[int]:
    return [status for length, status in extents.pairs() for _ in range(length)]


@given(pairs)
def test_from_pairs_merges_equal_neighbours_and_keeps_every_byte(
    rows: list[tuple[int, int]],
) -> None:
    extents = Extents.from_pairs(rows)
    assert expand(extents) == [status for length, status in rows for _ in range(length)]
    found = [status for _, status in extents.pairs()]
    assert all(a != b for a, b in pairwise(found))


@given(pairs, st.integers(1, 50_000))
def test_clipped_keeps_exactly_the_first_bytes(rows: list[tuple[int, int]], length: int) -> None:
    extents = Extents.from_pairs(rows)
    assert expand(extents.clipped(length)) == expand(extents)[:length]


@given(pairs, st.integers(1, 50))
def test_limited_keeps_the_first_extents(rows: list[tuple[int, int]], most: int) -> None:
    extents = Extents.from_pairs(rows)
    assert extents.limited(most).pairs() == extents.pairs()[:most]


@given(st.lists(pairs, min_size=1, max_size=5))
def test_concatenate_joins_across_the_seams(parts: list[list[tuple[int, int]]]) -> None:
    whole = Extents.concatenate(Extents.from_pairs(part) for part in parts)
    assert whole.pairs() == Extents.from_pairs([row for part in parts for row in part]).pairs()


@given(pairs)
def test_with_status_merges_what_became_equal(rows: list[tuple[int, int]]) -> None:
    extents = Extents.from_pairs(rows)
    mapped = extents.with_status(extents.status & 1)
    assert expand(mapped) == [status & 1 for status in expand(extents)]
    assert mapped.total() == extents.total()
