"""``nbdfleece bitmap`` on images that no server has open."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .output import format_list, print_json, print_table
from .sizes import format_size, parse_size

if TYPE_CHECKING:
    from ..engine.offline import Listed

GRANULARITY_MAX = 1 << 31

_name = click.argument("name")
_files = click.argument(
    "files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path)
)


def register_commands(group: click.Group) -> None:
    """Add the commands that change images to ``nbdfleece bitmap``."""
    for command in (add, remove, clear, enable, disable, merge, repair, settle):
        group.add_command(command)


@click.command()
@_name
@_files
@click.option("--granularity", "-g", metavar="SIZE", help="Bytes per bit, 512 to 2G.")
@click.option("--disabled", is_flag=True, help="Let it not record changes yet.")
def add(name: str, files: tuple[Path, ...], granularity: str | None, disabled: bool) -> None:
    """Add a bitmap to images: to all of them, or to none."""
    size = 0
    if granularity is not None:
        size = parse_size(granularity)
        if not 512 <= size <= GRANULARITY_MAX or size & (size - 1):
            raise UsageError(f"the granularity is a power of two from 512 to 2G, not {granularity}")
    _change(files, "add", name, granularity=size, recording=not disabled)


@click.command()
@_name
@_files
def remove(name: str, files: tuple[Path, ...]) -> None:
    """Remove a bitmap from images, also one that is damaged or inconsistent."""
    _change(files, "remove", name)


def _simple(operation: str, text: str) -> click.Command:
    """A command that needs a name and images only."""

    def run(name: str, files: tuple[Path, ...]) -> None:
        _change(files, operation, name)

    decorated: Callable[..., None] = _name(_files(run))
    return click.command(operation, help=text)(decorated)


clear = _simple("clear", "Let a bitmap of images mark nothing.")
enable = _simple("enable", "Let a bitmap of images record changes.")
disable = _simple("disable", "Let a bitmap of images record changes no more.")


@click.command()
@_name
@_files
@click.option(
    "--source",
    "sources",
    multiple=True,
    required=True,
    metavar="BITMAP",
    help="What to merge into it, of the same image; may be repeated.",
)
def merge(name: str, files: tuple[Path, ...], sources: tuple[str, ...]) -> None:
    """Let a bitmap of images also mark what others mark."""
    _change(files, "merge", name, sources=sources)


@click.command()
@_files
def repair(files: tuple[Path, ...]) -> None:
    """Drop what is damaged from images' bitmap directories, and keep what is good.

    Clusters of what was dropped are leaked: 'nbdfleece check --repair leaks' frees them.
    """
    from ..engine.offline import repair_bitmaps

    reports = asyncio.run(repair_bitmaps(files))
    for path, report in zip(files, reports, strict=True):
        for each in report.dropped:
            click.echo(f"{path}: dropped bitmap '{each.name or '?'}': {each.reason}")


@click.command()
@_files
@click.option("--forget", is_flag=True, help="Leave every image as it is, done or not.")
def settle(files: tuple[Path, ...], forget: bool) -> None:
    """Finish or take back a change of several images that was interrupted."""
    from ..engine.offline import settle_images

    asyncio.run(settle_images(files, forget=forget))


def _change(files: Sequence[Path], operation: str, name: str, **details: Any) -> None:
    from ..engine.chain import PendingChange
    from ..engine.offline import change_bitmaps

    change = PendingChange(operation=operation, bitmap=name, **details)
    asyncio.run(change_bitmaps(files, change))


def list_images(images: Sequence[Path], *, force_share: bool, as_json: bool) -> None:
    """Print the bitmaps of images, good and damaged ones."""
    from ..engine.offline import list_bitmaps

    found = [
        (path, each)
        for path in images
        for each in asyncio.run(list_bitmaps(path, force_share=force_share))
    ]
    if as_json:
        print_json([_as_json(path, each) for path, each in found])
    else:
        headings = ("IMAGE", "BITMAP", "GRANULARITY", "DIRTY", "FLAGS", "PROBLEM")
        print_table(headings, [_row(path, each) for path, each in found])


def _as_json(path: Path, found: Listed) -> dict[str, Any]:
    return {
        "image": str(path),
        "name": found.name,
        "granularity": found.granularity,
        "count": found.dirty_bytes,
        "recording": found.recording,
        "inconsistent": found.inconsistent,
        "checkpoint": found.checkpoint,
        "damage": found.damage,
    }


def _row(path: Path, found: Listed) -> tuple[str, ...]:
    flags = {
        "recording": found.recording,
        "inconsistent": found.inconsistent,
        f"checkpoint {found.checkpoint}": found.checkpoint is not None,
    }
    return (
        str(path),
        found.name or "?",
        format_size(found.granularity),
        format_size(found.dirty_bytes),
        format_list([name for name, is_set in flags.items() if is_set]),
        found.damage or "",
    )
