"""A run of rows, which may be split: what a row gave is written at once, and not measured again.

Everything in a folder that a run goes on with was made alike: the same nbdfleece, options and
contestants. Without ``resume`` a row replaces what the folder has of it.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from .measure import Contestant, Result, Sample, run_rounds
from .picture import ratios_picture
from .report import details, read_json, replace_text, table, write_json
from .rows import Row
from .servers import Server
from .version import check_same, ours

CHECKS_AT_ONCE = 2
"""Nothing is timed then: half of a check is hashing, which needs no more than one processor."""


def run_rows(
    rows: list[Row],
    servers: list[Server],
    folder: Path,
    options: dict[str, Any],
    *,
    check: bool,
    resume: bool,
    minutes: float | None,
) -> bool:
    """Measure rows and write the folder's files after each.

    Args:
        options: ``rounds`` and what else the figures depend on.
        check: Look at the content first.
        resume: Leave out what the folder has already.
        minutes: After so many no further row begins.

    Returns:
        Whether all rows were measured.

    Raises:
        OtherRun: To be gone on with, but made otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = {"ours": ours(), **options, "contestants": [server.label for server in servers]}
    done = _done(folder, made) if resume else set()
    deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    missing = [row for row in rows if row.name not in done]
    for number, row in enumerate(missing):
        if time.monotonic() > deadline:
            names = " ".join(it.name for it in missing[number:])
            print(f"bench: not measured yet: {names}; go on with --resume {folder}")
            return False
        result = run_row(row, servers, options["rounds"], check=check)
        write_json(folder / "results.json", [result], made)
        write_report(folder)
        print(table([result]), flush=True)
    return True


def _done(folder: Path, made: dict[str, Any]) -> set[str]:
    """The names of the rows that a folder has, all of which must have been made alike."""
    path = folder / "results.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for row in rows:
        for key, value in made.items():
            check_same(path, f"row {row['name']}: {key}", row["options"].get(key), value)
    return {row["name"] for row in rows}


def run_row(row: Row, servers: list[Server], rounds: int, *, check: bool) -> Result:
    """Measure one row with every server that can take part."""
    print(f"== {row.name}: {row.title}", flush=True)
    begin = time.monotonic()
    setup = row.setup()
    contestants: list[tuple[Contestant, Sample]] = [
        (
            Contestant(server.label, server.is_ours, server.counts, is_limit=server.is_limit),
            partial(row.sample, server),
        )
        for server in servers
        if server.can(setup)
    ]
    if check:
        able = [server for server in servers if server.can(setup)]
        with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:
            failures = pool.map(partial(_check, row), able)
        for (contestant, _), failure in zip(contestants, failures, strict=True):
            contestant.failure = failure
    checked = time.monotonic()
    run_rounds(contestants, rounds, partial(print, flush=True))
    row.place.copies.clear()
    spent = f"{checked - begin:.0f} s of images and checks, {time.monotonic() - checked:.0f} s"
    print(f"  {spent} of rounds", flush=True)
    return Result(row.name, row.title, row.metrics, [it for it, _ in contestants], row.notes)


def _check(row: Row, server: Server) -> str | None:
    """What is wrong with a server's data."""
    try:
        row.check(server)
    except Exception as error:
        failure = f"check: {type(error).__name__}: {error}"[:600]
        print(f"  {server.label}: {failure}", file=sys.stderr)
        return failure
    return None


def write_report(folder: Path) -> None:
    """Write the table, the details and the picture of all results in a folder."""
    results = read_json(folder / "results.json")
    rows = json.loads((folder / "results.json").read_text())["rows"]
    text = f"{_about(rows)}\n\n{table(results)}\n{details(results)}"
    replace_text(folder / "table.md", text)
    replace_text(folder / "ratios.svg", ratios_picture(results))


def _about(rows: list[dict[str, Any]]) -> str:
    """On what was measured what: rows that were not made like the last one are named."""
    last = rows[-1]
    machine, made = last["machine"], last["options"]
    lines = [f"Measured on {machine['cpus']} x {machine['cpu']}, Linux {machine['kernel']}."]
    lines.append(f"nbdfleece {made.get('ours', '?')}, {made['rounds']} rounds.")
    others = [row["name"] for row in rows if row["options"] != made]
    if others:
        lines.append(f"Made with another nbdfleece or other options: {', '.join(others)}.")
    return " ".join(lines)
