"""How far something is: bars on a terminal, lines of JSON for programs, nothing on a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import click
import msgspec

if TYPE_CHECKING:
    from ..backup.transfer import Progress, ReportProgress

progress_option = click.option(
    "--progress",
    type=click.Choice(["auto", "json", "none"]),
    default="auto",
    show_default=True,
    help="Bars on a terminal and nothing elsewhere; one JSON object per line; nothing.",
)

_LINE_SECONDS: Final = 0.5
"""Between two lines of JSON about one disk."""


@contextmanager
def reporting(kind: str, *, to_stderr: bool = False) -> Iterator[ReportProgress | None]:
    """A function that shows progress, as ``--progress`` wishes.

    Args:
        kind: What it wishes.
        to_stderr: Stdout is for something else.
    """
    if kind == "json":
        yield _json_reporter(to_stderr)
    elif kind == "auto" and sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield None


def _json_reporter(to_stderr: bool) -> Callable[[Progress], None]:
    begun = time.monotonic()
    shown: dict[str, float] = {}

    def report(progress: Progress) -> None:
        now = time.monotonic()
        is_last = progress.done >= progress.total
        if now - shown.get(progress.disk, -_LINE_SECONDS) < _LINE_SECONDS and not is_last:
            return
        shown[progress.disk] = now
        line = {
            "transferred": progress.done,
            "size": progress.total,
            "elapsed": round(now - begun, 3),
            "description": progress.disk,
        }
        click.echo(msgspec.json.encode(line), err=to_stderr)

    return report


@contextmanager
def _bars() -> Iterator[Callable[[Progress], None]]:
    """One bar for each disk, with rate and remaining time, on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def report(progress: Progress) -> None:
            if progress.disk not in tasks:
                tasks[progress.disk] = bars.add_task(progress.disk)
            bars.update(tasks[progress.disk], completed=progress.done, total=progress.total)

        yield report
