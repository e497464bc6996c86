"""Writable overlays over disks and snapshots."""

from __future__ import annotations

from typing import Final

import msgspec

from ...engine.overlays import DiskOverlay
from ..command import Command
from ..controlled import Controlled
from .disks import find_disk


class OverlayInfo(msgspec.Struct, kw_only=True, rename="kebab"):
    """An overlay.

    Attributes:
        name: Of the overlay and of its export.
        disk: What it is committed into.
        snapshot: What shows through; null if that is the disk itself.
        created: Seconds since the epoch.
        uris: How to reach the export, one per listener.
    """

    name: str
    disk: str
    snapshot: str | None
    created: float
    uris: list[str]


class QueryOverlays(Command):
    """Describe all overlays, oldest first."""

    async def run(self, server: Controlled) -> list[OverlayInfo]:
        """Carry it out."""
        return [_info(server, each) for each in server.overlays]


class OverlayCreate(Command):
    """Export a writable overlay of a disk, or of the disk as of a snapshot.

    What is written to the export ``name`` is kept beside the disk until the overlay is
    committed or discarded, and goes with the server's end.
    """

    name: str
    disk: str
    snapshot: str | None = None

    async def run(self, server: Controlled) -> OverlayInfo:
        """Carry it out."""
        find_disk(server, self.disk)
        return _info(server, server.overlays.create(self.name, self.disk, self.snapshot))


class OverlayCommit(Command):
    """Write into the disk what was written to an overlay, and end the overlay.

    Its clients are disconnected first. If it fails the overlay is still there: commit it again.
    """

    name: str

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        await server.overlays.commit(self.name)


class OverlayDiscard(Command):
    """Throw away what was written to an overlay, and end it; its clients are disconnected."""

    name: str

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        await server.overlays.discard(self.name)


def _info(server: Controlled, overlay: DiskOverlay) -> OverlayInfo:
    return OverlayInfo(
        name=overlay.name,
        disk=overlay.disk.name,
        snapshot=None if overlay.snapshot is None else overlay.snapshot.name,
        created=overlay.created_ns / 1e9,
        uris=server.export_uris(overlay.name),
    )


COMMANDS: Final = (QueryOverlays, OverlayCreate, OverlayCommit, OverlayDiscard)
