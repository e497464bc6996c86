"""``nbdfleece resize``: another size for the disk in an image."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Final

import click

from .sizes import format_size, parse_size

_NEGATIVE: Final = re.compile(r"-\d", re.ASCII)


class _Command(click.Command):
    """A command to which ``-1G`` is a size, not an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        sizes = [word for word in args if _NEGATIVE.match(word)]
        if sizes and "--" not in args:
            args = [*(word for word in args if word not in sizes), "--", *sizes]
        return super().parse_args(ctx, args)


@click.command(cls=_Command)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("size", metavar="[+|-]SIZE")
@click.option("--shrink", is_flag=True, help="Let it become smaller and lose what is past its end.")
def resize(file: Path, size: str, shrink: bool) -> None:
    """Give the disk in a qcow2 image another size: SIZE bytes, or so many more or fewer.

    What is new reads as zeroes. Bitmaps and checkpoints stay, and what has changed since a
    checkpoint includes all that is new.
    """
    from ..engine.offline import resize_disk

    is_relative = size.startswith(("+", "-"))
    amount = parse_size(size[1:] if is_relative else size)
    if size.startswith("-"):
        amount = -amount
    old, new = asyncio.run(resize_disk(file, amount, is_relative=is_relative, shrink=shrink))
    click.echo(f"{file}: resized from {format_size(old)} to {format_size(new)} ({new} bytes)")
