"""Writable overlays over disks and snapshots: committed into the disk, or thrown away.

A restore goes into an overlay first, and the disk changes only when that is committed; or a
backup is tried out by writing to a snapshot, with nothing touched. The committed granules are
written as the guest writes: bitmaps and snapshots that stand see them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from ..block.node import BlockNode
from ..block.overlay import Overlay
from ..errors import StateError
from ..export.export import Export
from .chain import check_name
from .disk import Disk, ScratchOptions
from .engine import Engine
from .exports import writable_export
from .snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class DiskOverlay:
    """An overlay of a disk, exported under its own name.

    Attributes:
        name: Its name, and its export's.
        disk: What it is committed into.
        snapshot: What shows through; None if that is the disk itself.
        node: Its bytes.
        created_ns: Nanoseconds since the epoch.
    """

    name: str
    disk: Disk
    snapshot: Snapshot | None
    node: Overlay
    created_ns: int = field(default_factory=time.time_ns)

    @property
    def title(self) -> str:
        """What it is called in messages."""
        return f"overlay '{self.name}'"


class Overlays:
    """The overlays over an engine's disks.

    Args:
        engine: The engine; a snapshot on which an overlay stands cannot be dropped.
        scratch: Where what is written goes, and how much.
        disconnect: Called with the name of an export that was removed; returns once no
            client uses it any more.
    """

    def __init__(
        self,
        engine: Engine,
        scratch: ScratchOptions,
        disconnect: Callable[[str], Awaitable[None]],
    ) -> None:
        self._engine = engine
        self._scratch = scratch
        self._disconnect = disconnect
        self._overlays: dict[str, DiskOverlay] = {}
        self._ending = asyncio.Lock()

    def __iter__(self) -> Iterator[DiskOverlay]:
        return iter(list(self._overlays.values()))

    def create(self, name: str, disk: str, snapshot: str | None = None) -> DiskOverlay:
        """Make an overlay and export it for writing.

        Args:
            name: What to call it and its export.
            disk: The disk.
            snapshot: The snapshot of it that shows through; None for the disk itself, which
                nobody else should write to meanwhile.

        Raises:
            StateError: A name is taken or unknown.
            OSError: The scratch file cannot be made.
        """
        check_name(name, "overlay")
        if self._engine.exports.has(name):
            raise StateError(f"export '{name}' exists already")
        found = self._engine.disk(disk)
        base: BlockNode = found.node
        view = None if snapshot is None else self._engine.snapshot(snapshot)
        if view is not None:
            if disk not in view.disks:
                raise StateError(f"snapshot '{view.name}' has no disk '{disk}'")
            base = view.disks[disk].node
        options = self._scratch
        node = Overlay(base, options.directory, quota=options.quota)
        overlay = DiskOverlay(name, found, view, node)
        self._engine.exports.add(_export(overlay))
        self._overlays[name] = overlay
        if view is not None:
            view.users.add(overlay.title)
        return overlay

    async def commit(self, name: str) -> None:
        """Write what was written to an overlay into its disk, durably, and end the overlay.

        Raises:
            StateError: There is none of that name.
            OSError: The disk holds a part of it; the overlay is still there: commit it again.
        """
        async with self._ending:
            overlay = self._find(name)
            await self._close_export(name)
            try:
                await overlay.node.commit(overlay.disk.node)
            except BaseException:
                self._engine.exports.add(_export(overlay))
                raise
            await self._forget(overlay)

    async def discard(self, name: str) -> None:
        """Throw away what was written to an overlay, and end it.

        Raises:
            StateError: There is none of that name.
        """
        async with self._ending:
            overlay = self._find(name)
            await self._close_export(name)
            await self._forget(overlay)

    async def close(self) -> None:
        """Throw all overlays away."""
        for name in list(self._overlays):
            await self.discard(name)

    def _find(self, name: str) -> DiskOverlay:
        try:
            return self._overlays[name]
        except KeyError:
            raise StateError(f"there is no overlay '{name}'") from None

    async def _close_export(self, name: str) -> None:
        self._engine.exports.remove(name)
        await self._disconnect(name)

    async def _forget(self, overlay: DiskOverlay) -> None:
        if overlay.snapshot is not None:
            overlay.snapshot.users.discard(overlay.title)
        del self._overlays[overlay.name]
        await overlay.node.close()


def _export(overlay: DiskOverlay) -> Export:
    description = f"writable overlay of disk {overlay.disk.name}"
    return writable_export(overlay.name, overlay.node, description)
