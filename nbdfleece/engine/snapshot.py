"""A snapshot: a temporary frozen view of one or more disks, all of the same instant."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from ..bitmaps.bitmap import Bitmap
from ..block.copy_failure import CopyFailure
from ..block.snapshot_access import SnapshotAccess
from ..errors import StateError
from .chain import check_name
from .disk import Disk, Instant


class BackupDisk(NamedTuple):
    """What the client of a backup is told about one disk.

    Attributes:
        disk: The disk's name.
        export: The name of the export that shows it.
        context: The metadata context with the changes; None if everything must be read.
        reason: Why everything must be read although changes were asked for; else None.
    """

    disk: str
    export: str
    context: str | None
    reason: str | None


class Release(Enum):
    """When the copies of a snapshot's range are given back, and its protection ends."""

    NEVER = "never"
    """With the snapshot."""
    ON_TRIM = "trim"
    """When a client trims the range on an export of the snapshot."""
    ON_READ = "read"
    """When it has been read once."""


@dataclass(slots=True)
class SnapshotDisk:
    """One disk of a snapshot.

    Attributes:
        disk: The disk.
        node: Its fleece.
        instant: Its chain at the snapshot's instant, before the snapshot's own checkpoint.
    """

    disk: Disk
    node: SnapshotAccess
    instant: Instant

    async def changes(
        self, since: Mapping[str, str], between: Mapping[str, tuple[str, str]]
    ) -> dict[str, Bitmap]:
        """The changes that an export is to offer, by the names of their bitmaps.

        Args:
            since: For a checkpoint, the name of what changed from it to the snapshot.
            between: For a name, the checkpoints from which and to which.

        Raises:
            StateError: A name is there twice or cannot be, or changes are not known.
        """
        names = [*since.values(), *between]
        if len(set(names)) < len(names):
            raise StateError("two bitmaps of an export cannot have the same name")
        for name in names:
            check_name(name, "bitmap")
        found = {
            name: await self.disk.changes_since(checkpoint, self.instant)
            for checkpoint, name in since.items()
        }
        for name, (first, last) in between.items():
            found[name] = await self.disk.changes_between(first, last)
        return found


def freeze_disk(
    disk: Disk,
    release: Release,
    access: Bitmap | None = None,
    failure: CopyFailure | None = None,
    *,
    freezing: bool = False,
) -> SnapshotDisk:
    """Freeze a view of a disk while its guest's writes are held back.

    Args:
        disk: The disk.
        release: When ranges of the view are given up.
        access: If given, only what it marks is kept and may be read.
        failure: When a copy has failed and what that breaks, if not as usual.
        freezing: As for :meth:`Disk.instant`.

    Raises:
        OSError: The scratch file cannot be made.
    """
    instant = disk.instant(freezing=freezing)
    node = SnapshotAccess(
        disk.copies,
        disk.copies.add_layer(access, failure),
        disk.size,
        disk.node.preferred_block_size,
        release_after_read=release is Release.ON_READ,
    )
    return SnapshotDisk(disk, node, instant)


@dataclass(slots=True, kw_only=True)
class Snapshot:
    """A frozen view.

    Attributes:
        name: Unique among the snapshots that stand.
        disks: By the disk's name.
        checkpoint: The checkpoint that was made in the same instant; None if there was none.
        release: When ranges of it are given up.
        is_pending: The checkpoint is kept only if the backup is committed.
        exports: Names of the exports that show the snapshot.
        users: The overlays and nodes that stand on it; it is not dropped under them.
        backup: What the backup that it was taken for reads; None if it is no backup's.
        created_ns: Nanoseconds since the epoch.
    """

    name: str
    disks: dict[str, SnapshotDisk]
    checkpoint: str | None = None
    release: Release = Release.NEVER
    is_pending: bool = False
    exports: list[str] = field(default_factory=list)
    users: set[str] = field(default_factory=set)
    backup: Sequence[BackupDisk] | None = None
    created_ns: int = field(default_factory=time.time_ns)

    @property
    def is_unfinished(self) -> bool:
        """It is a backup's that is neither committed nor aborted."""
        return self.is_pending or self.backup is not None

    def check_unused(self) -> None:
        """Refuse to be dropped under an overlay or a node.

        Raises:
            StateError: One stands on it.
        """
        for user in self.users:
            raise StateError(f"{user} stands on snapshot '{self.name}'")

    @property
    def error(self) -> str | None:
        """Why the snapshot is broken, and on which disk; None while it is good."""
        for name, part in self.disks.items():
            if part.node.error is not None:
                return f"disk '{name}': {part.node.error}"
        return None
