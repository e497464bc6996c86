"""``nbdfleece map``: where data, zeroes, holes and changes lie in an export."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import UsageError
from .client import force_share_option

if TYPE_CHECKING:
    from ..extents import Extents

_ROWS_MAX = 24


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
@force_share_option
def map_export(
    uri: str,
    context: str | None,
    changes: str | None,
    totals: bool,
    as_json: bool,
    blocks: bool,
    svg: Path | None,
    force_share: bool,
) -> None:
    """Print what an export's metadata contexts say, as nbdinfo --map does, or draw it.

    Of an image FILE print what qemu-img map does, with --json as its --output=json. A name that
    begins with nbd and a colon or plus sign is a URI; put ./ before a file of such a name.
    """
    if not uri.startswith(("nbd:", "nbd+", "nbds:", "nbds+")):
        from .image_map import print_image_map

        if any((context, changes, totals, blocks, svg)):
            raise UsageError(f"'{uri}' is a file: only --json and --force-share are for files")
        print_image_map(uri, force_share=force_share, as_json=as_json)
        return
    if context is not None and (changes is not None or blocks or svg is not None):
        raise UsageError("--context prints one context as it is: not with --changes or a picture")
    if (totals or as_json) and (blocks or svg is not None):
        raise UsageError("--totals and --json print text: not with a picture")
    from ..backup import map as maps
    from ..backup import picture

    if blocks or svg is not None:
        merged = asyncio.run(_merged(uri, changes))
        if blocks:
            columns = max(16, shutil.get_terminal_size().columns - 1)
            click.echo(picture.draw_blocks(merged, columns, _ROWS_MAX), nl=False)
        if svg is not None:
            svg.write_text(picture.draw_svg(merged, uri), encoding="utf-8")
        return
    if changes is not None:
        name, extents = maps.MERGED, asyncio.run(_merged(uri, changes))
    else:
        name = context or "base:allocation"
        extents = asyncio.run(maps.read_contexts(uri, [name]))[name]
    print_extents = maps.format_totals if totals else maps.format_map
    click.echo(print_extents(name, extents, as_json=as_json), nl=False)


async def _merged(uri: str, changes: str | None) -> Extents:
    """Dirty and zero in one; without a bitmap nothing is dirty."""
    from ..backup.block_status import ALLOCATION, DIRTY_PREFIX, merge
    from ..backup.map import read_contexts
    from ..extents import Extents

    if changes is None:
        allocation = (await read_contexts(uri, [ALLOCATION]))[ALLOCATION]
        clean = Extents.from_pairs([(allocation.total(), 0)] if allocation.total() else [])
        return merge(allocation, clean)
    bitmap = changes if changes.startswith(DIRTY_PREFIX) else DIRTY_PREFIX + changes
    found = await read_contexts(uri, [ALLOCATION, bitmap])
    return merge(found[ALLOCATION], found[bitmap])
