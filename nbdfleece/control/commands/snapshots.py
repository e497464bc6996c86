"""Snapshots."""

from __future__ import annotations

from typing import Final

from ...engine.info import SnapshotInfo, snapshot_infos
from ...engine.snapshot import Release
from ..command import Command
from ..controlled import Controlled
from .disks import check_disks


class QuerySnapshots(Command):
    """Describe all snapshots, those of backups too."""

    async def run(self, server: Controlled) -> list[SnapshotInfo]:
        """Carry it out."""
        return snapshot_infos(server.engine)


class SnapshotCreate(Command):
    """Freeze a view of some disks (default: all) in one instant.

    With ``checkpoint``, a checkpoint of the same instant is made, which ``owner`` owns.
    ``release`` says when ranges are given up: ``never``, when they are trimmed on an export,
    or when they have been read once.
    """

    name: str
    disks: list[str] | None = None
    checkpoint: str | None = None
    owner: str = ""
    release: Release = Release.NEVER

    async def run(self, server: Controlled) -> SnapshotInfo:
        """Carry it out."""
        check_disks(server, self.disks)
        await server.engine.create_snapshot(
            self.name,
            self.disks,
            checkpoint=self.checkpoint,
            owner=self.owner,
            release=self.release,
        )
        return next(info for info in snapshot_infos(server.engine) if info.name == self.name)


class SnapshotDelete(Command):
    """End a snapshot and its exports; their clients are disconnected."""

    name: str

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        await server.engine.drop_snapshot(self.name)


COMMANDS: Final = (QuerySnapshots, SnapshotCreate, SnapshotDelete)
