"""``nbdfleece checkpoint``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import UsageError
from .client import client_options, disks_option, execute, owner_option, perform
from .image_checkpoint import (
    create_checkpoint,
    delete_checkpoint,
    images_option,
    query_checkpoints,
)
from .output import format_time, print_json, print_table
from .sizes import format_size, parse_age


@click.group(no_args_is_help=False)
def checkpoint() -> None:
    """Points in time to ask for changes from."""


@checkpoint.command()
@click.argument("name")
@disks_option
@owner_option
@images_option
@client_options
def create(
    name: str,
    disks: tuple[str, ...],
    owner: str,
    images: tuple[Path, ...],
    control: Path | None,
    as_json: bool,
) -> None:
    """Make a checkpoint without a snapshot."""
    if images:
        if disks:
            raise UsageError("--disk is a server's: not with --image")
        create_checkpoint(images, name, owner)
        return
    arguments = {"name": name, "disks": disks or None, "owner": owner}
    perform(control, "checkpoint-create", arguments, as_json=as_json)


@checkpoint.command("list")
@images_option
@client_options
def list_checkpoints(images: tuple[Path, ...], control: Path | None, as_json: bool) -> None:
    """List checkpoints, oldest first, with what changed after each."""
    found = query_checkpoints(images) if images else execute(control, "query-checkpoints")
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
@images_option
@client_options
def delete(name: str, images: tuple[Path, ...], control: Path | None, as_json: bool) -> None:
    """Delete a checkpoint; its changes go to the one before it."""
    if images:
        delete_checkpoint(images, name)
        return
    perform(control, "checkpoint-delete", {"name": name}, as_json=as_json)


@checkpoint.command()
@click.option("--keep", type=click.IntRange(min=0), metavar="N", help="The newest N stay.")
@click.option("--older-than", metavar="AGE", help="Younger ones stay: 90s, 30m, 12h, 7d or 4w.")
@click.option("--owner", metavar="NAME", help="Only this owner's are counted and deleted.")
@client_options
def prune(
    keep: int | None,
    older_than: str | None,
    owner: str | None,
    control: Path | None,
    as_json: bool,
) -> None:
    """Delete checkpoints that are not needed any more, and name them."""
    age = None if older_than is None else parse_age(older_than)
    gone = execute(control, "checkpoint-prune", {"keep": keep, "older-than": age, "owner": owner})
    if as_json:
        print_json(gone)
    else:
        click.echo("\n".join(gone), nl=bool(gone))


@checkpoint.command()
@click.argument("disk")
@click.argument("bitmaps", nargs=-1, required=True)
@owner_option
@client_options
def adopt(
    disk: str, bitmaps: tuple[str, ...], owner: str, control: Path | None, as_json: bool
) -> None:
    """Make checkpoints of a disk's cumulative bitmaps, as libvirt keeps them; oldest first."""
    arguments = {"disk": disk, "bitmaps": bitmaps, "owner": owner}
    perform(control, "checkpoint-adopt", arguments, as_json=as_json)


@checkpoint.command("hand-over")
@click.argument("disk")
@client_options
def hand_over(disk: str, control: Path | None, as_json: bool) -> None:
    """Make a disk's checkpoints cumulative bitmaps, as libvirt keeps them; the chain ends."""
    perform(control, "checkpoint-hand-over", {"disk": disk}, as_json=as_json)
