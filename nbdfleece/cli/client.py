"""What all commands share that talk to a running server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..control.client import ControlClient
from .addresses import CONTROL_VARIABLE, default_control
from .options import option_group
from .output import print_json

client_options = option_group(
    click.option(
        "--control",
        type=click.Path(path_type=Path),
        envvar=CONTROL_VARIABLE,
        show_envvar=True,
        metavar="PATH",
        help="The server's control socket.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
)
disks_option = click.option(
    "--disk",
    "disks",
    multiple=True,
    metavar="DISK",
    help="Which disk; may be repeated. Default: all disks.",
)
owner_option = click.option(
    "--owner", default="", metavar="NAME", help="Whose checkpoint it is, for people to see."
)


force_share_option = click.option(
    "--force-share", "-U", is_flag=True, help="Read an image although others may write it."
)


def connect(control: Path | None, *, keeps_events: bool = False) -> ControlClient:
    """A session with the named server, or the one at the usual place."""
    return ControlClient(control or default_control(), keeps_events=keeps_events)


def execute(control: Path | None, command: str, arguments: dict[str, Any] | None = None) -> Any:
    """Have one command carried out."""
    with connect(control) as client:
        return client.execute(command, arguments)


def perform(
    control: Path | None, command: str, arguments: dict[str, Any], *, as_json: bool
) -> None:
    """Have one command carried out; its result is printed only as JSON."""
    result = execute(control, command, arguments)
    if as_json:
        print_json(result)


release_option = click.option(
    "--release",
    type=click.Choice(["never", "trim", "read"]),
    default="never",
    show_default=True,
    help="When the copies of a range are given back: with the snapshot, when a client trims the "
    "range on the export, or once it has been read.",
)
