"""The client side: pull, restore and verify over libnbd, against any NBD server.

A backup directory holds restore points; each is one qcow2 file per disk, full or with the
file of an older point as its backing file, and a manifest with checksums. ::

    import asyncio
    from nbdfleece.backup import BackupDirectory, DiskUri, auto_requests, pull, verify

    async def backup() -> None:
        directory = BackupDirectory("/srv/backup/web1")
        disks = [DiskUri("vda", "nbd://host/vda")]
        requests = await auto_requests(directory, disks)
        await pull(requests, directory, point="monday", checkpoint="monday")
        assert not (await verify(directory)).problems

    asyncio.run(backup())

The functions that wait are coroutines; they use libnbd's Python binding, which comes with
libnbd (Debian: python3-libnbd) and is imported when it is first needed.
"""

from __future__ import annotations

from .building import discard
from .choose import DiskUri, auto_requests, full_requests, since_requests
from .directory import BackupDirectory, split_point
from .errors import BackupError, ChecksumError, InterruptedPullError, ServerError
from .import_stream import import_stream, restore_stream
from .manifest import DiskEntry, Point
from .prune import prune, surplus
from .pull import DiskRequest, Estimate, PullOptions, Resume, estimate, pull
from .pull_stream import Streamed, StreamRequest, pull_stream
from .rate import RateLimit
from .restore import Restored, RestoreOptions, restore
from .source import Source, offered_bitmaps
from .target import Target, open_target
from .transfer import Progress
from .verify import Difference, Verified, compare, verify

__all__ = [
    "BackupDirectory",
    "BackupError",
    "ChecksumError",
    "Difference",
    "DiskEntry",
    "DiskRequest",
    "DiskUri",
    "Estimate",
    "InterruptedPullError",
    "Point",
    "Progress",
    "PullOptions",
    "RateLimit",
    "RestoreOptions",
    "Restored",
    "Resume",
    "ServerError",
    "Source",
    "StreamRequest",
    "Streamed",
    "Target",
    "Verified",
    "auto_requests",
    "compare",
    "discard",
    "estimate",
    "full_requests",
    "import_stream",
    "offered_bitmaps",
    "open_target",
    "prune",
    "pull",
    "pull_stream",
    "restore",
    "restore_stream",
    "since_requests",
    "split_point",
    "surplus",
    "verify",
]
