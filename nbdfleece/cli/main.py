"""The command ``nbdfleece``: finding the subcommand, and what becomes of its errors.

Modules of subcommands are imported only when one of them is asked for, and import what is
heavy only when they run.
"""

from __future__ import annotations

import importlib
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click

from .. import __version__
from ..control.errors import describe_os_error
from ..errors import DiffersError, NbdfleeceError, SnapshotError, TemporaryError, UsageError
from . import logs
from .exit_status import ExitStatus, describe

SUBCOMMANDS: Final = {
    "serve": "serve:serve",
    "nbd": "nbd_command:nbd",
    "plugin": "plugin:plugin",
    "info": "info:info",
    "snapshot": "snapshot:snapshot",
    "checkpoint": "checkpoint:checkpoint",
    "overlay": "overlay:overlay",
    "export": "export:export",
    "bitmap": "bitmap:bitmap",
    "backup": "backup:backup",
    "pull": "pull:pull",
    "import": "pull_stream:import_streams",
    "restore": "restore:restore",
    "verify": "points:verify",
    "list": "points:list_points",
    "show": "points:show",
    "prune": "points:prune",
    "map": "map:map_export",
    "create": "create:create",
    "resize": "resize:resize",
    "check": "check:check",
    "completion": "completion:completion",
}

_log = logging.getLogger("nbdfleece.cli")


class LazyGroup(click.Group):
    """A group whose commands are ``module:attribute`` in this package."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order in which a user meets them."""
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in SUBCOMMANDS:
            return None
        module, attribute = SUBCOMMANDS[cmd_name].split(":")
        command: click.Command = getattr(
            importlib.import_module(f"{__package__}.{module}"), attribute
        )
        return command

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Add the exit statuses to the help."""
        formatter.write(f"\nExit status:\n{describe()}\n  128+N  ended by signal N\n")


def _print_nbdkit_plugin(ctx: click.Context, option: click.Parameter, is_given: bool) -> None:
    if is_given:
        click.echo(Path(__file__).parents[1] / "nbdkit" / "nbdfleece_plugin.py")
        ctx.exit()


@click.group(cls=LazyGroup, no_args_is_help=False)
@click.version_option(__version__, prog_name="nbdfleece", message="%(prog)s %(version)s")
@click.option(
    "--nbdkit-plugin",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_nbdkit_plugin,
    help="Print the path of the script for 'nbdkit python SCRIPT image=FILE'.",
)
@click.option("-v", "--verbose", count=True, help="Say what happens; twice for more.")
def cli(verbose: int) -> None:
    """Live qcow2 disks over NBD: dirty bitmaps, checkpoints and snapshots.

    ``serve`` runs a server; commands on disks, snapshots and backups talk to a running one over
    its control socket. check, create, resize, bitmap, and all others that are given a FILE or
    --image work on images that no server has open.
    """
    logs.configure(verbose)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Without the program's name; None for those of the process.

    Returns:
        The exit status.
    """
    try:
        result: Any = cli.main(args, prog_name="nbdfleece", standalone_mode=False)
        return int(result or ExitStatus.OK)
    except (click.Abort, KeyboardInterrupt):
        return 128 + signal.SIGINT
    except Exception as error:
        return _fail(error)


def _fail(error: Exception) -> ExitStatus:
    """Print an error as exactly one line, and choose the status that goes with it."""
    status, text = _judge(error)
    print(f"nbdfleece: error: {' '.join(text.splitlines())}", file=sys.stderr)
    return status


_STATUSES: Final[dict[type[NbdfleeceError], ExitStatus]] = {
    UsageError: ExitStatus.USAGE,
    DiffersError: ExitStatus.DIFFERS,
    SnapshotError: ExitStatus.SNAPSHOT_BROKEN,
    TemporaryError: ExitStatus.TEMPORARY,
}
"""The class of an error is its consequence; of every other one it is ERROR."""


def _status_of(error: NbdfleeceError) -> ExitStatus:
    found = [status for kind, status in _STATUSES.items() if isinstance(error, kind)]
    return found[0] if found else ExitStatus.ERROR


def _judge(error: Exception) -> tuple[ExitStatus, str]:
    if isinstance(error, click.UsageError):
        where = f"; see '{error.ctx.command_path} --help'" if error.ctx else ""
        return ExitStatus.USAGE, error.format_message().removesuffix(".") + where
    if isinstance(error, click.ClickException):
        return ExitStatus.ERROR, error.format_message()
    if isinstance(error, NbdfleeceError):
        return _status_of(error), str(error)
    if isinstance(error, OSError):
        return ExitStatus.ERROR, describe_os_error(error)
    _log.info("internal error", exc_info=error)
    text = f"internal error: {type(error).__name__}: {error} (with -v: where)"
    return ExitStatus.ERROR, text
