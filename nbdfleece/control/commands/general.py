"""The server itself: what it is, what it can be told, and its end."""

from __future__ import annotations

import os
from typing import Any, Final

import msgspec

from ..command import Command
from ..controlled import Controlled
from ..protocol import version
from ..registry import Schema


class CommandInfo(msgspec.Struct, kw_only=True):
    """A command."""

    name: str


class StatusInfo(msgspec.Struct, kw_only=True):
    """The server's state; it is there only while it runs."""

    status: str
    running: bool
    pid: int


class QueryVersion(Command):
    """Tell the version, in QEMU's shape; ``package`` has our own."""

    async def run(self, server: Controlled) -> dict[str, Any]:
        """Carry it out."""
        return version()


class QueryCommands(Command):
    """List the names of all commands."""

    async def run(self, server: Controlled) -> list[CommandInfo]:
        """Carry it out."""
        return [CommandInfo(name=name) for name in server.commands.names]


class QueryNbdfleeceSchema(Command):
    """Describe all commands: what they do, take and return, as JSON Schema."""

    async def run(self, server: Controlled) -> Schema:
        """Carry it out."""
        return server.commands.schema()


class QueryStatus(Command):
    """Tell whether the server runs, and as which process."""

    async def run(self, server: Controlled) -> StatusInfo:
        """Carry it out."""
        return StatusInfo(status="running", running=True, pid=os.getpid())


class Quit(Command):
    """Shut the server down: clients are let finish, what is pending is aborted."""

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        server.request_stop("host-qmp-quit")


COMMANDS: Final = (QueryVersion, QueryCommands, QueryNbdfleeceSchema, QueryStatus, Quit)
