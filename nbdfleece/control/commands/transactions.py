"""Transactions: several commands in one instant, all of them or none.

Spec: QEMU qapi/transaction.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec

from ...engine.jobs import StartBackup
from ...engine.snapshot import Release
from ...engine.transaction import Action, Draft, Freeze
from ...errors import StateError
from ..command import ActionCommand, Command
from ..controlled import Controlled
from ..drafts import final_form
from ..errors import QmpError
from ..registry import fill
from .disks import find_disk
from .graph import BlockdevBackup


class TransactionProperties(msgspec.Struct, forbid_unknown_fields=True, rename="kebab"):
    """QEMU's TransactionProperties."""

    completion_mode: Literal["individual", "grouped"] = "individual"


class AbortAction(Action):
    """Have the transaction fail."""

    def apply(self, draft: Draft) -> None:
        """Fail.

        Raises:
            StateError: Always.
        """
        raise StateError("Transaction aborted using Abort action")


class Abort(ActionCommand):
    """Have a transaction fail, after all the checks of the actions before it."""

    def action(self, server: Controlled) -> Action:
        """What is to be done."""
        return AbortAction()


class SnapshotAction(ActionCommand):
    """Freeze a view of some disks (default: all) at the transaction's instant."""

    name: str
    disks: list[str] | None = None
    release: Release = Release.NEVER

    def action(self, server: Controlled) -> Action:
        """What is to be done."""
        names = list(server.engine.disks) if self.disks is None else self.disks
        if not names or len(set(names)) < len(names):
            raise QmpError("name each disk once")
        return Freeze(self.name, [find_disk(server, name) for name in names], release=self.release)


class Transaction(Command):
    """Carry out several actions in one instant: all of them, or none.

    Actions are ``block-dirty-bitmap-add``, ``-remove``, ``-clear``, ``-enable``, ``-disable``,
    ``-merge``, ``blockdev-backup``, ``snapshot-create`` (without a checkpoint) and ``abort``.
    With ``completion-mode`` = ``grouped``, for backup jobs only, all are cancelled if one is.
    """

    actions: list[dict[str, Any]]
    properties: TransactionProperties | None = None

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        commands = [
            _build(server, f"actions[{index}].", given) for index, given in enumerate(self.actions)
        ]
        is_grouped = self.properties is not None and self.properties.completion_mode == "grouped"
        if is_grouped:
            self._check_grouped(commands)
        actions = [command.action(server) for command in commands]
        if is_grouped:
            jobs = [action.job for action in actions if isinstance(action, StartBackup)]
            for job in jobs:
                job.group = jobs
        await server.engine.transact(actions)

    def _check_grouped(self, commands: Sequence[Command]) -> None:
        for given, command in zip(self.actions, commands, strict=True):
            if not isinstance(command, BlockdevBackup | Abort):
                raise QmpError(
                    f"Action '{given['type']}' does not support Transaction property"
                    " completion-mode = grouped"
                )


_ACTIONS: Final[dict[str, type[ActionCommand]]] = {
    "abort": Abort,
    "snapshot-create": SnapshotAction,
}
"""What is an action only, or another one than the command of that name."""


def _build(server: Controlled, where: str, given: dict[str, Any]) -> ActionCommand:
    """The command of QEMU's TransactionAction ``{"type": NAME, "data": ARGUMENTS}``.

    Raises:
        QmpError: It is none, or not one for transactions; in QEMU's words.
    """
    for member in given:
        if member not in ("type", "data"):
            raise QmpError(f"Parameter '{where}{member}' is unexpected")
    for member, kind, word in (("type", str, "string"), ("data", dict, "object")):
        if member not in given:
            raise QmpError(f"Parameter '{where}{member}' is missing")
        if not isinstance(given[member], kind):
            raise QmpError(f"Invalid parameter type for '{where}{member}', expected: {word}")
    name, arguments = final_form(given["type"], given["data"])
    command = _ACTIONS.get(name) or server.commands.find(name)
    if command is None or not issubclass(command, ActionCommand):
        raise QmpError(f"Parameter 'type' does not accept value '{given['type']}'")
    return fill(command, arguments, f"{where}data.")


COMMANDS: Final = (Transaction,)
