"""Options about a server's sockets beside ``--listen``: permissions, and who else opened them."""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Callable

import click

from ..errors import UsageError
from ..server.listener import SocketFile
from .options import option_group

listen_options = option_group(
    click.option(
        "--socket-mode",
        metavar="MODE",
        help="Permissions of Unix sockets for NBD, such as 0660. Default: as the umask says.",
    ),
    click.option(
        "--socket-owner",
        metavar="USER[:GROUP]",
        help="Their owner and group, by name or number.",
    ),
    click.option(
        "--stdio",
        is_flag=True,
        help="Serve one connection on stdin and stdout, as inetd passes it, and end with it.",
    ),
)


def keep_stderr_from_client() -> None:
    """With --stdio: log nowhere if stderr is the client too, as inetd has it."""
    mine, others = os.fstat(2), [os.fstat(fd) for fd in (0, 1)]
    if any(os.path.samestat(mine, other) for other in others):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)


def parse_socket_file(mode: str | None, owner: str | None) -> SocketFile:
    """Read permissions and ``USER[:GROUP]``.

    Raises:
        UsageError: They are none, or there is no such user or group.
    """
    if mode is not None and not re.fullmatch("0?[0-7]{3}", mode):
        raise UsageError(f"--socket-mode is three octal digits such as 660, not '{mode}'")
    user, _, group = (owner or "").partition(":")
    return SocketFile(
        mode=None if mode is None else int(mode, 8),
        uid=_find("user", user, lambda name: pwd.getpwnam(name).pw_uid),
        gid=_find("group", group, lambda name: grp.getgrnam(name).gr_gid),
    )


def _find(kind: str, name: str, find: Callable[[str], int]) -> int:
    if not name:
        return -1
    if name.isdecimal():
        return int(name)
    try:
        return find(name)
    except KeyError:
        raise UsageError(f"--socket-owner: there is no {kind} '{name}'") from None
