"""Checkpoints."""

from __future__ import annotations

from typing import Final

from ...engine.info import CheckpointInfo, checkpoint_infos
from ..command import Command
from ..controlled import Controlled
from .disks import check_disks


class QueryCheckpoints(Command):
    """Describe all checkpoints, oldest first, with what changed after each on each disk."""

    async def run(self, server: Controlled) -> list[CheckpointInfo]:
        """Carry it out."""
        return await checkpoint_infos(server.engine)


class CheckpointCreate(Command):
    """Make a checkpoint of some disks (default: all) in one instant, without a snapshot."""

    name: str
    disks: list[str] | None = None
    owner: str = ""

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        check_disks(server, self.disks)
        await server.engine.create_checkpoint(self.name, self.disks, owner=self.owner)


class CheckpointDelete(Command):
    """Delete a checkpoint on all its disks; its changes go to the one before it."""

    name: str

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        await server.engine.delete_checkpoint(self.name)


COMMANDS: Final = (QueryCheckpoints, CheckpointCreate, CheckpointDelete)
