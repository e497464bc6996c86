"""``nbdfleece snapshot``."""

from __future__ import annotations

from pathlib import Path

import click

from .client import client_options, disks_option, execute, owner_option, release_option
from .output import format_list, format_time, print_json, print_table


@click.group(no_args_is_help=False)
def snapshot() -> None:
    """Frozen views of disks, all of one instant."""


@snapshot.command()
@click.argument("name")
@disks_option
@click.option("--checkpoint", metavar="NAME", help="Make a checkpoint of the same instant.")
@owner_option
@release_option
@client_options
def create(
    name: str,
    disks: tuple[str, ...],
    checkpoint: str | None,
    owner: str,
    release: str,
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
    created = execute(control, "snapshot-create", arguments)
    if as_json:
        print_json(created)


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
    result = execute(control, "snapshot-delete", {"name": name})
    if as_json:
        print_json(result)
