"""Ratios, their spread, and what is written of them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from itertools import pairwise, permutations
from pathlib import Path

import pytest

from benchmark.curve_picture import curve_picture
from benchmark.measure import Contestant, Metric, Result, best_peer_ratio, raw_ratio, run_rounds
from benchmark.picture import ratios_picture
from benchmark.report import details, read_json, table, write_json

SPEED = Metric("speed", "MB/s", at_least=2.0, aim=3.0, of_raw=0.8)
TIME = Metric("time", "s", lower_is_better=True, at_least=1.0, aim=2.0)


def contestant(label: str, *, ours: bool = False, counts: bool = True, **samples: list[float]):
    return Contestant(label, ours, counts, samples, is_limit=label == "raw")


def result_of(*contestants: Contestant) -> Result:
    return Result("row", "a <row>", (SPEED, TIME), list(contestants))


def example() -> Result:
    return result_of(
        contestant("ours", ours=True, speed=[10.0, 30.0, 20.0], time=[1.0, 1.0, 1.0]),
        contestant("slow", speed=[1.0, 1.0, 1.0], time=[9.0, 9.0, 9.0]),
        contestant("fast", speed=[5.0, 10.0, 20.0], time=[0.5, 2.0, 1.0]),
        contestant("raw", counts=False, speed=[99.0, 99.0, 99.0], time=[0.1, 0.1, 0.1]),
    )


def test_ratio_compares_within_rounds_and_with_the_best_peer_that_counts() -> None:
    ratio = best_peer_ratio(SPEED, example().contestants)
    assert ratio is not None
    assert (ratio.peer, ratio.median, ratio.least, ratio.greatest) == ("fast", 2.0, 1.0, 3.0)


def test_part_of_the_raw_limit_is_said_where_a_metric_has_one() -> None:
    part = raw_ratio(SPEED, example().contestants)
    assert part is not None
    assert part.median == pytest.approx(20 / 99)
    assert raw_ratio(TIME, example().contestants) is None
    assert raw_ratio(SPEED, example().contestants[:-1]) is None
    assert "| 0.20 (0.10 … 0.30) of 99 MB/s |" in table([example()])


def test_ratio_of_times_is_above_one_where_ours_is_shorter() -> None:
    ratio = best_peer_ratio(TIME, example().contestants)
    assert ratio is not None
    assert (ratio.peer, ratio.median, ratio.least, ratio.greatest) == ("fast", 1.0, 0.5, 2.0)


def test_every_contestant_runs_in_every_round_after_others_than_before() -> None:
    """What one leaves behind, for a disk to write or a host to clear away, meets all alike."""
    order: list[str] = []

    def sample_of(label: str):
        def sample() -> dict[str, float]:
            order.append(label)
            return {"speed": 1.0}

        return sample

    entries = [(contestant(label), sample_of(label)) for label in "abc"]
    run_rounds(entries, 20, lambda text: None)
    rounds = ["".join(order[at : at + 3]) for at in range(0, len(order), 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert {pair for each in rounds for pair in pairwise(each)} == set(permutations("abc", 2))


def test_contestant_that_fails_is_out_and_said_to_be() -> None:
    def fail() -> dict[str, float]:
        raise RuntimeError("crashed")

    entry = contestant("x")
    run_rounds([(entry, fail)], 3, lambda text: None)
    assert entry.failure == "RuntimeError: crashed"
    assert entry.samples == {}


def test_results_survive_being_written_and_others_rows_stay(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    other = Result("other", "o", (SPEED,), example().contestants)
    write_json(path, [other], {"rounds": 3})
    write_json(path, [example()], {"rounds": 3})
    assert [result.name for result in read_json(path)] == ["other", "row"]
    assert read_json(path)[1] == example()
    assert json.loads(path.read_text())["rows"][1]["metrics"][0]["ratio"]["median"] == 2.0


def test_table_says_what_is_behind_and_shows_what_does_not_count() -> None:
    result = example()
    assert "**2.00** (1.00 … 3.00)" in table([result])
    assert "| raw |" not in table([result])
    assert "| raw |" in details([result])
    result.contestants[0].samples |= {"server-cpu": [0.5], "client-cpu": [0.000002]}
    assert "| 0.50 s | 2.0 µs each |" in details([result])
    result.contestants[0].samples["speed"] = [1.0, 1.0, 1.0]
    assert "**behind**" in table([result])


@pytest.mark.parametrize(
    "picture",
    [
        ratios_picture([example()]),
        curve_picture("a <curve>", "x", "y", {"a": [(1, 1), (10, 5)], "b": [(1, 2), (10, 2)]}),
    ],
)
def test_pictures_are_well_formed(picture: str) -> None:
    assert ET.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
