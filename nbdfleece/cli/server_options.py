"""What all commands share that are clients of an NBD server."""

from __future__ import annotations

from typing import Final

import click

_SECONDS: Final = 300


def _none_for_zero(_: click.Context, __: click.Parameter, seconds: float) -> float | None:
    return seconds or None


timeout_option = click.option(
    "--timeout",
    "timeout_seconds",
    type=click.FloatRange(min=0),
    default=_SECONDS,
    show_default=True,
    callback=_none_for_zero,
    metavar="SECONDS",
    help="Give up a server that owes answers and has sent nothing for so long; 0 for never.",
)
