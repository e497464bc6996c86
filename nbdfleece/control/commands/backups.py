"""Backups: a snapshot with a checkpoint that stays only if the backup is committed."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from ...engine.snapshot import BackupDisk, Release, Snapshot
from ...errors import StateError
from ..command import Command
from ..controlled import Controlled
from .disks import check_disks


class BackupDiskInfo(msgspec.Struct, kw_only=True, rename="kebab"):
    """What to read of one disk.

    Attributes:
        disk: The disk's name.
        export: The export that shows it.
        uris: How to reach the export, one per listener.
        mode: Whether all of it must be read, or what ``context`` calls dirty.
        context: The metadata context with the changes; null if all must be read.
        reason: Why all must be read although changes were asked for.
    """

    disk: str
    export: str
    uris: list[str]
    mode: Literal["full", "incremental"]
    context: str | None
    reason: str | None


class BackupInfo(msgspec.Struct, kw_only=True, rename="kebab"):
    """A backup that is neither committed nor aborted.

    Attributes:
        name: Of the backup and its snapshot.
        created: Its instant, in seconds since the epoch.
        checkpoint: What is kept if it is committed; null for none.
        error: Why it is broken; null while it is good.
        disks: What to read.
    """

    name: str
    created: float
    checkpoint: str | None
    error: str | None
    disks: list[BackupDiskInfo]


class QueryBackups(Command):
    """Describe all backups that are neither committed nor aborted."""

    async def run(self, server: Controlled) -> list[BackupInfo]:
        """Carry it out."""
        snapshots = server.engine.snapshots.values()
        return [_backup_info(server, each) for each in snapshots if each.backup is not None]


class BackupBegin(Command):
    """Freeze some disks (default: all) and export them, with what changed since a checkpoint.

    ``since`` is the checkpoint that was made with the backup that this one builds on; a disk
    that has no usable changes since then must be read in full, and ``reason`` says why.
    ``checkpoint`` is made in the same instant, for the next backup to build on, and is kept if
    this one is committed. ``only-changes`` keeps, and lets be read, only what changed.
    ``release`` says when ranges are given up: ``never``, when they are trimmed on the export,
    or when they have been read once.
    """

    name: str
    disks: list[str] | None = None
    checkpoint: str | None = None
    since: str | None = None
    owner: str = ""
    release: Release = Release.NEVER
    only_changes: bool = False

    async def run(self, server: Controlled) -> BackupInfo:
        """Carry it out."""
        check_disks(server, self.disks)
        await server.engine.begin_backup(
            self.name,
            self.disks,
            checkpoint=self.checkpoint,
            since=self.since,
            owner=self.owner,
            release=self.release,
            only_changes=self.only_changes,
        )
        return _backup_info(server, server.engine.snapshot(self.name))


class BackupCommit(Command):
    """Keep a backup's checkpoint and end its snapshot."""

    name: str

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        await server.engine.commit_backup(self.name)


class BackupAbort(Command):
    """End a backup as if it had not begun."""

    name: str

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        await server.engine.abort_backup(self.name)


def _backup_info(server: Controlled, snapshot: Snapshot) -> BackupInfo:
    if snapshot.backup is None:
        raise StateError(f"snapshot '{snapshot.name}' is not a backup's")
    return BackupInfo(
        name=snapshot.name,
        created=snapshot.created_ns / 1e9,
        checkpoint=snapshot.checkpoint,
        error=snapshot.error,
        disks=[_disk_info(server, part) for part in snapshot.backup],
    )


def _disk_info(server: Controlled, part: BackupDisk) -> BackupDiskInfo:
    return BackupDiskInfo(
        disk=part.disk,
        export=part.export,
        uris=server.export_uris(part.export),
        mode="full" if part.context is None else "incremental",
        context=part.context,
        reason=part.reason,
    )


COMMANDS: Final = (QueryBackups, BackupBegin, BackupCommit, BackupAbort)
