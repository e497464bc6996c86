"""Exports: what NBD clients can name."""

from __future__ import annotations

from typing import Final

from ...engine.info import ExportInfo, export_infos
from ..command import Command
from ..controlled import Controlled
from ..errors import QmpError


class NbdExportInfo(ExportInfo, kw_only=True, rename="kebab"):
    """An export, and how clients reach it: one NBD URI per listener."""

    uris: list[str]


def nbd_export_infos(server: Controlled) -> list[NbdExportInfo]:
    """Describe all exports."""
    return [_with_uris(server, info) for info in export_infos(server.engine)]


def _with_uris(server: Controlled, info: ExportInfo) -> NbdExportInfo:
    fields = {name: getattr(info, name) for name in info.__struct_fields__}
    return NbdExportInfo(uris=server.export_uris(info.name), **fields)


class QueryNbdExports(Command):
    """Describe all exports, with their contexts, clients and NBD URIs."""

    async def run(self, server: Controlled) -> list[NbdExportInfo]:
        """Carry it out."""
        return nbd_export_infos(server)


class SnapshotExportAdd(Command):
    """Export a disk of a snapshot, read-only; its name is SNAPSHOT/DISK unless given.

    ``since`` maps checkpoints to the bitmap names under which the changes from them to the
    snapshot are shown (``qemu:dirty-bitmap:NAME``); ``between`` maps bitmap names to the
    checkpoint from which and the later one up to which they show changes.
    """

    snapshot: str
    disk: str
    name: str | None = None
    since: dict[str, str] | None = None
    between: dict[str, tuple[str, str]] | None = None

    async def run(self, server: Controlled) -> NbdExportInfo:
        """Carry it out."""
        export = await server.engine.add_export(
            self.snapshot, self.disk, name=self.name, since=self.since, between=self.between
        )
        return next(info for info in nbd_export_infos(server) if info.name == export.name)


class SnapshotExportRemove(Command):
    """Remove an export of a snapshot; its clients are disconnected."""

    name: str

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        for snapshot in server.engine.snapshots.values():
            if snapshot.backup is not None and self.name in snapshot.exports:
                raise QmpError(f"export '{self.name}' belongs to backup '{snapshot.name}'")
        await server.engine.remove_export(self.name)


COMMANDS: Final = (QueryNbdExports, SnapshotExportAdd, SnapshotExportRemove)
