"""A curve's files: what a partial one says, and what goes on with it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmark import curves
from benchmark.curve_files import CurveFile, write_index
from benchmark.curves import Curve, measure
from benchmark.growth import Expected
from benchmark.images import Images
from benchmark.servers import Nbdfleece, RawLimit, Running, Server, Setup
from benchmark.version import OtherRun


class Fake(Server):
    """Never started: the points of these curves need no server."""

    def can(self, setup: Setup) -> bool:
        raise AssertionError

    def _enter(self, setup: Setup, address: Path | int, stack: ExitStack) -> Running:
        raise AssertionError


def curve(values: tuple[int, ...], asked: list[tuple[str, int]]) -> Curve:
    def point(images: Images, server: Server, value: int) -> float:
        asked.append((server.label, value))
        if server.label == "weak" and value > 4:
            raise RuntimeError("too much")
        return float(value)

    return Curve("c", "a <curve>", "things", "s", values, point, Expected.FLAT)


def servers(images: Images) -> list[Server]:
    return [Fake(images.place, "strong"), Fake(images.place, "weak")]


def read(folder: Path) -> dict:
    return json.loads((folder / "c.json").read_text())


def test_partial_file_says_what_is_missing_and_is_gone_on_with(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    whole = curve((1, 2, 4, 8, 16), asked)
    real = curves._measure_value
    with monkeypatch.context() as patch:
        patch.setattr(
            curves,
            "_measure_value",
            lambda *it: interrupt() if it[3] == 8 else real(*it),
        )
        with pytest.raises(KeyboardInterrupt):
            measure(whole, images, servers(images), tmp_path, resume=False)
    data = read(tmp_path)
    assert (data["complete"], data["missing"]) == (False, [8, 16])
    assert "not measured yet: [8, 16]" in (tmp_path / "c.svg").read_text()

    asked.clear()
    measure(whole, images, servers(images), tmp_path, resume=True)
    assert {value for _, value in asked} == {8, 16}
    data = read(tmp_path)
    assert data["complete"]
    assert data["lines"]["strong"]["growth"]["exponent"] == pytest.approx(1)
    assert data["lines"]["strong"]["verdict"].startswith("**not flat**")
    assert "RuntimeError: too much" in data["lines"]["weak"]["failure"]
    assert len(data["lines"]["weak"]["points"]) == 3
    assert ET.parse(tmp_path / "c.svg").getroot().tag.endswith("svg")

    asked.clear()
    measure(whole, images, servers(images), tmp_path, resume=True)
    assert asked == []

    write_index(tmp_path, ["absent", "c"])
    page = (tmp_path / "README.md").read_text()
    assert "| strong | **not flat**" in page
    assert "then at 8: RuntimeError: too much" in page
    assert "](c.svg)" in page


def test_points_of_another_nbdfleece_are_not_gone_on_with(images: Images, tmp_path: Path) -> None:
    whole = curve((1, 2, 3), [])
    measure(whole, images, servers(images), tmp_path, resume=False)
    data = read(tmp_path)
    data["made"]["ours"] = "0.0.1+0000000000"
    (tmp_path / "c.json").write_text(json.dumps(data))
    with pytest.raises(OtherRun, match=r"its ours is 0\.0\.1\+0000000000, now it is"):
        measure(whole, images, servers(images), tmp_path, resume=True)


def test_a_real_curve_runs_through_beside_the_raw_limit(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "ROUNDS", 1)
    real = next(it for it in curves.CURVES if it.name == "fragmentation")
    few = Curve(
        real.name, real.title, real.x_unit, real.y_unit, (1, 64), real.point,
        real.expected, has_limit=True,
    )  # fmt: skip
    own, limit = Nbdfleece(images.place), RawLimit(images.place)
    file: CurveFile = measure(few, images, [own, limit], tmp_path, resume=False)
    assert not file.missing()
    assert not file.has_failed(own.label)
    assert not file.has_failed(limit.label)
