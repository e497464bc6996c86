"""``nbdfleece pull``: from any NBD server, or from one of ours in one go."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from ..errors import UsageError
from .addresses import CONTROL_VARIABLE
from .exit_status import ExitStatus
from .output import print_json
from .progress import progress_option, reporting
from .server_options import timeout_option
from .sizes import parse_size

if TYPE_CHECKING:
    from ..backup import BackupDirectory, DiskRequest, DiskUri, Estimate, Point, PullOptions

_NAMED: Final = re.compile(r"([^=/:?]+)=(nbd.*)", re.DOTALL)
_DEFAULT_NAME: Final = "disk"


@click.command()
@click.argument("uris", nargs=-1, metavar="[[NAME=]URI]...")
@click.option(
    "--to",
    "folder",
    required=True,
    type=click.Path(path_type=Path, file_okay=False, allow_dash=True),
    metavar="DIR|-",
    help="The backup directory; - for a stream on stdout, which import and restore read.",
)
@click.option(
    "--point", metavar="NAME", help="The restore point's name. Default: the checkpoint's."
)
@click.option(
    "--checkpoint",
    metavar="NAME",
    help="The server's checkpoint of this instant, for the next increment; our own server makes"
    " it. Default with our own server: the restore point's name.",
)
@click.option(
    "--since",
    metavar="POINT",
    help="Only what changed since that restore point (or its checkpoint; with --to - only that).",
)
@click.option("--full", is_flag=True, help="Everything.")
@click.option("--auto", is_flag=True, help="As little as server and backup allow (the default).")
@click.option(
    "--bitmap",
    "bitmaps",
    multiple=True,
    metavar="[DISK=]NAME",
    help="With --since: the dirty bitmap, if it is not called as the checkpoint.",
)
@click.option("--resume", is_flag=True, help="Go on with a cut pull: the view is still the same.")
@click.option("--restart", is_flag=True, help="Throw a cut pull away.")
@click.option("--connections", type=click.IntRange(1, 64), default=4, show_default=True)
@click.option("--rate-limit", type=parse_size, default="0", metavar="SIZE", help="Bytes a second.")
@click.option(
    "--rate-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A file with the rate limit in it, looked at every second while pulling.",
)
@click.option(
    "--save-every",
    type=click.FloatRange(min=0, min_open=True),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="How often what is done is made durable: what a cut pull does again at most.",
)
@click.option(
    "--compress",
    type=click.Choice(["zlib", "zstd"]),
    help="Compress each cluster that becomes smaller.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be read, and read nothing.")
@click.option("--disk", "disks", multiple=True, metavar="DISK", help="Which of our server's disks.")
@click.option(
    "--control",
    type=click.Path(path_type=Path),
    envvar=CONTROL_VARIABLE,
    show_envvar=True,
    metavar="PATH",
    help="Our server's control socket.",
)
@click.option(
    "--keep",
    is_flag=True,
    help="If pulling from our server fails, keep its snapshot, so that the same command goes on.",
)
@timeout_option
@progress_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def pull(uris: tuple[str, ...], folder: Path, **values: Any) -> ExitStatus:
    """Pull disks into a new restore point of a backup directory.

    With URIs, from any NBD server; the exports must hold still and show the same instant. With
    none, from an nbdfleece server over its control socket: a snapshot is begun, pulled and
    committed, or aborted if pulling fails.

    The exit status is 4 if a disk was pulled in full although an increment was asked for, and
    75 if the pull was cut and can go on. A stream that was cut has to be made again.
    """
    _check_mode(values)
    if str(folder) == "-":
        from .pull_stream import pull_to_stream

        return pull_to_stream(uris, values)
    from ..backup import BackupDirectory

    directory = BackupDirectory(folder)
    if not uris:
        from .server_pull import pull_from_server

        return pull_from_server(directory, values)
    if values["disks"] or values["keep"]:
        raise UsageError("--disk and --keep are for pulling from our own server, without URIs")
    return asyncio.run(_pull_uris(directory, parse_disks(uris), values))


def _check_mode(values: dict[str, Any]) -> None:
    if sum((values["since"] is not None, values["full"], values["auto"])) > 1:
        raise UsageError("--since, --full and --auto exclude one another")
    if values["resume"] and values["restart"]:
        raise UsageError("--resume and --restart exclude one another")
    if values["bitmaps"] and values["since"] is None:
        raise UsageError("--bitmap says what changed since a restore point: give --since too")


def parse_disks(words: Sequence[str]) -> list[DiskUri]:
    """Read ``[NAME=]URI``; a disk without a name is called as its export.

    Raises:
        UsageError: It is no URI.
    """
    from ..backup import DiskUri
    from ..nbd.uri import parse_uri

    found = []
    for word in words:
        match = _NAMED.fullmatch(word)
        name, uri = (match[1], match[2]) if match else ("", word)
        parsed = parse_uri(uri)
        found.append(DiskUri(name or parsed.export or _DEFAULT_NAME, str(parsed)))
    return found


def parse_bitmaps(words: Sequence[str], disks: Sequence[DiskUri]) -> dict[str, str]:
    """Bitmaps by disk; one without a disk is for all."""
    names = {disk.name for disk in disks}
    found = {}
    for word in words:
        disk, equals, bitmap = word.partition("=")
        if equals and disk in names:
            found[disk] = bitmap
        else:
            found.update(dict.fromkeys(names, word))
    return found


async def _pull_uris(
    directory: BackupDirectory, disks: Sequence[DiskUri], values: dict[str, Any]
) -> ExitStatus:
    from ..backup import auto_requests, full_requests, since_requests

    if values["full"]:
        requests = full_requests(disks)
    elif values["since"] is not None:
        bitmaps = parse_bitmaps(values["bitmaps"], disks)
        requests = since_requests(directory, disks, values["since"], bitmaps=bitmaps)
    else:
        requests = await auto_requests(directory, disks, timeout_seconds=values["timeout_seconds"])
    return await pull_requests(directory, requests, values)


async def pull_requests(
    directory: BackupDirectory,
    requests: Sequence[DiskRequest],
    values: dict[str, Any],
    checkpoint_created: float | None = None,
) -> ExitStatus:
    """Pull, or say what would be pulled, and print what was done.

    Args:
        directory: Where to.
        requests: The disks.
        values: The command's options.
        checkpoint_created: When the server made the checkpoint, if known.
    """
    from ..backup import estimate
    from ..backup import pull as pull_point

    if values["dry_run"]:
        estimates = await estimate(requests, options=make_options(values, None))
        print_estimates(estimates, values["as_json"])
        return _status(each.reason for each in estimates)
    with reporting(values["progress"]) as report:
        point = await pull_point(
            requests,
            directory,
            point=point_name(values),
            checkpoint=values["checkpoint"],
            checkpoint_created=checkpoint_created,
            options=make_options(values, report),
        )
    if values["progress"] == "json":
        click.echo(msgspec.json.encode(summary(point)))
    else:
        print_point(point, values["as_json"])
    return _status(disk.reason for disk in point.disks)


def point_name(values: dict[str, Any]) -> str:
    """The restore point's name: as said, or as the checkpoint's, or the time."""
    name: str | None = values["point"] or values["checkpoint"]
    return name or datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")


def make_options(values: dict[str, Any], report: Any) -> PullOptions:
    """The options of the command as those of the API."""
    from ..backup import PullOptions, RateLimit, Resume

    resume = Resume.TRUST if values["resume"] else Resume.IF_SAME
    return PullOptions(
        connections=values["connections"],
        resume=Resume.RESTART if values["restart"] else resume,
        limit=RateLimit(values["rate_limit"], values["rate_file"]),
        progress=report,
        journal_seconds=values["save_every"],
        compression=values["compress"],
        timeout_seconds=values["timeout_seconds"],
    )


def _status(reasons: Any) -> ExitStatus:
    return ExitStatus.FULL_INSTEAD if any(reasons) else ExitStatus.OK


def print_estimates(estimates: Sequence[Estimate], as_json: bool) -> None:
    """What a pull would read."""
    if as_json:
        print_json(estimates)
        return
    for each in estimates:
        why = f" (in full: {each.reason})" if each.reason else ""
        click.echo(
            f"{each.disk}: would read {each.read_bytes} bytes of {each.size}{_percent(each)},"
            f" zero {each.zero_bytes}{why}"
        )


def _percent(each: Estimate) -> str:
    return f" ({100 * each.read_bytes / each.size:.1f}%)" if each.size else ""


def print_point(point: Point, as_json: bool) -> None:
    """What was pulled."""
    if as_json:
        print_json(summary(point))
        return
    for disk in point.disks:
        share = f" ({100 * disk.read_bytes / disk.size:.1f}%)" if disk.size else ""
        base = f"since {disk.parent}" if disk.parent else "full"
        why = f": {disk.reason}" if disk.reason else ""
        click.echo(
            f"{point.name}: {disk.name}: {base}{why}:"
            f" read {disk.read_bytes} bytes of {disk.size}{share}"
        )


def summary(point: Point) -> dict[str, Any]:
    """A restore point in short, for JSON."""
    return {
        "name": point.name,
        "parent": point.parent,
        "checkpoint": point.checkpoint,
        "started": point.started,
        "finished": point.finished,
        "disks": [
            {
                "name": disk.name,
                "kind": disk.kind,
                "parent": disk.parent,
                "reason": disk.reason,
                "size": disk.size,
                "changed-bytes": disk.changed_bytes(),
                "data-bytes": disk.data_bytes(),
                "read-bytes": disk.read_bytes,
                "file": disk.file,
                "file-size": disk.file_size,
            }
            for disk in point.disks
        ],
    }
