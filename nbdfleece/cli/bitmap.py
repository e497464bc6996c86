"""``nbdfleece bitmap``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .client import client_options, execute
from .output import format_list, print_json, print_table
from .sizes import format_size

_FLAGS = ("recording", "busy", "persistent", "inconsistent")


@click.group(no_args_is_help=False)
def bitmap() -> None:
    """Dirty bitmaps of disks."""


@bitmap.command("list")
@click.argument("disk", required=False)
@client_options
def list_bitmaps(disk: str | None, control: Path | None, as_json: bool) -> None:
    """List the bitmaps of one disk, or of all."""
    found = execute(control, "query-bitmaps", {"disk": disk})
    if as_json:
        print_json(found)
    else:
        print_table(("DISK", "BITMAP", "GRANULARITY", "DIRTY", "FLAGS"), [_row(b) for b in found])


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    return (
        found["disk"],
        found["name"],
        format_size(found["granularity"]),
        format_size(found["count"]),
        format_list([flag for flag in _FLAGS if found[flag]]),
    )
