"""JSON and Markdown of what was measured."""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

from .measure import Contestant, Metric, Result, best_peer_ratio, ratio_to, raw_ratio


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown",
    )
    return {
        "cpu": model,
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def write_json(path: Path, results: list[Result], options: dict[str, Any]) -> None:
    """Write results, replacing those of the same rows and keeping the file's others."""
    rows = {}
    if path.exists():
        rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    for result in results:
        rows[result.name] = {**result.to_json(), "options": options, "machine": machine()}
    text = json.dumps({"rows": list(rows.values())}, indent=1, ensure_ascii=False)
    replace_text(path, text + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file at once: a run that is killed leaves what was there before."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.rename(path)


def read_json(path: Path) -> list[Result]:
    """The results in a file."""
    rows = json.loads(path.read_text())["rows"]
    for row in rows:
        del row["options"], row["machine"]
    return [Result.from_json(row) for row in rows]


def verdict(metric: Metric, contestants: list[Contestant]) -> str:
    """Whether a metric's goal is reached: aim, least, or behind."""
    ours = next(it for it in contestants if it.is_ours)
    if metric.key not in ours.samples:
        return "not measured"
    best = best_peer_ratio(metric, contestants)
    if metric.at_least is not None and best is None:
        return "no peer"
    if metric.at_least is not None and best is not None and best.median < metric.at_least:
        return "**behind**"
    if metric.limit is not None and statistics.median(ours.samples[metric.key]) > metric.limit:
        return "**over the limit**"
    if metric.aim is not None and metric.at_least is not None and best is not None:
        return "aim reached" if best.median >= metric.aim else "reached"
    return "reached"


def table(results: list[Result]) -> str:
    """The table of ratios in Markdown."""
    lines = [
        "| workload | ours | best peer | ratio (least … greatest) | at least | aim | "
        "| of the raw limit, aim 0.8 |",
        "|---" * 8 + "|",
    ]
    for result in results:
        for metric in result.metrics:
            lines.append(_table_line(result, metric))
    return "\n".join(lines) + "\n"


def _table_line(result: Result, metric: Metric) -> str:
    ours = next(it for it in result.contestants if it.is_ours)
    best = best_peer_ratio(metric, result.contestants)
    title = result.title if len(result.metrics) == 1 else f"{result.title}: {metric.key}"
    cells = [title, _median(ours, metric)]
    if best is None:
        cells += ["", ""]
    else:
        peer = next(it for it in result.contestants if it.label == best.peer)
        cells.append(f"{_median(peer, metric)} ({best.peer})")
        cells.append(f"**{best.median:.2f}** ({best.least:.2f} … {best.greatest:.2f})")
    limit = "" if metric.limit is None else f"≤ {metric.limit:g} {metric.unit}"
    cells.append(limit if metric.at_least is None else f"{metric.at_least:g} {limit}".strip())
    aim = "" if metric.aim is None else f"{metric.aim:g}"
    cells += [aim + f" {metric.unit}" * (metric.at_least is None and bool(aim))]
    cells += [verdict(metric, result.contestants), _of_raw(metric, result.contestants)]
    return f"| {' | '.join(cells)} |"


def _of_raw(metric: Metric, contestants: list[Contestant]) -> str:
    found = raw_ratio(metric, contestants)
    if found is None:
        return ""
    limit = next(it for it in contestants if it.is_limit)
    spread = f"({found.least:.2f} … {found.greatest:.2f})"
    return f"{found.median:.2f} {spread} of {_median(limit, metric)}"


def _processor_time(contestant: Contestant, key: str) -> str:
    """The median, of the whole run or of one request, as the row has it."""
    values = contestant.samples.get(key)
    if not values:
        return ""
    seconds = statistics.median(values)
    return f"{seconds * 1e6:.1f} µs each" if seconds < 1e-3 else f"{seconds:.2f} s"


def _median(contestant: Contestant, metric: Metric) -> str:
    values = contestant.samples.get(metric.key)
    if not values:
        return "failed"
    return f"{number(statistics.median(values))} {metric.unit}"


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def details(results: list[Result]) -> str:
    """Every contestant's medians and the ratio of ours to it, in Markdown."""
    parts = []
    for result in results:
        lines = [f"### {result.title}", ""]
        keys = [metric.key for metric in result.metrics]
        lines.append(f"| server | {' | '.join(f'{key} | ours to it' for key in keys)} |")
        lines[-1] += " server's processor time | client's |"
        lines.append("|---" * (3 + 2 * len(keys)) + "|")
        ours = next(it for it in result.contestants if it.is_ours)
        for contestant in result.contestants:
            lines.append(_details_line(result, ours, contestant))
        parts.append("\n".join(lines + [""] + result.notes))
    return "\n".join(parts)


def _details_line(result: Result, ours: Contestant, contestant: Contestant) -> str:
    cells = [contestant.label]
    for metric in result.metrics:
        ratio = None if contestant.is_ours else ratio_to(metric, ours, contestant)
        cells.append(_median(contestant, metric))
        cells.append("" if ratio is None else f"{ratio.median:.2f}")
    cells += [_processor_time(contestant, key) for key in ("server-cpu", "client-cpu")]
    failure = "" if contestant.failure is None else f" ({contestant.failure.splitlines()[0][:100]})"
    return f"| {' | '.join(cells)}{failure} |"
