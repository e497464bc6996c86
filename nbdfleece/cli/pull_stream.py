"""``nbdfleece pull --to -`` and ``nbdfleece import``: restore points through a pipe."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click
import msgspec

from ..errors import UsageError
from .exit_status import ExitStatus
from .output import print_json
from .progress import progress_option, reporting

if TYPE_CHECKING:
    from ..backup import Point, Streamed, StreamRequest


def pull_to_stream(uris: Sequence[str], values: dict[str, Any]) -> ExitStatus:
    """Pull into a stream on stdout; what was done is told on stderr.

    Args:
        uris: The command's arguments; none for our own server.
        values: Its options.

    Raises:
        UsageError: An option cannot be meant for a stream.
    """
    for name in ("resume", "restart", "keep", "dry_run"):
        if values[name]:
            raise UsageError(f"--{name.replace('_', '-')} is not for streams: nothing is kept")
    if values["auto"]:
        raise UsageError("--auto needs a backup directory; of a stream say --since or --full")
    if sys.stdout.isatty():
        raise UsageError("the stream is not for a terminal: redirect stdout")
    if not uris:
        return _pull_from_server(values)
    if values["disks"]:
        raise UsageError("--disk is for pulling from our own server, without URIs")
    return _write_stream(_requests(uris, values), values)


def _requests(uris: Sequence[str], values: dict[str, Any]) -> list[StreamRequest]:
    from ..backup import StreamRequest
    from .pull import parse_bitmaps, parse_disks

    disks = parse_disks(uris)
    since = values["since"]
    bitmaps = parse_bitmaps(values["bitmaps"], disks)
    return [
        StreamRequest(
            name=disk.name,
            uri=disk.uri,
            bitmap=None if since is None else _context(bitmaps.get(disk.name, since)),
            parent=since,
        )
        for disk in disks
    ]


def _context(bitmap: str) -> str:
    from ..backup.block_status import DIRTY_PREFIX

    return bitmap if bitmap.startswith(DIRTY_PREFIX) else DIRTY_PREFIX + bitmap


def _write_stream(
    requests: Sequence[StreamRequest], values: dict[str, Any], created: float | None = None
) -> ExitStatus:
    """Pull, and tell what was done.

    Args:
        requests: The disks.
        values: The command's options.
        created: When the server made the checkpoint, if known.
    """
    from ..backup import pull_stream
    from .pull import make_options, point_name

    name = point_name(values)
    stdout = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    with stdout as file, reporting(values["progress"], to_stderr=True) as report:
        streamed = asyncio.run(
            pull_stream(
                requests,
                file,
                point=name,
                checkpoint=values["checkpoint"],
                checkpoint_created=created,
                options=make_options(values, report),
            )
        )
    _tell(name, streamed, as_json=values["as_json"] or values["progress"] == "json")
    is_other = any(disk.reason for disk in streamed)
    return ExitStatus.FULL_INSTEAD if is_other else ExitStatus.OK


def _tell(point: str, streamed: Sequence[Streamed], *, as_json: bool) -> None:
    if as_json:
        click.echo(
            msgspec.json.encode({"name": point, "disks": [each._asdict() for each in streamed]}),
            err=True,
        )
        return
    for disk in streamed:
        base = "full" if disk.parent is None else f"since {disk.parent}"
        why = f": {disk.reason}" if disk.reason else ""
        click.echo(
            f"{point}: {disk.disk}: {base}{why}: read {disk.read_bytes} bytes of {disk.size}",
            err=True,
        )


def _pull_from_server(values: dict[str, Any]) -> ExitStatus:
    """Begin a backup on our own server, pull it, and commit it; abort it on failure."""
    from .client import connect
    from .pull import point_name

    name = point_name(values)
    values = {**values, "point": name, "checkpoint": values["checkpoint"] or name}
    arguments = {
        "name": name,
        "disks": list(values["disks"]) or None,
        "checkpoint": values["checkpoint"],
        "since": values["since"],
    }
    with connect(values["control"]) as client:
        begun = client.execute("backup-begin", arguments)
        try:
            made = client.execute("query-checkpoints")
            created = {each["name"]: each["created"] for each in made}
            since = values["since"]
            requests = [_server_request(disk, since, created.get(since)) for disk in begun["disks"]]
            status = _write_stream(requests, values, created[begun["checkpoint"]])
        except BaseException:
            client.execute("backup-abort", {"name": name})
            raise
        client.execute("backup-commit", {"name": name})
    return status


def _server_request(disk: Any, since: str | None, created: float | None) -> StreamRequest:
    """What to pull of one disk.

    Args:
        disk: What the server has begun.
        since: The checkpoint that was asked for.
        created: When the server made it.
    """
    from ..backup import StreamRequest

    return StreamRequest(
        name=disk["disk"],
        uri=disk["uris"][0],
        bitmap=disk["context"],
        parent=None if disk["context"] is None else since,
        parent_created=created,
        reason=disk["reason"],
    )


@click.command("import")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), metavar="DIR")
@click.option(
    "--compress",
    type=click.Choice(["zlib", "zstd"]),
    help="Compress each cluster that becomes smaller.",
)
@progress_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def import_streams(folder: Path, **values: Any) -> None:
    """Make restore points of the streams on stdin, as pull --to - writes them.

    Several may follow one another. An increment needs the restore point that it builds on in
    the directory. A stream that was cut or is damaged leaves nothing.
    """
    from ..backup import BackupDirectory, import_stream

    with reporting(values["progress"]) as report:
        points = asyncio.run(
            import_stream(
                BackupDirectory(folder), stdin(), compression=values["compress"], progress=report
            )
        )
    _print_points(points, values["as_json"] or values["progress"] == "json")


def _print_points(points: Sequence[Point], as_json: bool) -> None:
    from .pull import print_point, summary

    if as_json:
        print_json([summary(point) for point in points])
        return
    for point in points:
        print_point(point, as_json=False)


def stdin() -> BinaryIO:
    """The standard input, for bytes.

    Raises:
        UsageError: It is a terminal.
    """
    if sys.stdin.isatty():
        raise UsageError("a stream is not typed: redirect stdin")
    return sys.stdin.buffer
