"""``nbdfleece export``."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import UsageError
from .client import client_options, execute, perform
from .info import print_exports
from .output import print_json


@click.group(no_args_is_help=False)
def export() -> None:
    """What NBD clients can read and write."""


@export.command()
@click.argument("snapshot")
@click.argument("disk")
@click.option("--name", help="What clients call it. Default: SNAPSHOT/DISK.")
@click.option(
    "--since",
    multiple=True,
    metavar="CHECKPOINT[=BITMAP]",
    help="Show what changed since a checkpoint, as qemu:dirty-bitmap:BITMAP (default: the "
    "checkpoint's name); may be repeated.",
)
@click.option(
    "--between",
    multiple=True,
    metavar="CHECKPOINT..CHECKPOINT=BITMAP",
    help="Show what changed from one checkpoint to a later one, as qemu:dirty-bitmap:BITMAP; may "
    "be repeated.",
)
@client_options
def add(
    snapshot: str,
    disk: str,
    name: str | None,
    since: tuple[str, ...],
    between: tuple[str, ...],
    control: Path | None,
    as_json: bool,
) -> None:
    """Export a disk of a snapshot, read-only, and print its URIs."""
    arguments = {
        "snapshot": snapshot,
        "disk": disk,
        "name": name,
        "since": parse_since(since) or None,
        "between": parse_between(between) or None,
    }
    added = execute(control, "snapshot-export-add", arguments)
    if as_json:
        print_json(added)
    else:
        click.echo("\n".join(added["uris"]))


def parse_since(words: tuple[str, ...]) -> dict[str, str]:
    """Read ``CHECKPOINT[=BITMAP]``.

    Raises:
        UsageError: A checkpoint is named twice.
    """
    found: dict[str, str] = {}
    for word in words:
        checkpoint, equals, bitmap = word.partition("=")
        if checkpoint in found:
            raise UsageError(f"--since names checkpoint '{checkpoint}' twice")
        found[checkpoint] = bitmap if equals else checkpoint
    return found


def parse_between(words: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """Read ``CHECKPOINT..CHECKPOINT=BITMAP``.

    Raises:
        UsageError: A word is not of this form, or a bitmap is named twice.
    """
    found: dict[str, tuple[str, str]] = {}
    for word in words:
        interval, _, bitmap = word.rpartition("=")
        first, dots, last = interval.partition("..")
        if not (first and dots and last and bitmap):
            raise UsageError(f"--between '{word}' is not CHECKPOINT..CHECKPOINT=BITMAP")
        if bitmap in found:
            raise UsageError(f"--between names bitmap '{bitmap}' twice")
        found[bitmap] = (first, last)
    return found


@export.command("list")
@client_options
def list_exports(control: Path | None, as_json: bool) -> None:
    """List exports with their URIs."""
    found = execute(control, "query-nbd-exports")
    if as_json:
        print_json(found)
    else:
        print_exports(found)


@export.command()
@click.argument("name")
@client_options
def remove(name: str, control: Path | None, as_json: bool) -> None:
    """Remove an export of a snapshot."""
    perform(control, "snapshot-export-remove", {"name": name}, as_json=as_json)
