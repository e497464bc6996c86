"""``nbdfleece map``: where data, zeroes, holes and changes lie in an export."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .client import force_share_option
from .server_options import timeout_option

if TYPE_CHECKING:
    from ..extents import Extents

_ROWS_MAX = 24
_PICTURES = ("blocks", "svg", "png")


@click.command("map")
@click.argument("uri", metavar="URI|FILE")
@click.option(
    "--context",
    metavar="NAME",
    help="The metadata context, as qemu:allocation-depth. Default: base:allocation.",
)
@click.option(
    "--changes", metavar="BITMAP", help="What a dirty bitmap calls dirty, and what of it is zero."
)
@click.option("--totals", is_flag=True, help="Only how many bytes there are of each kind.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--blocks", is_flag=True, help="Draw it on the terminal.")
@click.option("--svg", type=click.Path(path_type=Path), metavar="FILE", help="Draw it as SVG.")
@click.option("--png", type=click.Path(path_type=Path), metavar="FILE", help="Draw it as PNG.")
@timeout_option
@force_share_option
def map_export(uri: str, force_share: bool, **values: Any) -> None:
    """Print what an export's metadata contexts say, as nbdinfo --map does, or draw it.

    Of an image FILE print what qemu-img map does, with --json as its --output=json. A name that
    begins with nbd and a colon or plus sign is a URI; put ./ before a file of such a name.
    """
    if not uri.startswith(("nbd:", "nbd+", "nbds:", "nbds+")):
        from .image_map import print_image_map

        if any(values[name] for name in ("context", "changes", "totals", *_PICTURES)):
            raise UsageError(f"'{uri}' is a file: only --json and --force-share are for files")
        print_image_map(uri, force_share=force_share, as_json=values["as_json"])
        return
    is_picture = any(values[name] for name in _PICTURES)
    if values["context"] is not None and (values["changes"] is not None or is_picture):
        raise UsageError("--context prints one context as it is: not with --changes or a picture")
    if (values["totals"] or values["as_json"]) and is_picture:
        raise UsageError("--totals and --json print text: not with a picture")
    if is_picture:
        _draw(uri, values)
    else:
        _print(uri, values)


def _draw(uri: str, values: dict[str, Any]) -> None:
    from ..backup import picture

    merged = asyncio.run(_merged(uri, values))
    if values["blocks"]:
        columns = max(16, shutil.get_terminal_size().columns - 1)
        click.echo(picture.draw_blocks(merged, columns, _ROWS_MAX), nl=False)
    if values["svg"] is not None:
        values["svg"].write_text(picture.draw_svg(merged, uri), encoding="utf-8")
    if values["png"] is not None:
        values["png"].write_bytes(picture.draw_png(merged, uri))


def _print(uri: str, values: dict[str, Any]) -> None:
    from ..backup import map as maps

    if values["changes"] is not None:
        name, extents = maps.MERGED, asyncio.run(_merged(uri, values))
    else:
        name = values["context"] or "base:allocation"
        timeout = values["timeout_seconds"]
        extents = asyncio.run(maps.read_contexts(uri, [name], timeout_seconds=timeout))[name]
    print_extents = maps.format_totals if values["totals"] else maps.format_map
    click.echo(print_extents(name, extents, as_json=values["as_json"]), nl=False)


async def _merged(uri: str, values: dict[str, Any]) -> Extents:
    """Dirty and zero in one; without a bitmap nothing is dirty."""
    from ..backup.block_status import ALLOCATION, DIRTY_PREFIX, merge
    from ..backup.map import read_contexts
    from ..extents import Extents

    changes, timeout = values["changes"], values["timeout_seconds"]
    if changes is None:
        found = await read_contexts(uri, [ALLOCATION], timeout_seconds=timeout)
        size = found[ALLOCATION].total()
        return merge(found[ALLOCATION], Extents.from_pairs([(size, 0)] if size else []))
    bitmap = changes if changes.startswith(DIRTY_PREFIX) else DIRTY_PREFIX + changes
    found = await read_contexts(uri, [ALLOCATION, bitmap], timeout_seconds=timeout)
    return merge(found[ALLOCATION], found[bitmap])
