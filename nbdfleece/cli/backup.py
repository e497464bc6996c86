"""``nbdfleece backup``: the life of a backup on the server's side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..control.client import ControlClient
from ..control.errors import QmpError
from ..errors import SnapshotError
from .client import (
    client_options,
    connect,
    disks_option,
    execute,
    owner_option,
    perform,
    release_option,
)
from .exit_status import ExitStatus
from .output import format_time, print_json, print_table
from .waiting import wait_for, wait_for_end, wait_option


@click.group(no_args_is_help=False)
def backup() -> None:
    """Snapshots for backups, with a checkpoint that stays only if they are committed."""


@backup.command()
@click.argument("name")
@disks_option
@click.option(
    "--checkpoint", metavar="NAME", help="Make a checkpoint for the next backup to build on."
)
@click.option("--since", metavar="CHECKPOINT", help="Offer what changed since then.")
@click.option(
    "--only-changes",
    is_flag=True,
    help="Keep only what changed since --since, which takes less scratch; the rest cannot be read.",
)
@owner_option
@release_option
@wait_option
@client_options
def begin(
    name: str,
    disks: tuple[str, ...],
    checkpoint: str | None,
    since: str | None,
    only_changes: bool,
    owner: str,
    release: str,
    waits: bool,
    control: Path | None,
    as_json: bool,
) -> ExitStatus:
    """Freeze disks, export them, and say what to read.

    The exit status is 4 if --since was given and a disk must be read in full all the same.
    """
    arguments = {
        "name": name,
        "disks": disks or None,
        "checkpoint": checkpoint,
        "since": since,
        "owner": owner,
        "release": release,
        "only-changes": only_changes,
    }
    with connect(control, keeps_events=True) as client:
        begun = client.execute("backup-begin", arguments)
        if as_json:
            print_json(begun)
        else:
            _print_backup(begun)
        if waits:
            wait_for_end(client, name)
    if any(each["reason"] for each in begun["disks"]):
        return ExitStatus.FULL_INSTEAD
    return ExitStatus.OK


def _print_backup(found: dict[str, Any]) -> None:
    rows = [
        (
            each["disk"],
            each["mode"],
            " ".join(each["uris"]),
            each["context"] or "-",
            each["reason"] or "",
        )
        for each in found["disks"]
    ]
    print_table(("DISK", "MODE", "URI", "CONTEXT", "REASON"), rows)


@backup.command()
@click.argument("name")
@client_options
def commit(name: str, control: Path | None, as_json: bool) -> None:
    """Keep a backup's checkpoint and end its snapshot.

    The exit status is 5 if the snapshot is broken, so that the backup can only be aborted.
    """
    with connect(control) as client:
        try:
            result = client.execute("backup-commit", {"name": name})
        except QmpError as error:
            if _is_broken(client, name):
                raise SnapshotError(str(error)) from error
            raise
    if as_json:
        print_json(result)


def _is_broken(client: ControlClient, name: str) -> bool:
    backups = client.execute("query-backups")
    return any(each["name"] == name and each["error"] for each in backups)


@backup.command()
@click.argument("name")
@client_options
def abort(name: str, control: Path | None, as_json: bool) -> None:
    """End a backup as if it had not begun."""
    perform(control, "backup-abort", {"name": name}, as_json=as_json)


@backup.command()
@click.argument("name")
@client_options
def wait(name: str, control: Path | None, as_json: bool) -> None:
    """Stay until a backup has ended: status 0 committed, 1 aborted, 5 broken."""
    with connect(control, keeps_events=True) as client:
        wait_for(client, "query-backups", name, "backup")
    if as_json:
        print_json({"name": name, "state": "committed"})


@backup.command("list")
@client_options
def list_backups(control: Path | None, as_json: bool) -> None:
    """List backups that are neither committed nor aborted."""
    found = execute(control, "query-backups")
    if as_json:
        print_json(found)
        return
    for each in found:
        state = f"broken: {each['error']}" if each["error"] else "good"
        kept = each["checkpoint"] or "none"
        click.echo(f"{each['name']}: {format_time(each['created'])}, checkpoint {kept}, {state}")
        _print_backup(each)
