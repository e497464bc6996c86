"""Pulling from one of our own servers in one go: begin, pull, commit; abort on failure.

The backup on the server has the restore point's name. A pull that was killed leaves it
there; the same command (or one that gives no name) finds it, knows its snapshot by the
instant of its creation, and goes on. If pulling fails otherwise, the backup is aborted and
what was pulled is removed, unless ``--keep`` was given.
"""

from __future__ import annotations

import asyncio
from typing import Any

import click

from ..backup import (
    BackupDirectory,
    BackupError,
    DiskRequest,
    InterruptedPullError,
    Point,
    discard,
)
from ..backup.block_status import DIRTY_PREFIX
from ..control.client import ControlClient
from ..control.errors import QmpError
from ..errors import NbdfleeceError, StateError
from .client import connect
from .exit_status import ExitStatus
from .pull import point_name, print_point, pull_requests


def pull_from_server(directory: BackupDirectory, values: dict[str, Any]) -> ExitStatus:
    """Do the whole backup, or say what it would read.

    Args:
        directory: Where to.
        values: The options of ``pull``.
    """
    with connect(values["control"]) as client:
        for point in _commit_complete(client, directory):
            if point.name == point_name(values):
                print_point(point, values["as_json"])
                return ExitStatus.OK
        name = _find_cut(client, directory, values) or point_name(values)
        values = {**values, "point": name, "checkpoint": values["checkpoint"] or name}
        _check_free(directory, name)
        parent = _choose_parent(client, directory, values)
        if values["dry_run"]:
            return _try(client, directory, values, parent)
        begun = _begin(client, values, parent)
        try:
            status = _pull(client, directory, values, begun, parent)
        except BaseException as error:
            _end_badly(client, directory, values, error)
            raise
        _commit(client, name)
    return status


def _commit_complete(client: ControlClient, directory: BackupDirectory) -> list[Point]:
    """Commit backups whose restore points are complete: a pull was killed just before it."""
    if not directory.path.is_dir():
        return []
    created = _checkpoints(client)
    complete = []
    for each in client.execute("query-backups"):
        if each["checkpoint"] is not None and directory.has(each["name"]):
            point = directory.point(each["name"])
            if point.checkpoint_created == created.get(point.checkpoint):
                _commit(client, point.name)
                complete.append(point)
    return complete


def _find_cut(
    client: ControlClient, directory: BackupDirectory, values: dict[str, Any]
) -> str | None:
    """The name of the backup that was killed, if no name is given and there is just one."""
    if values["point"] or values["checkpoint"] or not directory.path.is_dir():
        return None
    begun = {each["name"] for each in client.execute("query-backups")}
    names = begun.intersection(directory.cut_pulls())
    return names.pop() if len(names) == 1 else None


def _check_free(directory: BackupDirectory, name: str) -> None:
    """Fail before the server is asked for anything.

    Raises:
        StateError: The restore point exists, or another pull is under way.
    """
    if not directory.path.is_dir():
        return
    if directory.has(name):
        raise StateError(f"{directory.path}: restore point {name!r} exists already")
    with directory.writing():
        pass


def _try(
    client: ControlClient, directory: BackupDirectory, values: dict[str, Any], parent: Point | None
) -> ExitStatus:
    """Say what would be read, by a backup of its own that leaves nothing."""
    name = values["point"] + "-dry-run"
    begun = _begin(client, {**values, "point": name, "checkpoint": None}, parent)
    try:
        return _pull(client, directory, values, begun, parent)
    finally:
        client.execute("backup-abort", {"name": name})


def _pull(
    client: ControlClient,
    directory: BackupDirectory,
    values: dict[str, Any],
    begun: Any,
    parent: Point | None,
) -> ExitStatus:
    """Pull what was begun."""
    requests = _requests(begun, parent, _default_reason(directory, values))
    values = {**values, "checkpoint": begun["checkpoint"]}
    created = _checkpoints(client).get(begun["checkpoint"])
    return asyncio.run(pull_requests(directory, requests, values, checkpoint_created=created))


def _end_badly(
    client: ControlClient,
    directory: BackupDirectory,
    values: dict[str, Any],
    error: BaseException,
) -> None:
    """Undo a backup that failed, unless it is to be kept, or is complete all the same.

    Raises:
        BackupError: In place of an error that says that the pull can go on.
    """
    name = values["point"]
    if directory.path.is_dir() and directory.has(name):
        _commit(client, name)  # complete; only telling so has failed
    elif not values["keep"]:
        _abort(client, directory, name)
        if isinstance(error, InterruptedPullError):
            raise BackupError(
                f"the backup {name!r} failed and was undone (--keep would have kept what was"
                f" pulled): {error.__cause__}"
            ) from error


def _choose_parent(
    client: ControlClient, directory: BackupDirectory, values: dict[str, Any]
) -> Point | None:
    """The restore point to build on: as said, or the newest whose checkpoint is still there."""
    if values["full"]:
        return None
    if values["since"] is not None:
        return _check_parent(client, directory.find(values["since"]))
    points = directory.points() if directory.path.is_dir() else []
    created = _checkpoints(client)
    for point in reversed(points):
        if point.checkpoint in created and _is_same(point, created):
            return point
    return None


def _checkpoints(client: ControlClient) -> dict[str | None, float]:
    """When the server's checkpoints were made, by name."""
    return {each["name"]: each["created"] for each in client.execute("query-checkpoints")}


def _is_same(point: Point, created: dict[str | None, float]) -> bool:
    """Whether the server's checkpoint is the one that the point was made with."""
    return point.checkpoint_created is None or created[point.checkpoint] == point.checkpoint_created


def _check_parent(client: ControlClient, point: Point) -> Point:
    if point.checkpoint is None:
        raise StateError(f"restore point {point.name!r} was made without a checkpoint")
    created = _checkpoints(client)
    if point.checkpoint in created and not _is_same(point, created):
        raise StateError(
            f"the server's checkpoint {point.checkpoint!r} is not the one that restore point"
            f" {point.name!r} was made with: it was made at another time"
        )
    return point


def _begin(client: ControlClient, values: dict[str, Any], parent: Point | None) -> Any:
    """Begin a backup, or find the one that a pull that was killed has left."""
    for each in client.execute("query-backups"):
        if each["name"] == values["point"] and not values["restart"]:
            return each
    if values["restart"]:
        _abort_if_there(client, values["point"])
    arguments = {
        "name": values["point"],
        "disks": list(values["disks"]) or None,
        "checkpoint": values["checkpoint"],
        "since": None if parent is None else parent.checkpoint,
    }
    return client.execute("backup-begin", arguments)


def _abort_if_there(client: ControlClient, name: str) -> None:
    if any(each["name"] == name for each in client.execute("query-backups")):
        client.execute("backup-abort", {"name": name})


def _default_reason(directory: BackupDirectory, values: dict[str, Any]) -> str | None:
    """Why everything is pulled in full if there is no parent; None where that was expected."""
    has_points = directory.path.is_dir() and directory.point_names()
    if values["full"] or not has_points:
        return None
    return "the server has no checkpoint that the backup has"


def _requests(begun: Any, parent: Point | None, reason: str | None) -> list[DiskRequest]:
    return [_request(begun, disk, parent, reason) for disk in begun["disks"]]


def _request(begun: Any, disk: Any, parent: Point | None, reason: str | None) -> DiskRequest:
    """What to pull of one disk: what the server offers, if the backup has what it builds on."""
    identity = f"{begun['name']}@{begun['created']!r}"
    name, uri = disk["disk"], disk["uris"][0]
    has_base = parent is not None and any(entry.name == name for entry in parent.disks)
    if parent is None or disk["context"] is None or not has_base:
        if parent is not None:
            lacking = f"restore point {parent.name!r} does not have this disk"
            reason = disk["reason"] if has_base else lacking
        return DiskRequest(name=name, uri=uri, reason=reason, identity=identity)
    if disk["context"] != f"{DIRTY_PREFIX}{parent.checkpoint}":
        raise StateError(
            f"the server has a backup {begun['name']!r} already, with other changes than those"
            f" since {parent.name!r}: --restart begins it anew"
        )
    return DiskRequest(name=name, uri=uri, bitmap=disk["context"], parent=parent, identity=identity)


def _abort(client: ControlClient, directory: BackupDirectory, name: str) -> None:
    """Undo what was begun; what cannot be undone is said, and does not hide what went wrong."""
    try:
        if directory.path.is_dir():
            with directory.writing():  # or else someone else is pulling this very backup
                discard(directory, name)
        client.execute("backup-abort", {"name": name})
    except (NbdfleeceError, OSError) as error:
        click.echo(f"nbdfleece: the backup {name!r} could not be aborted: {error}", err=True)


def _commit(client: ControlClient, name: str) -> None:
    try:
        client.execute("backup-commit", {"name": name})
    except QmpError as error:
        raise StateError(
            f"restore point {name!r} is complete, but its checkpoint is not kept: {error};"
            " the next pull will be in full"
        ) from error
