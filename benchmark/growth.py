"""How a cost grows, fitted: the exponent of a power law through a curve's points.

With ``y`` proportional to ``x ** exponent``, 0 is flat and 1 is linear. A curve that turns up at
its end would hide in a fit of all points, so the last points have a fit of their own, and
both must pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Final

FLAT_FACTOR: Final = 1.5
"""How much a flat cost may have grown, by the fit, from the least x to the greatest: noise."""

LINEAR_EXPONENT: Final = 1.15
"""What still counts as linear: caches that no longer hold what is copied cost this much."""

TAIL_POINTS: Final = 3

Points = list[tuple[float, float]]


class Expected(Enum):
    """How a cost may grow."""

    FLAT = "flat"
    LINEAR = "at most linear"


@dataclass(frozen=True)
class Growth:
    """A fit.

    Attributes:
        exponent: Of all points.
        tail_exponent: Of the last three or the last half, whichever are more.
        factor: How much the fit of all points grows over the whole range of x.
    """

    exponent: float
    tail_exponent: float
    factor: float

    def verdict(self, expected: Expected) -> str:
        """What to say of it; in bold where it is not as expected."""
        if max(self.exponent, self.tail_exponent) > LINEAR_EXPONENT:
            return "**worse than linear**"
        if expected is Expected.LINEAR:
            return "at most linear"
        return "flat" if self.factor <= FLAT_FACTOR else "**not flat**, at most linear"


def fit(points: Points) -> Growth | None:
    """The fit of a curve with at least three points whose x differ."""
    if len({x for x, _ in points}) < TAIL_POINTS:
        return None
    ordered = sorted(points)
    exponent = _slope(ordered)
    tail = _slope(ordered[-max(TAIL_POINTS, len(ordered) // 2) :])
    return Growth(exponent, tail, (ordered[-1][0] / ordered[0][0]) ** exponent)


def _slope(points: Points) -> float:
    """Least squares on logarithms."""
    xs = [math.log(x) for x, _ in points]
    ys = [math.log(y) for _, y in points]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - x_mean) ** 2 for x in xs)
