"""What callbacks return: taken, or refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest

from nbdfleece.nbdkit.values import (
    NothingCoveredError,
    allocation,
    check_block_size,
    check_exports,
    check_extents,
    check_level,
    check_size,
    check_text,
    check_true,
)


def test_only_true_is_true() -> None:
    assert [check_true(value) for value in (True, 1, "yes", None, False)] == [True] + [False] * 4


@pytest.mark.parametrize("value", [-1, "1", None, 1.0, 1 << 63])
def test_size_is_a_number_of_63_bits(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        check_size(value)


@pytest.mark.parametrize("value", [-1, 3, None, "2"])
def test_level_is_one_of_three(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        check_level(value)


def test_text_is_text() -> None:
    assert check_text(b"abc") == check_text("abc") == "abc"
    with pytest.raises(TypeError, match="did not return a string"):
        check_text(None)


def test_exports_are_names_or_pairs() -> None:
    assert check_exports(["a", ("b", "B"), b"c"]) == [("a", ""), ("b", "B"), ("c", "")]
    for bad in (None, [1], [("a", "b", "c")], [["a", "b"]], ["x" * 5000], [("a", None)]):
        with pytest.raises((ValueError, TypeError)):
            check_exports(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value",
    [
        None,
        [1, 512, 512],
        (1, 512),
        (3, 512, 4096),
        (1, 1000, 4096),
        (1, 256, 4096),
        (1, 512, 1 << 32),
        (1024, 512, 4096),
        (512, 512, 1000),
        (0, 512, 512),
    ],
)
def test_bad_block_size_is_refused(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        check_block_size(value)


def test_good_block_size_is_taken() -> None:
    assert check_block_size((0, 0, 0)) is None
    assert check_block_size((1, 4096, (1 << 32) - 1)) == (1, 4096, (1 << 32) - 1)


def test_extents_are_cut_to_the_range_and_equal_ones_joined() -> None:
    found = [(0, 100, 0), (100, 50, 3), (150, 0, 1), (150, 50, 3), (200, 1000, 2), (1200, 5, 0)]
    assert check_extents("extents", found, 120, 400) == [(80, 3), (200, 2)]
    assert allocation([(1, 7), (2, 4)]) == [(1, 3), (2, 0)]


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (None, "iterable"),
        ([], "empty list"),
        ([(0, 1)], "3-tuples"),
        ([[0, 200, 0]], "3-tuples"),
        ([(0, 150, 0), (160, 50, 0)], "contiguous"),
        ([(150, 50, 0), (100, 50, 0)], "first extent|contiguous"),
        ([(150, 50, 0)], "first extent"),
        ([(0, -5, 0)], "out of range"),
        ([(0, 200, 1 << 32)], "out of range"),
        ([(0, "x", 0)], "number"),
    ],
)
def test_bad_extents_are_refused(found: Any, reason: str) -> None:
    with pytest.raises((ValueError, TypeError), match=reason):
        check_extents("extents", found, 100, 200)


def test_extents_before_the_range_are_not_enough() -> None:
    with pytest.raises(NothingCoveredError):
        check_extents("extents", [(0, 50, 0)], 100, 200)
