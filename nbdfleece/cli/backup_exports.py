"""``nbdfleece serve --backup``: restore points as exports."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..backup.serving import ServedDisk
    from ..export.export import Export


@asynccontextmanager
async def backup_exports(text: str) -> AsyncIterator[Sequence[Export]]:
    """The exports of ``DIR[@POINT]``; no point is pruned meanwhile.

    Raises:
        BackupError: A point is not there, or its chain is broken.
        StateError: A prune is under way.
    """
    from ..backup import BackupDirectory, split_point
    from ..backup.serving import ServedPoints

    folder, name = split_point(text)
    names = None if name is None else [name]
    async with ServedPoints(BackupDirectory(folder), names) as served:
        yield [_export(disk) for disk in served.disks]


def _export(disk: ServedDisk) -> Export:
    from ..export.contexts import AllocationDepth, BaseAllocation
    from ..export.export import Export

    return Export(
        name=f"{disk.point}/{disk.disk}",
        node=disk.node,
        description=f"disk {disk.disk} of restore point {disk.point}",
        contexts=(BaseAllocation(disk.node), AllocationDepth(disk.node), *disk.differences),
    )
