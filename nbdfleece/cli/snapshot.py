"""``nbdfleece snapshot``."""

from __future__ import annotations

from pathlib import Path

import click

from .client import (
    client_options,
    connect,
    disks_option,
    execute,
    owner_option,
    perform,
    release_option,
)
from .output import format_list, format_time, print_json, print_table
from .waiting import wait_for, wait_for_end, wait_option


@click.group(no_args_is_help=False)
def snapshot() -> None:
    """Frozen views of disks, all of one instant."""


@snapshot.command()
@click.argument("name")
@disks_option
@click.option("--checkpoint", metavar="NAME", help="Make a checkpoint of the same instant.")
@owner_option
@release_option
@wait_option
@client_options
def create(
    name: str,
    disks: tuple[str, ...],
    checkpoint: str | None,
    owner: str,
    release: str,
    waits: bool,
    control: Path | None,
    as_json: bool,
) -> None:
    """Freeze a view of disks."""
    arguments = {
        "name": name,
        "disks": disks or None,
        "checkpoint": checkpoint,
        "owner": owner,
        "release": release,
    }
    with connect(control, keeps_events=True) as client:
        created = client.execute("snapshot-create", arguments)
        if as_json:
            print_json(created)
        if waits:
            wait_for_end(client, name)


@snapshot.command()
@click.argument("name")
@client_options
def wait(name: str, control: Path | None, as_json: bool) -> None:
    """Stay until a snapshot has ended: status 0 deleted, 5 broken."""
    with connect(control, keeps_events=True) as client:
        wait_for(client, "query-snapshots", name, "snapshot")
    if as_json:
        print_json({"name": name, "state": "deleted"})


@snapshot.command("list")
@client_options
def list_snapshots(control: Path | None, as_json: bool) -> None:
    """List snapshots, those of backups too."""
    found = execute(control, "query-snapshots")
    if as_json:
        print_json(found)
        return
    rows = [
        (
            each["name"],
            format_time(each["created"]),
            format_list(each["disks"]),
            each["checkpoint"] or "-",
            format_list(each["exports"]),
            "broken: " + each["error"] if each["error"] else "good",
        )
        for each in found
    ]
    print_table(("SNAPSHOT", "CREATED", "DISKS", "CHECKPOINT", "EXPORTS", "STATE"), rows)


@snapshot.command()
@click.argument("name")
@client_options
def delete(name: str, control: Path | None, as_json: bool) -> None:
    """End a snapshot and its exports."""
    perform(control, "snapshot-delete", {"name": name}, as_json=as_json)
