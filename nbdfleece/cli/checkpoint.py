"""``nbdfleece checkpoint``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .client import client_options, disks_option, execute, owner_option
from .output import format_time, print_json, print_table
from .sizes import format_size


@click.group(no_args_is_help=False)
def checkpoint() -> None:
    """Points in time to ask for changes from."""


@checkpoint.command()
@click.argument("name")
@disks_option
@owner_option
@client_options
def create(
    name: str, disks: tuple[str, ...], owner: str, control: Path | None, as_json: bool
) -> None:
    """Make a checkpoint without a snapshot."""
    arguments = {"name": name, "disks": disks or None, "owner": owner}
    result = execute(control, "checkpoint-create", arguments)
    if as_json:
        print_json(result)


@checkpoint.command("list")
@client_options
def list_checkpoints(control: Path | None, as_json: bool) -> None:
    """List checkpoints, oldest first, with what changed after each."""
    found = execute(control, "query-checkpoints")
    if as_json:
        print_json(found)
        return
    headings = ("CHECKPOINT", "PARENT", "CREATED", "OWNER", "STATE", "DISK", "CHANGED", "PROBLEM")
    print_table(headings, [row for each in found for row in _rows(each)])


def _rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row per disk."""
    return [
        (
            found["name"],
            found["parent"] or "-",
            format_time(found["created"]),
            found["owner"] or "-",
            found["state"],
            disk,
            format_size(link["changed"]),
            link["problem"] or "",
        )
        for disk, link in found["disks"].items()
    ]


@checkpoint.command()
@click.argument("name")
@client_options
def delete(name: str, control: Path | None, as_json: bool) -> None:
    """Delete a checkpoint; its changes go to the one before it."""
    result = execute(control, "checkpoint-delete", {"name": name})
    if as_json:
        print_json(result)
