"""Choosing, disk by disk, between a full pull and an increment, and on what.

A disk whose changes are not known gets a full one, with the reason on record; the others
get their increment all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..errors import UsageError
from .block_status import DIRTY_PREFIX
from .connection import TIMEOUT_SECONDS
from .directory import BackupDirectory
from .manifest import Point
from .pull import DiskRequest
from .source import offered_bitmaps


class DiskUri(NamedTuple):
    """A disk, and where its export is."""

    name: str
    uri: str


def full_requests(disks: Sequence[DiskUri]) -> list[DiskRequest]:
    """Everything of every disk."""
    return [DiskRequest(name=disk.name, uri=disk.uri) for disk in disks]


def since_requests(
    directory: BackupDirectory,
    disks: Sequence[DiskUri],
    since: str,
    *,
    bitmaps: Mapping[str, str] | None = None,
) -> list[DiskRequest]:
    """What changed since a restore point, on every disk.

    Args:
        directory: The backup.
        disks: The disks.
        since: The name of a restore point, or of the checkpoint that was made with one.
        bitmaps: Names of dirty bitmaps by disk, where they are not called as the checkpoint.

    Raises:
        BackupError: There is no such restore point, or it does not have the disk.
        UsageError: It was made without a checkpoint, and no bitmap is given.
    """
    parent = directory.find(since)
    requests = []
    for disk in disks:
        bitmap = (bitmaps or {}).get(disk.name) or parent.checkpoint
        if bitmap is None:
            raise UsageError(
                f"restore point {parent.name!r} was made without a checkpoint:"
                " say with --bitmap which bitmap tells what changed since then"
            )
        parent.disk(disk.name)
        requests.append(_increment(disk, bitmap, parent))
    return requests


async def auto_requests(
    directory: BackupDirectory,
    disks: Sequence[DiskUri],
    *,
    timeout_seconds: float | None = TIMEOUT_SECONDS,
) -> list[DiskRequest]:
    """For every disk the smallest increment that the server and the backup allow, or a full one.

    Args:
        directory: The backup.
        disks: The disks.
        timeout_seconds: How long a server may be silent; None for ever.

    Raises:
        ServerError: A server cannot be asked.
        BackupError: A manifest is damaged.
    """
    points = directory.points() if directory.path.is_dir() else []
    return [
        _best(disk, points, await offered_bitmaps(disk.uri, timeout_seconds=timeout_seconds))
        for disk in disks
    ]


def _best(disk: DiskUri, points: Sequence[Point], offered: Sequence[str]) -> DiskRequest:
    """An increment on the newest restore point whose checkpoint the server offers."""
    with_disk = [point for point in points if any(entry.name == disk.name for entry in point.disks)]
    for point in reversed(with_disk):
        if point.checkpoint is not None and point.checkpoint in offered:
            return _increment(disk, point.checkpoint, point)
    reason: str | None
    if not points:
        reason = None  # the first pull of all: an increment was not to be expected
    elif not with_disk:
        reason = "the backup has no restore point of this disk"
    elif not any(point.checkpoint for point in with_disk):
        reason = "no restore point of this disk was made with a checkpoint"
    else:
        reason = "the server offers no dirty bitmap of a checkpoint that the backup has"
    return DiskRequest(name=disk.name, uri=disk.uri, reason=reason)


def _increment(disk: DiskUri, bitmap: str, parent: Point) -> DiskRequest:
    if not bitmap.startswith(DIRTY_PREFIX):
        bitmap = DIRTY_PREFIX + bitmap
    return DiskRequest(name=disk.name, uri=disk.uri, bitmap=bitmap, parent=parent)
