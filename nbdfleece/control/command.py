"""Commands as typed data: what a command takes, what it gives, what it does, in one class."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import msgspec

from ..engine.transaction import Action
from .controlled import Controlled


class Command(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """A command with its arguments. An argument that may be left out may also be null.

    The docstring of each is its documentation for its users.
    """

    @abstractmethod
    async def run(self, server: Controlled) -> Any:
        """Carry the command out.

        Returns:
            What becomes ``return``; None for the empty object.

        Raises:
            NbdfleeceError, OSError: Why it failed.
        """


class ActionCommand(Command):
    """A command that may also be an action of a transaction."""

    @abstractmethod
    def action(self, server: Controlled) -> Action:
        """What is to be done, not done yet.

        Raises:
            NbdfleeceError: It cannot be.
        """

    async def run(self, server: Controlled) -> None:
        """Carry it out alone."""
        await server.engine.transact([self.action(server)])
