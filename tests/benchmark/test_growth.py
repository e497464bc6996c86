"""Fits of growth."""

from __future__ import annotations

import pytest

from benchmark.growth import Expected, Points, fit

XS = (1.0, 4.0, 16.0, 64.0, 256.0)


def power(exponent: float, factor: float = 3.0) -> Points:
    return [(x, factor * x**exponent) for x in XS]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_exponent_of_a_power_law_is_found(exponent: float) -> None:
    growth = fit(power(exponent)[::-1])
    assert growth is not None
    assert growth.exponent == pytest.approx(exponent)
    assert growth.tail_exponent == pytest.approx(exponent)
    assert growth.factor == pytest.approx(256**exponent)


def test_two_points_say_nothing() -> None:
    assert fit([(1.0, 1.0), (2.0, 9.0), (2.0, 8.0)]) is None


@pytest.mark.parametrize(
    ("points", "expected", "verdict"),
    [
        (power(0.0), Expected.FLAT, "flat"),
        (power(0.5), Expected.FLAT, "**not flat**, at most linear"),
        (power(0.5), Expected.LINEAR, "at most linear"),
        (power(1.0), Expected.LINEAR, "at most linear"),
        (power(1.5), Expected.LINEAR, "**worse than linear**"),
        (power(1.5), Expected.FLAT, "**worse than linear**"),
    ],
)
def test_verdict(points: Points, expected: Expected, verdict: str) -> None:
    growth = fit(points)
    assert growth is not None
    assert growth.verdict(expected) == verdict


def test_curve_that_turns_up_at_its_end_is_worse_than_linear() -> None:
    points = [(1.0, 1.0), (10.0, 1.0), (100.0, 1.0), (1000.0, 1.0), (10000.0, 100.0)]
    growth = fit(points)
    assert growth is not None
    assert growth.exponent < 1
    assert growth.verdict(Expected.FLAT).startswith("**not flat**")
    points[-1] = (10000.0, 1000.0)
    growth = fit(points)
    assert growth is not None
    assert growth.verdict(Expected.LINEAR) == "**worse than linear**"
