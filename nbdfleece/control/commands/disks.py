"""Disks and their bitmaps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ...engine.disk import Disk
from ...engine.info import BitmapInfo, DiskInfo, disk_info
from ..command import Command
from ..controlled import Controlled
from ..errors import QmpError


def find_disk(server: Controlled, name: str) -> Disk:
    """The disk of that name.

    Raises:
        QmpError: There is none.
    """
    disk = server.engine.disks.get(name)
    if disk is None:
        raise QmpError(f"there is no disk '{name}'", "DeviceNotFound")
    return disk


def check_disks(server: Controlled, names: Iterable[str] | None) -> None:
    """Refuse names of disks that there are not; None stands for all disks.

    Raises:
        QmpError: There is no such disk.
    """
    for name in names or ():
        find_disk(server, name)


class DiskBitmapInfo(BitmapInfo, kw_only=True, rename="kebab"):
    """A bitmap, and the disk that it belongs to."""

    disk: str


class QueryDisks(Command):
    """Describe all disks: image, size, bitmaps, checkpoints, scratch in use."""

    async def run(self, server: Controlled) -> list[DiskInfo]:
        """Carry it out."""
        return [await disk_info(disk) for disk in list(server.engine.disks.values())]


class QueryBitmaps(Command):
    """Describe the dirty bitmaps of one disk, or of all."""

    disk: str | None = None

    async def run(self, server: Controlled) -> list[DiskBitmapInfo]:
        """Carry it out."""
        disks = server.engine.disks
        chosen = list(disks.values()) if self.disk is None else [find_disk(server, self.disk)]
        found = []
        for disk in chosen:
            info = await disk_info(disk)
            found += [_with_disk(bitmap, disk.name) for bitmap in info.bitmaps]
        return found


def _with_disk(bitmap: BitmapInfo, disk: str) -> DiskBitmapInfo:
    fields = {name: getattr(bitmap, name) for name in bitmap.__struct_fields__}
    return DiskBitmapInfo(disk=disk, **fields)


COMMANDS: Final = (QueryDisks, QueryBitmaps)
