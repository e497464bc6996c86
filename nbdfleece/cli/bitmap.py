"""``nbdfleece bitmap``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import UsageError
from .client import client_options, execute, force_share_option
from .image_bitmap import list_images, register_commands
from .output import format_list, print_json, print_table
from .sizes import format_size

_FLAGS = ("recording", "busy", "persistent", "inconsistent")


@click.group(no_args_is_help=False)
def bitmap() -> None:
    """Dirty bitmaps of disks."""


register_commands(bitmap)


@bitmap.command("list")
@click.argument("disk", required=False)
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Ask no server, look into this image; may be repeated.",
)
@force_share_option
@client_options
def list_bitmaps(
    disk: str | None,
    images: tuple[Path, ...],
    force_share: bool,
    control: Path | None,
    as_json: bool,
) -> None:
    """List the bitmaps of one disk of a server, or of all, or those of images."""
    if images:
        if disk is not None:
            raise UsageError("DISK is a server's: not with --image")
        list_images(images, force_share=force_share, as_json=as_json)
        return
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
