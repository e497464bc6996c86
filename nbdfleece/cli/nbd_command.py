"""``nbdfleece nbd``: serve one image, without an engine."""

from __future__ import annotations

from typing import Any

import click

from . import logs
from .nbd_flags import FLAGS, Flag, Given
from .nbd_serving import Style, run_nbd
from .options import Decorator, loop_option, option_group
from .qemu_nbd import POLICY_VARIABLE

_OWN = ("help", "version")
"""Flags that click has already."""


def _flag_option(flag: Flag) -> Decorator:
    names = [f"--{flag.name}"] + ([f"-{flag.short}"] if flag.short else [])
    names.append(_parameter(flag))
    if flag.metavar:
        return click.option(*names, multiple=True, metavar=flag.metavar, help=flag.help)
    return click.option(*names, count=True, help=flag.help)


def _parameter(flag: Flag) -> str:
    return f"flag_{flag.name.replace('-', '_')}"


@click.command()
@option_group(*(_flag_option(flag) for flag in FLAGS if flag.name not in _OWN))
@click.option(
    "--backing-files",
    type=click.Choice(["same-folder", "any", "refuse"]),
    default="same-folder",
    show_default=True,
    envvar=POLICY_VARIABLE,
    show_envvar=True,
    help="Which backing and data files the image may name; 'any' only for images you trust.",
)
@click.option("--print-uri", is_flag=True, help="Once ready, print the export's URIs.")
@loop_option
@click.argument("image", nargs=-1)
@click.pass_context
def nbd(ctx: click.Context, /, **values: Any) -> None:
    """Serve an image with the flags of qemu-nbd, until its last client has left.

    IMAGE is a file name, json:{...}, or with --image-opts a list of node options.
    """
    assert ctx.parent is not None
    given = _given(values)
    logs.configure(len(given.all("verbose")) + ctx.parent.params.get("verbose", 0))
    style = Style(
        policy=values["backing_files"], loop=values["loop"], prints_uri=values["print_uri"]
    )
    run_nbd(given, style)


def _given(values: dict[str, Any]) -> Given:
    """The flags as the other entry point has them; their order does not matter."""
    found: list[tuple[str, str]] = []
    for flag in FLAGS:
        value = values.get(_parameter(flag))
        if flag.metavar:
            found += [(flag.name, text) for text in value or ()]
        else:
            found += [(flag.name, "")] * (value or 0)
    return Given(found, values["image"])
