"""Checkpoints."""

from __future__ import annotations

from typing import Final

from ...engine import cumulative
from ...engine.info import CheckpointInfo, checkpoint_infos
from ..command import Command
from ..controlled import Controlled
from .disks import check_disks, find_disk


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


class CheckpointPrune(Command):
    """Delete all checkpoints but the newest ``keep``, or those older than so many seconds.

    With ``owner``, only that owner's are counted and deleted. Returns the deleted names.
    """

    keep: int | None = None
    older_than: float | None = None
    owner: str | None = None

    async def run(self, server: Controlled) -> list[str]:
        """Carry it out."""
        return await server.engine.prune_checkpoints(
            keep=self.keep, older_than_seconds=self.older_than, owner=self.owner
        )


class CheckpointAdopt(Command):
    """Make checkpoints of a disk's cumulative bitmaps, as libvirt keeps them, oldest first."""

    disk: str
    bitmaps: list[str]
    owner: str = ""

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        await server.engine.change_bitmaps(
            find_disk(server, self.disk),
            lambda disk: cumulative.adopted(disk, self.bitmaps, owner=self.owner),
        )


class CheckpointHandOver(Command):
    """Make a disk's checkpoints cumulative bitmaps, as libvirt keeps them; the chain ends."""

    disk: str

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        disk = find_disk(server, self.disk)
        await server.engine.change_bitmaps(disk, cumulative.handed_over)


COMMANDS: Final = (
    QueryCheckpoints,
    CheckpointCreate,
    CheckpointDelete,
    CheckpointPrune,
    CheckpointAdopt,
    CheckpointHandOver,
)
