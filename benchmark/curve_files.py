"""A curve's files: JSON with every sample, and a picture. A partial one is valid and says so."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from .curve_picture import curve_picture
from .growth import Points, fit
from .report import machine, number, replace_text
from .version import check_same, ours

if TYPE_CHECKING:
    from .curves import Curve


@dataclass
class Line:
    """One server's samples.

    Attributes:
        samples: By the value of what is varied, one for each round.
        failure: Why it has no more.
    """

    samples: dict[int, list[float]] = field(default_factory=dict)
    failure: str | None = None

    def points(self) -> Points:
        """Medians."""
        return [(x, statistics.median(found)) for x, found in sorted(self.samples.items())]


@dataclass
class CurveFile:
    """What is known of a curve.

    Attributes:
        made: What all points of a file share: which nbdfleece, which options.
        lines: By the label of a server, ours first.
    """

    folder: Path
    curve: Curve
    made: dict[str, Any]
    lines: dict[str, Line]

    @classmethod
    def open(
        cls,
        folder: Path,
        curve: Curve,
        labels: list[str],
        options: dict[str, int],
        *,
        resume: bool,
    ) -> Self:
        """An empty one, or with ``resume`` one with the points that the folder has.

        Raises:
            OtherRun: They are of another nbdfleece, or were made with other options.
        """
        made = {"ours": ours(), **options}
        file = cls(folder, curve, made, {label: Line() for label in labels})
        if resume and file.path(".json").exists():
            file._take(json.loads(file.path(".json").read_text()))
        return file

    def _take(self, data: dict[str, Any]) -> None:
        for key, value in self.made.items():
            check_same(self.path(".json"), key, data["made"].get(key), value)
        for label, line in data["lines"].items():
            samples = {point["x"]: point["samples"] for point in line["points"]}
            self.lines[label] = Line(samples, line["failure"])

    def path(self, ending: str) -> Path:
        """Of one of its files."""
        return self.folder / f"{self.curve.name}{ending}"

    def wants(self, label: str, x: int) -> bool:
        """Whether a server is still to be measured there."""
        line = self.lines[label]
        return line.failure is None and x not in line.samples

    def has_failed(self, label: str) -> bool:
        """Whether a server is out."""
        return self.lines[label].failure is not None

    def fail(self, label: str, reason: str) -> None:
        """Put a server out."""
        print(f"  {label}: {reason}", flush=True)
        self.lines[label].failure = reason

    def add(self, label: str, x: int, samples: list[float]) -> None:
        """Take the samples of a point."""
        self.lines[label].samples[x] = samples
        print(f"  {x} {label}: {statistics.median(samples):.4g} {self.curve.y_unit}", flush=True)

    def missing(self) -> list[int]:
        """The values where a server that has not failed was not yet measured."""
        return [x for x in self.curve.values if any(self.wants(label, x) for label in self.lines)]

    def verdict(self, label: str) -> str:
        """How a server's cost grows."""
        line = self.lines[label]
        growth = fit(line.points())
        if growth is None:
            return line.failure or "too few points"
        text = f"{growth.verdict(self.curve.expected)}, exponent {growth.exponent:.2f}"
        return f"{text} (last points {growth.tail_exponent:.2f})"

    def summary(self) -> str:
        """A line for each server."""
        return "\n".join(f"  {label}: {self.verdict(label)}" for label in self.lines)

    def to_json(self) -> dict[str, Any]:
        """As the file has it."""
        curve = self.curve
        return {
            "name": curve.name,
            "title": curve.title,
            "x": curve.x_unit,
            "y": curve.y_unit,
            "expected": curve.expected.value,
            "complete": not self.missing(),
            "missing": self.missing(),
            "made": self.made,
            "machine": machine(),
            "lines": {label: self._line_to_json(label) for label in self.lines},
        }

    def _line_to_json(self, label: str) -> dict[str, Any]:
        line = self.lines[label]
        growth = fit(line.points())
        return {
            "points": [
                {"x": x, "y": statistics.median(found), "samples": found}
                for x, found in sorted(line.samples.items())
            ],
            "growth": None if growth is None else asdict(growth),
            "verdict": self.verdict(label),
            "failure": line.failure,
        }

    def write(self) -> None:
        """Write both files, each of them at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        replace_text(self.path(".json"), text)
        drawn = {label: line.points() for label, line in self.lines.items() if line.samples}
        if drawn:
            note = f"not measured yet: {self.missing()}" if self.missing() else ""
            curve = self.curve
            picture = curve_picture(curve.title, curve.x_unit, curve.y_unit, drawn, note)
            replace_text(self.path(".svg"), picture)


def write_index(folder: Path, names: Iterable[str]) -> None:
    """Write a page with the verdicts and pictures of the curves that a folder has."""
    paths = [folder / f"{name}.json" for name in names]
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    lines = ["# How cost grows", "", "    scripts/bench curves --output docs", ""]
    for data in found:
        about = data["machine"]
        made = f"nbdfleece {data['made']['ours']}, {about['cpus']} x {about['cpu']}"
        lines += [f"## {data['name']}", "", f"{data['title']}: {data['y']} by {data['x']}."]
        lines += [f"Ours may be {data['expected']}. {made}.", ""]
        if data["missing"]:
            lines += [f"Partial: not measured at {data['missing']}.", ""]
        lines += ["| | growth | first point | last point |", "|---|---|---|---|"]
        lines += [_index_line(label, line) for label, line in data["lines"].items()]
        lines += ["", f"![{data['title']}]({data['name']}.svg)", ""]
    replace_text(folder / "README.md", "\n".join(lines))


def _index_line(label: str, line: dict[str, Any]) -> str:
    ends = [f"{it['x']}: {number(it['y'])}" for it in (line["points"][:1] + line["points"][-1:])]
    failure = f"; then {line['failure']}" if line["failure"] else ""
    return f"| {label} | {line['verdict']}{failure} | {' | '.join(ends or ['', ''])} |"
