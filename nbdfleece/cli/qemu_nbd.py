"""``nbdfleece-qemu-nbd``: stands in for qemu-nbd in scripts that call it.

Flags are read as getopt_long(3) reads them: anywhere on the line, long ones abbreviated,
short ones in one word with others. Errors are lines that begin with ``qemu-nbd:``, and
the exit status is 1, whatever happened.
"""

from __future__ import annotations

import getopt
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final

from .. import __version__
from ..control.errors import describe_os_error
from ..errors import NbdfleeceError, UsageError
from .nbd_flags import FLAGS, Given, help_lines
from .nbd_serving import Style, run_nbd

PROGRAM: Final = "qemu-nbd"
POLICY_VARIABLE: Final = "NBDFLEECE_BACKING_FILES"
"""Which backing and data files images may name; qemu-nbd opens any."""

_POLICIES: Final = ("any", "same-folder", "refuse")
_HINT: Final = f"Try `{PROGRAM} --help' for more information."


class LineFormatter(logging.Formatter):
    """``qemu-nbd: warning: message``."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        text = f"{PROGRAM}: {record.levelname.lower()}: {record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def parse(args: Sequence[str]) -> Given:
    """Take a command line apart.

    Raises:
        UsageError: There is a flag that qemu-nbd does not have, or a value is missing or
            too much.
    """
    short = "".join(flag.short + (":" if flag.metavar else "") for flag in FLAGS if flag.short)
    long = [flag.name + ("=" if flag.metavar else "") for flag in FLAGS]
    try:
        options, names = getopt.gnu_getopt(list(args), short, long)
    except getopt.GetoptError as error:
        raise UsageError(f"{error.msg}\n{PROGRAM}: {_HINT}") from None
    by_short = {f"-{flag.short}": flag.name for flag in FLAGS if flag.short}
    return Given([(by_short.get(name, name[2:]), value) for name, value in options], names)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Without the program's name; None for those of the process.

    Returns:
        The exit status.
    """
    try:
        given = parse(sys.argv[1:] if args is None else args)
        status = _run(given)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except NbdfleeceError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(describe_os_error(error))


def _run(given: Given) -> int:
    if given.has("help"):
        print(f"Usage: {PROGRAM} [OPTIONS] FILE\n  or:  {PROGRAM} -L [OPTIONS]")
        print("nbdfleece in place of QEMU's disk network block device utility\n")
        print("\n".join(help_lines()))
        return 0
    if given.has("version"):
        print(f"{PROGRAM} (nbdfleece) {__version__}")
        return 0
    _configure_log(len(given.all("verbose")))
    socket = given.last("socket")
    if socket is not None and not socket.startswith("/"):
        raise UsageError("socket path must be absolute")
    if not given.has("list") and len(given.names) != 1:
        raise UsageError(f"Invalid number of arguments\n{_HINT}")
    policy = os.environ.get(POLICY_VARIABLE, "any")
    if policy not in _POLICIES:
        raise UsageError(f"{POLICY_VARIABLE} is to be one of {', '.join(_POLICIES)}")
    run_nbd(given, Style(policy=policy, keeps_pid_file=True))
    return 0


def _configure_log(verbosity: int) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)])


def _fail(text: str) -> int:
    print(f"{PROGRAM}: {text}", file=sys.stderr)
    return 1
