"""``nbdfleece list``, ``show``, ``verify`` and ``prune``: restore points of a backup directory."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .exit_status import ExitStatus
from .output import print_json, print_table
from .progress import progress_option, reporting
from .pull import summary
from .server_options import timeout_option
from .sizes import format_size

if TYPE_CHECKING:
    from ..backup import BackupDirectory, Difference, Point, Verified

_folder = click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_RANGES_SHOWN_MAX = 10


@click.command("list")
@_folder
@_as_json
def list_points(folder: Path, as_json: bool) -> None:
    """List the restore points of a backup directory, oldest first."""
    from ..backup import BackupDirectory

    directory = BackupDirectory(folder)
    points = directory.points()
    if as_json:
        print_json([summary(point) for point in points])
        return
    rows = [
        (
            point.name,
            point.started.astimezone().isoformat(" ", "seconds"),
            point.parent or "-",
            point.checkpoint or "-",
            format_size(point.size),
            format_size(sum(disk.changed_bytes() for disk in point.disks)),
            format_size(sum(disk.file_size for disk in point.disks)),
        )
        for point in points
    ]
    print_table(("POINT", "CREATED", "PARENT", "CHECKPOINT", "SIZE", "CHANGED", "FILES"), rows)
    for name in directory.cut_pulls():
        click.echo(f"{name}: incomplete: its pull is under way or was cut")


@click.command()
@click.argument("backup", metavar="DIR[@POINT]")
@_as_json
def show(backup: str, as_json: bool) -> None:
    """Show a restore point (default: the newest): its disks, and what each file adds."""
    directory, point = find_point(backup)
    if as_json:
        print_json(summary(point))
        return
    click.echo(f"restore point {point.name}, made by {point.tool}")
    click.echo(f"begun {point.started.isoformat()}, complete {point.finished.isoformat()}")
    click.echo(f"parent {point.parent or '-'}, checkpoint {point.checkpoint or '-'}")
    rows = [
        (
            disk.name,
            disk.kind + (f" ({disk.reason})" if disk.reason else ""),
            format_size(disk.size),
            format_size(disk.changed_bytes()),
            format_size(disk.data_bytes()),
            " <- ".join(entry.file for _, entry in directory.chain(point, disk.name)),
        )
        for disk in point.disks
    ]
    print_table(("DISK", "KIND", "SIZE", "CHANGED", "DATA", "CHAIN"), rows)


def find_point(backup: str) -> tuple[BackupDirectory, Point]:
    """The restore point that ``DIR[@POINT]`` means."""
    from ..backup import BackupDirectory, split_point

    folder, name = split_point(backup)
    directory = BackupDirectory(folder)
    return directory, directory.newest() if name is None else directory.find(name)


@click.command()
@click.argument("backup", metavar="DIR[@POINT]")
@click.option("--against", metavar="URI", help="Compare with an export instead, byte by byte.")
@click.option("--disk", metavar="DISK", help="With --against: which disk, if there are several.")
@timeout_option
@progress_option
@_as_json
def verify(backup: str, **values: Any) -> ExitStatus:
    """Check that chains are complete and every checksum is right, without restoring.

    All restore points are checked, or the named one and what it stands on. The exit status is 3
    if something is wrong.
    """
    if values["against"] is not None:
        return asyncio.run(_compare(backup, values))
    if values["disk"] is not None:
        raise UsageError("--disk goes with --against")
    return asyncio.run(_verify(backup, values))


async def _verify(backup: str, values: dict[str, Any]) -> ExitStatus:
    from ..backup import BackupDirectory, split_point
    from ..backup import verify as verify_points

    folder, name = split_point(backup)
    directory = BackupDirectory(folder)
    with reporting(values["progress"]) as report:
        names = None if name is None else [directory.find(name).name]
        found = await verify_points(directory, names, progress=report)
    _print_verified(found, values["as_json"])
    return ExitStatus.DIFFERS if found.problems else ExitStatus.OK


def _print_verified(found: Verified, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    for problem in found.problems:
        click.echo(problem)
    click.echo(
        f"{len(found.points)} restore points, {found.files} files, {found.blocks} blocks:"
        f" {len(found.problems) or 'no'} problem{'' if len(found.problems) == 1 else 's'}"
    )


async def _compare(backup: str, values: dict[str, Any]) -> ExitStatus:
    from ..backup import compare
    from .restore import choose_disk

    directory, point = find_point(backup)
    disk = choose_disk(point, values["disk"])
    with reporting(values["progress"]) as report:
        found = await compare(
            directory,
            point,
            disk,
            values["against"],
            timeout_seconds=values["timeout_seconds"],
            progress=report,
        )
    _print_difference(found, point, values["as_json"])
    return ExitStatus.DIFFERS if found.bytes_different else ExitStatus.OK


def _print_difference(found: Difference, point: Point, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    if not found.bytes_different:
        click.echo(f"{point.name}: {found.disk}: identical, {found.bytes_compared} bytes compared")
        return
    for offset, length in found.ranges[:_RANGES_SHOWN_MAX]:
        click.echo(f"{point.name}: {found.disk}: differs between {offset} and {offset + length}")
    click.echo(f"{point.name}: {found.disk}: {found.bytes_different} bytes in clusters that differ")


@click.command()
@_folder
@click.option("--keep", type=click.IntRange(1), metavar="N", help="Keep the newest N.")
@click.option("--point", "names", multiple=True, metavar="NAME", help="Remove this one.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed.")
@_as_json
def prune(
    folder: Path, keep: int | None, names: tuple[str, ...], dry_run: bool, as_json: bool
) -> None:
    """Remove restore points, merging each into those that build on it."""
    if (keep is None) == (not names):
        raise UsageError("say what to remove: --keep N or --point NAME")
    from ..backup import BackupDirectory, surplus
    from ..backup import prune as prune_points

    directory = BackupDirectory(folder)
    doomed = list(names) if keep is None else surplus(directory, keep)
    if not dry_run:
        asyncio.run(prune_points(directory, doomed))
    if as_json:
        print_json({"removed": doomed, "dry-run": dry_run})
        return
    for name in doomed:
        click.echo(f"{name}: {'would be removed' if dry_run else 'removed'}")
