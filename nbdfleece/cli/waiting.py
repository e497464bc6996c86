"""Waiting for what becomes of a backup or a snapshot: ``--wait`` and ``wait``."""

from __future__ import annotations

from typing import Any, Final

import click

from ..control.client import ControlClient
from ..errors import SnapshotError, StateError

_ENDS: Final = ("BACKUP_COMMITTED", "BACKUP_ABORTED", "SNAPSHOT_DELETED", "SNAPSHOT_BROKEN")

wait_option = click.option(
    "--wait",
    "waits",
    is_flag=True,
    help="Stay until it has ended: status 0 if it was committed or deleted, 1 if it was aborted, "
    "5 if it broke.",
)


def wait_for_end(client: ControlClient, name: str) -> None:
    """Wait until a backup or snapshot has ended.

    Args:
        client: Keeps events, and has been connected since the snapshot was there.
        name: Its name.

    Raises:
        SnapshotError: It broke.
        StateError: The backup was aborted.
        ServerGoneError: The server hung up.
    """
    while True:
        told = client.next_event()
        event, data = told["event"], told["data"]
        if event not in _ENDS or name not in (data.get("backup"), data.get("snapshot")):
            continue
        if event == "SNAPSHOT_BROKEN":
            raise SnapshotError(f"snapshot '{name}' of disk '{data['disk']}': {data['reason']}")
        if event == "BACKUP_ABORTED":
            raise StateError(f"backup '{name}' was aborted")
        return


def wait_for(client: ControlClient, query: str, name: str, kind: str) -> None:
    """As :func:`wait_for_end`, for one that another client has begun.

    Args:
        client: Keeps events.
        query: The command that lists such things.
        name: Its name.
        kind: What messages call it.

    Raises:
        StateError: There is none.
    """
    listed: list[dict[str, Any]] = client.execute(query)
    found = [each for each in listed if each["name"] == name]
    if not found:
        raise StateError(f"there is no {kind} '{name}'")
    if found[0]["error"]:
        raise SnapshotError(f"{kind} '{name}': {found[0]['error']}")
    wait_for_end(client, name)
