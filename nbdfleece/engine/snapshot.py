"""A snapshot: a temporary frozen view of one or more disks, all of the same instant."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..block.snapshot_access import SnapshotAccess
from .disk import Disk, Instant


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


@dataclass(slots=True, kw_only=True)
class Snapshot:
    """A frozen view.

    Attributes:
        name: Unique among the snapshots that stand.
        disks: By the disk's name.
        checkpoint: The checkpoint that was made in the same instant; None if there was none.
        is_pending: The checkpoint is kept only if the backup is committed.
        exports: Names of the exports that show the snapshot.
        created_ns: Nanoseconds since the epoch.
    """

    name: str
    disks: dict[str, SnapshotDisk]
    checkpoint: str | None = None
    is_pending: bool = False
    exports: list[str] = field(default_factory=list)
    created_ns: int = field(default_factory=time.time_ns)

    @property
    def error(self) -> str | None:
        """Why the snapshot is broken, and on which disk; None while it is good."""
        for name, part in self.disks.items():
            if part.node.error is not None:
                return f"disk '{name}': {part.node.error}"
        return None
