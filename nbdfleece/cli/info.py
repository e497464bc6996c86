"""``nbdfleece info``: all that a server has, at one glance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .client import client_options, connect, force_share_option
from .output import format_list, print_json, print_table
from .sizes import format_size

_QUERIES = ("disks", "checkpoints", "snapshots", "backups", "nbd-exports")


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@force_share_option
@client_options
def info(file: Path | None, force_share: bool, control: Path | None, as_json: bool) -> None:
    """Show a server's disks and exports (--json: everything), or what FILE is.

    With FILE no server is asked: --json then is what qemu-img info --output=json prints.
    """
    if file is not None:
        from .image_info import show_image

        show_image(file, force_share=force_share, as_json=as_json)
        return
    with connect(control) as client:
        status = client.execute("query-status")
        version = client.execute("query-version")["package"]
        found = {name: client.execute(f"query-{name}") for name in _QUERIES}
    if as_json:
        print_json({"version": version, "pid": status["pid"], **found})
        return
    click.echo(f"{version}, process {status['pid']}\n")
    _print_disks(found["disks"])
    click.echo()
    print_exports(found["nbd-exports"])


def _print_disks(disks: list[dict[str, Any]]) -> None:
    rows = [
        (
            each["name"],
            format_size(each["size"]),
            format_size(each["scratch-bytes"]),
            format_list(each["checkpoints"]),
            each["file"],
            each["chain-problem"] or "",
        )
        for each in disks
    ]
    print_table(("DISK", "SIZE", "SCRATCH", "CHECKPOINTS", "IMAGE", "PROBLEM"), rows)


def print_exports(exports: list[dict[str, Any]]) -> None:
    """Exports as a table."""
    rows = [
        (
            each["name"],
            format_size(each["size"]),
            "read-only" if each["read-only"] else "writable",
            str(each["connections"]),
            format_list(each["contexts"]),
            " ".join(each["uris"]),
        )
        for each in exports
    ]
    print_table(("EXPORT", "SIZE", "ACCESS", "CLIENTS", "CONTEXTS", "URI"), rows)
