"""``nbdfleece restore``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ..errors import UsageError
from .output import print_json
from .progress import progress_option, reporting
from .server_options import timeout_option
from .sizes import parse_size

if TYPE_CHECKING:
    from ..backup import DiskEntry, Point, Restored, Target
    from ..backup.stream import StreamDisk, StreamHead


@click.command()
@click.argument("backup", metavar="DIR[@POINT]|-")
@click.option(
    "--to",
    "target",
    required=True,
    metavar="URI|FILE|DEVICE",
    help="A writable export, a new file, or a block device.",
)
@click.option("--disk", metavar="DISK", help="Which disk, if there are several.")
@click.option(
    "--format",
    "image_format",
    type=click.Choice(["raw", "qcow2"]),
    help="Of a new file. Default: qcow2 if its name ends so, else raw.",
)
@click.option("--overwrite", is_flag=True, help="Replace a file that exists.")
@click.option("--connections", type=click.IntRange(1, 64), default=4, show_default=True)
@click.option("--rate-limit", type=parse_size, default="0", metavar="SIZE", help="Bytes a second.")
@timeout_option
@progress_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def restore(backup: str, target: str, **values: Any) -> None:
    """Write a disk as it was at a restore point (default: the newest), verified on the way.

    With - it is read as a stream from stdin: a full one, and the increments that follow it.
    """
    restored = asyncio.run(_restore(backup, target, values))
    if values["progress"] == "json":
        click.echo(msgspec.json.encode(restored._asdict()))
        return
    if values["as_json"]:
        print_json(restored._asdict())
        return
    click.echo(
        f"{restored.point}: {restored.disk}: wrote {restored.written_bytes} bytes of"
        f" {restored.size}, zeroed {restored.zeroed_bytes}, {restored.skipped_bytes} were zero"
    )


async def _restore(backup: str, text: str, values: dict[str, Any]) -> Restored:
    from ..backup import (
        BackupDirectory,
        RateLimit,
        RestoreOptions,
        split_point,
    )
    from ..backup import restore as restore_disk

    if backup == "-":
        return await _restore_stream(text, values)
    folder, name = split_point(backup)
    directory = BackupDirectory(folder)
    point = directory.newest() if name is None else directory.find(name)
    disk = choose_disk(point, values["disk"])
    target = await _open_target(text, point.disk(disk).size, values)
    with reporting(values["progress"]) as report:
        options = RestoreOptions(limit=RateLimit(values["rate_limit"]), progress=report)
        return await restore_disk(directory, point, disk, target, options=options)


async def _open_target(text: str, size: int, values: dict[str, Any]) -> Target:
    from ..backup import open_target

    return await open_target(
        text,
        size,
        image_format=values["image_format"],
        overwrite=values["overwrite"],
        connections=values["connections"],
        timeout_seconds=values["timeout_seconds"],
    )


async def _restore_stream(text: str, values: dict[str, Any]) -> Restored:
    from ..backup import RateLimit, restore_stream
    from .pull_stream import stdin

    async def choose(head: StreamHead) -> tuple[Target, str]:
        name = _only_one(f"the stream of {head.point!r}", head.disks, values["disk"])
        size = next((disk.size for disk in head.disks if disk.name == name), 0)
        return await _open_target(text, size, values), name

    with reporting(values["progress"]) as report:
        limit = RateLimit(values["rate_limit"])
        return await restore_stream(stdin(), choose, limit=limit, progress=report)


def choose_disk(point: Point, name: str | None) -> str:
    """The disk that was named, or the only one.

    Raises:
        UsageError: There are several.
    """
    if name is not None:
        return point.disk(name).name
    return _only_one(f"restore point {point.name!r}", point.disks, None)


def _only_one(
    what: str, disks: Sequence[DiskEntry] | Sequence[StreamDisk], name: str | None
) -> str:
    """The name that was said, or the only one that there is."""
    if name is None and len(disks) != 1:
        names = ", ".join(disk.name for disk in disks)
        raise UsageError(f"{what} has several disks ({names}): say --disk")
    return name or disks[0].name
