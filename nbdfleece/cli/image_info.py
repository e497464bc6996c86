"""``nbdfleece info FILE``: what an image is."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click

from .output import format_list, print_json, print_table
from .sizes import format_size


def show_image(file: Path, *, force_share: bool, as_json: bool) -> None:
    """Print an image's properties."""
    from ..qcow2.describe import describe_image

    shown = asyncio.run(describe_image(file, force_share=force_share))
    if as_json:
        print_json(shown)
    else:
        _print_image(shown)


def _print_image(shown: dict[str, Any]) -> None:
    data = shown.get("format-specific", {}).get("data", {})
    click.echo(f"{shown['filename']}: {shown['format']}, {format_size(shown['virtual-size'])}")
    rows = [(name, str(value)) for name, value in (shown | data).items() if _is_plain(value)]
    print_table(("PROPERTY", "VALUE"), rows)
    if snapshots := shown.get("snapshots"):
        click.echo()
        print_table(("SNAPSHOT", "ID"), [(each["name"], each["id"]) for each in snapshots])
    bitmaps = [
        (each["name"], format_size(each["granularity"]), format_list(each["flags"]))
        for each in data.get("bitmaps", [])
    ]
    damaged = [
        (each.get("name") or "?", "?", f"damaged: {each['reason']}")
        for each in data.get("damaged-bitmaps", [])
    ]
    if bitmaps or damaged:
        click.echo()
        print_table(("BITMAP", "GRANULARITY", "FLAGS"), bitmaps + damaged)


def _is_plain(value: Any) -> bool:
    return not isinstance(value, dict | list)
