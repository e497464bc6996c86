"""``nbdfleece check``: whether an image is sound, and repairing it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ..errors import UsageError
from .client import force_share_option
from .exit_status import ExitStatus
from .output import print_json

if TYPE_CHECKING:
    from ..qcow2.check_references import CheckResult

CORRUPT: Final = 2
LEAKED: Final = 3
"""Exit statuses of qemu-img check, besides 0 and 1."""

_ALWAYS: Final = ("check_errors",)
_NUMBERS: Final = (
    "image_end_offset",
    "corruptions",
    "leaks",
    "corruptions_fixed",
    "leaks_fixed",
    "total_clusters",
    "allocated_clusters",
    "fragmented_clusters",
    "compressed_clusters",
)
"""Told in JSON unless they are 0, as by QEMU."""


@click.command(
    epilog="Exit status, as of qemu-img check: 0 sound, 1 the check could not be completed,"
    " 2 corrupt, 3 leaked clusters only."
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--repair",
    "-r",
    type=click.Choice(["leaks", "all"]),
    help="Put leaked clusters right, or all that can be; then check again.",
)
@force_share_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON, as qemu-img check does.")
def check(file: Path, repair: str | None, force_share: bool, as_json: bool) -> int:
    """Check a qcow2 image's refcounts, tables and bitmaps.

    What is found is told on stderr, a line each; the sums on stdout.
    """
    from ..qcow2.check import Repair, check_image

    if repair is not None and force_share:
        raise UsageError("--repair writes: not with --force-share")
    mode = Repair[(repair or "nothing").upper()]
    result = asyncio.run(check_image(file, repair=mode, force_share=force_share))
    for message in result.messages:
        print(message, file=sys.stderr)
    if as_json:
        print_json(_as_json(file, result))
    else:
        _print_sums(result)
    return _status(result)


def _status(result: CheckResult) -> int:
    if result.check_errors:
        return ExitStatus.ERROR
    if result.corruptions:
        return CORRUPT
    return LEAKED if result.leaks else ExitStatus.OK


def _as_json(file: Path, result: CheckResult) -> dict[str, Any]:
    """The members of QEMU's ImageCheck."""
    shown = {"filename": str(file), "format": "qcow2"}
    names = [*_ALWAYS, *(name for name in _NUMBERS if getattr(result, name))]
    return shown | {name.replace("_", "-"): getattr(result, name) for name in names}


def _print_sums(result: CheckResult) -> None:
    fixed = [(result.leaks_fixed, "leaked clusters"), (result.corruptions_fixed, "errors")]
    if text := ", ".join(f"{count} {name}" for count, name in fixed if count):
        click.echo(f"Repaired: {text}.")
    found = [
        (result.corruptions, "errors; data may be corrupted, do not write to the image"),
        (result.leaks, "leaked clusters; disk space is wasted, data are not harmed"),
        (result.check_errors, "errors during the check"),
    ]
    lines = [f"{count} {text}." for count, text in found if count]
    click.echo("\n".join(lines) or "No errors were found.")
    allocated = result.allocated_clusters
    click.echo(
        f"{allocated}/{result.total_clusters} = {_percent(allocated, result.total_clusters)}"
        f" allocated, {_percent(result.fragmented_clusters, allocated)} fragmented,"
        f" {_percent(result.compressed_clusters, allocated)} compressed clusters"
    )
    click.echo(f"Image end offset: {result.image_end_offset}")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole if whole else 0:.2f}%"
