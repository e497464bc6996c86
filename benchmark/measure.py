"""Rounds, ratios and their spread.

In a round every contestant runs once; the order is shuffled anew each round, so that none always
comes after the same other. A ratio compares two samples of one round. Above 1 ours is better,
whichever direction a metric has.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar


@dataclass(frozen=True)
class Metric:
    """One figure of a workload.

    Attributes:
        key: Its name in results.
        unit: For people.
        lower_is_better: Such as for a time.
        at_least: The ratio to the best peer that must be reached; None for no ratio.
        aim: The ratio that is aimed at.
        limit: For an absolute figure: what it may be at most.
        of_raw: The part of the raw limit that is aimed at, where one is measured.
    """

    key: str
    unit: str
    lower_is_better: bool = False
    at_least: float | None = None
    aim: float | None = None
    limit: float | None = None
    of_raw: float | None = None

    def ratio(self, ours: float, peers: float) -> float:
        """How many times better ours is."""
        return peers / ours if self.lower_is_better else ours / peers


@dataclass
class Contestant:
    """A server's samples.

    Attributes:
        samples: By the metric's key, one value per round.
        counts: Whether ours is compared with it in the result.
        failure: Why it could not be measured.
        is_limit: It is the raw limit.
    """

    label: str
    is_ours: bool
    counts: bool
    samples: dict[str, list[float]] = field(default_factory=dict)
    failure: str | None = None
    is_limit: bool = False


@dataclass(frozen=True)
class Ratio:
    """Ours to one peer: the median of the rounds, and the least and greatest."""

    peer: str
    median: float
    least: float
    greatest: float


Sample = Callable[[], dict[str, float]]
"""Runs a workload once and gives the metrics' values."""

T = TypeVar("T")


def shuffled(contestants: list[T], number: int) -> list[T]:
    """The order of a round, the same in each run."""
    return random.Random(number).sample(contestants, len(contestants))


def run_rounds(
    contestants: list[tuple[Contestant, Sample]],
    rounds: int,
    note: Callable[[str], None],
) -> None:
    """Let each contestant run once per round; one that fails is out."""
    for number in range(rounds):
        for contestant, sample in shuffled(contestants, number):
            if contestant.failure is not None:
                continue
            try:
                values = sample()
            except Exception as error:
                contestant.failure = f"{type(error).__name__}: {error}"[:600]
                print(f"  {contestant.label}: {contestant.failure}", file=sys.stderr)
                continue
            for key, value in values.items():
                contestant.samples.setdefault(key, []).append(value)
            shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
            note(f"  {number + 1} {contestant.label}: {shown}")


def ratio_to(metric: Metric, ours: Contestant, peer: Contestant) -> Ratio | None:
    """The ratio of two contestants, if both were measured in all rounds."""
    mine, theirs = ours.samples.get(metric.key, []), peer.samples.get(metric.key, [])
    if not mine or len(mine) != len(theirs):
        return None
    ratios = [metric.ratio(a, b) for a, b in zip(mine, theirs, strict=True)]
    return Ratio(peer.label, statistics.median(ratios), min(ratios), max(ratios))


def best_peer_ratio(metric: Metric, contestants: list[Contestant]) -> Ratio | None:
    """The least of the median ratios: the one to the peer that is best."""
    ours = next(it for it in contestants if it.is_ours)
    ratios = [
        found
        for peer in contestants
        if not peer.is_ours and peer.counts and (found := ratio_to(metric, ours, peer)) is not None
    ]
    return min(ratios, key=lambda ratio: ratio.median, default=None)


def raw_ratio(metric: Metric, contestants: list[Contestant]) -> Ratio | None:
    """What part of the raw limit ours reaches, if it was measured and the metric has one."""
    ours = next(it for it in contestants if it.is_ours)
    limit = next((it for it in contestants if it.is_limit), None)
    return ratio_to(metric, ours, limit) if limit is not None and metric.of_raw else None


@dataclass
class Result:
    """What a row has given.

    Attributes:
        notes: What a reader must know to read the figures.
    """

    name: str
    title: str
    metrics: tuple[Metric, ...]
    contestants: list[Contestant]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As the JSON file has it, the ratios with it."""
        data = asdict(self)
        for metric, entry in zip(self.metrics, data["metrics"], strict=True):
            best = best_peer_ratio(metric, self.contestants)
            entry["ratio"] = None if best is None else asdict(best)
            raw = raw_ratio(metric, self.contestants)
            entry["raw_ratio"] = None if raw is None else asdict(raw)
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """A result as it was written."""
        metrics = tuple(
            Metric(**{name: value for name, value in entry.items() if "ratio" not in name})
            for entry in data["metrics"]
        )
        contestants = [Contestant(**entry) for entry in data["contestants"]]
        return cls(data["name"], data["title"], metrics, contestants, data["notes"])
