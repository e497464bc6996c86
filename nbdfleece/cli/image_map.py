"""``nbdfleece map FILE``: where an image's data lie, in the form of ``qemu-img map``."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import click
import msgspec

if TYPE_CHECKING:
    from ..qcow2.describe import MapEntry


def print_image_map(path: str, *, force_share: bool, as_json: bool) -> None:
    """Print an image's map, each range as soon as it is known."""
    asyncio.run(_print(path, force_share, as_json))


async def _print(path: str, force_share: bool, as_json: bool) -> None:
    from ..qcow2.describe import map_image

    separator = "["
    header = f"{'START':>18} {'LENGTH':>18} {'MAPPED TO':>18} {'DEPTH':>5} KIND\n"
    async for entry in map_image(path, force_share=force_share):
        if as_json:
            click.echo(separator + msgspec.json.encode(_as_json(entry)).decode(), nl=False)
            separator = ",\n"
        else:
            click.echo(header + _as_line(entry))
            header = ""
    if as_json:
        click.echo("[]" if separator == "[" else "]")
    else:
        click.echo(header, nl=False)


def _as_json(entry: MapEntry) -> dict[str, Any]:
    """The members of QEMU's MapEntry; ``compressed`` is told since QEMU 8.2."""
    shown = {
        "start": entry.start,
        "length": entry.length,
        "depth": entry.depth,
        "present": entry.present,
        "zero": entry.zero,
        "data": entry.data,
        "compressed": entry.compressed,
    }
    return shown if entry.offset is None else shown | {"offset": entry.offset}


def _as_line(entry: MapEntry) -> str:
    place = "-" if entry.offset is None else f"{entry.offset:#x}"
    kind = "zero" if entry.zero else "compressed" if entry.compressed else "data"
    kind += "" if entry.present else ", unallocated"
    return f"{entry.start:#18x} {entry.length:#18x} {place:>18} {entry.depth:>5} {kind}"
