"""``nbdfleece overlay``."""

from __future__ import annotations

from pathlib import Path

import click

from .client import client_options, execute, perform
from .output import format_list, format_time, print_json, print_table


@click.group(no_args_is_help=False)
def overlay() -> None:
    """Writable overlays: write beside a disk, then commit it or throw it away."""


@overlay.command()
@click.argument("name")
@click.argument("disk")
@click.option(
    "--snapshot", metavar="NAME", help="Lay it over the disk as of a snapshot. Default: as it is."
)
@client_options
def create(name: str, disk: str, snapshot: str | None, control: Path | None, as_json: bool) -> None:
    """Export a writable overlay of a disk under its own name; prints how to reach it."""
    arguments = {"name": name, "disk": disk, "snapshot": snapshot}
    created = execute(control, "overlay-create", arguments)
    if as_json:
        print_json(created)
    else:
        click.echo("\n".join(created["uris"]))


@overlay.command("list")
@client_options
def list_overlays(control: Path | None, as_json: bool) -> None:
    """List overlays."""
    found = execute(control, "query-overlays")
    if as_json:
        print_json(found)
        return
    rows = [
        (
            each["name"],
            format_time(each["created"]),
            each["disk"],
            each["snapshot"] or "-",
            format_list(each["uris"]),
        )
        for each in found
    ]
    print_table(("OVERLAY", "CREATED", "DISK", "SNAPSHOT", "URIS"), rows)


@overlay.command()
@click.argument("name")
@client_options
def commit(name: str, control: Path | None, as_json: bool) -> None:
    """Write into the disk what was written to an overlay, and end it."""
    perform(control, "overlay-commit", {"name": name}, as_json=as_json)


@overlay.command()
@click.argument("name")
@client_options
def discard(name: str, control: Path | None, as_json: bool) -> None:
    """Throw away what was written to an overlay, and end it."""
    perform(control, "overlay-discard", {"name": name}, as_json=as_json)
