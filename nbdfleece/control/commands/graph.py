"""QEMU's commands that build a graph of nodes for fleecing.

Both of QEMU's schemes work: a scratch image with the live disk as its backing node and
``blockdev-backup`` with sync=none, and ``copy-before-write`` with ``snapshot-access``. What
they show is kept in the scratch of the disk, with its options, and not in the scratch images,
which are only names here.

Spec: QEMU qapi/block-core.json.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec

from ...engine.graph import guest_policy
from ...engine.jobs import BackupJob, NoJobError
from ...engine.transaction import Action
from ..command import ActionCommand, Command
from ..controlled import Controlled
from ..errors import QmpError
from .bitmaps import BitmapReference, find_node

Driver = Literal["file", "raw", "qcow2", "copy-before-write", "snapshot-access"]

_COMMON: Final = {"driver", "node_name"}
_ABOUT_FILES: Final = {"read_only", "auto_read_only", "discard", "cache", "detect_zeroes"}
"""What QEMU can be told of a file or an image. ``auto-read-only`` and ``cache`` change nothing."""

_OPTIONS: Final[dict[str, set[str]]] = {
    "file": _COMMON | _ABOUT_FILES | {"filename", "aio", "locking"},
    "raw": _COMMON | _ABOUT_FILES | {"file"},
    "qcow2": _COMMON | _ABOUT_FILES | {"file", "backing"},
    "copy-before-write": _COMMON | {"file", "target", "bitmap", "on_cbw_error", "cbw_timeout"},
    "snapshot-access": _COMMON | {"file", "discard"},
}
_REQUIRED: Final = {
    "file": "filename",
    "raw": "file",
    "qcow2": "file",
    "copy-before-write": "file",
    "snapshot-access": "file",
}


class BlockdevAdd(Command):
    """Add a node.

    ``qcow2`` and ``raw`` over a ``file`` open a new disk, which blockdev-del closes; export it
    to have it written to. With ``read-only`` it is only shown. Its guest's discards have an effect
    unless ``discard`` is ``ignore``, and zeroes are data unless ``detect-zeroes`` says otherwise;
    both are said of the disk, not of the file below it. ``qcow2`` with a disk as
    ``backing`` is a scratch image for a backup job. ``raw`` over another node is one more name
    for that. ``copy-before-write`` freezes the disk ``file`` at once, since the guest's node is
    above it already; ``on-cbw-error`` and ``cbw-timeout`` are the server's if they are left out.
    ``snapshot-access`` shows what it keeps; with ``discard`` = ``unmap`` TRIM gives ranges up.
    """

    driver: Driver
    node_name: str
    filename: str | None = None
    file: str | None = None
    backing: str | None = None
    target: str | None = None
    bitmap: BitmapReference | None = None
    on_cbw_error: Literal["break-snapshot", "break-guest-write"] | None = None
    cbw_timeout: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] | None = None
    discard: Literal["ignore", "unmap"] | None = None
    read_only: bool | None = None
    auto_read_only: bool | None = None
    detect_zeroes: Literal["off", "on", "unmap"] | None = None
    cache: dict[str, bool] | None = None
    aio: str | None = None
    locking: str | None = None

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        self._check_options()
        graph, file, read_only = server.graph, self.file or "", bool(self.read_only)
        policy = guest_policy(self.discard, self.detect_zeroes)
        if self.driver == "file":
            graph.add_file(self.node_name, self.filename or "", read_only=read_only)
        elif self.driver == "raw":
            await graph.add_raw(self.node_name, file, policy, read_only=read_only)
        elif self.driver == "qcow2":
            await graph.add_qcow2(self.node_name, file, self.backing, policy, read_only=read_only)
        elif self.driver == "snapshot-access":
            graph.add_snapshot_access(self.node_name, file, unmap=self.discard == "unmap")
        else:
            await self._add_copy_before_write(server, file)

    def _check_options(self) -> None:
        required = [_REQUIRED[self.driver]]
        if self.driver == "copy-before-write":
            required.append("target")
        for name in self.__struct_fields__:
            if getattr(self, name) is not None and name not in _OPTIONS[self.driver]:
                raise QmpError(f"Parameter '{name.replace('_', '-')}' is unexpected")
        for name in required:
            if getattr(self, name) is None:
                raise QmpError(f"Parameter '{name}' is missing")

    async def _add_copy_before_write(self, server: Controlled, file: str) -> None:
        limit = None
        if self.bitmap is not None:
            limit = find_node(server, self.bitmap.node), self.bitmap.name
        await server.graph.add_copy_before_write(
            self.node_name, file, self.target or "", limit, self.on_cbw_error, self.cbw_timeout
        )


class BlockdevDel(Command):
    """Remove a node that was added; with a copy-before-write node its snapshot ends."""

    node_name: str

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        if server.node_exports.are_on(self.node_name) or server.jobs.are_on(self.node_name):
            raise QmpError(f"Node {self.node_name} is in use")
        for overlay in server.overlays:
            if overlay.disk.name == self.node_name:
                raise QmpError(f"{overlay.title} stands on node {self.node_name}")
        await server.graph.remove(self.node_name)


class ReopenOptions(msgspec.Struct, forbid_unknown_fields=True, rename="kebab"):
    """QEMU's BlockdevOptions, for raw nodes."""

    driver: Literal["raw"]
    node_name: str
    file: str
    discard: Literal["ignore", "unmap"] | None = None


class BlockdevReopen(Command):
    """Put raw nodes of a disk over a copy-before-write node of that disk, or back.

    That changes nothing: the guest's writes go through copy-before-write all the time. Anything
    else is refused.
    """

    options: list[ReopenOptions]

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        for each in self.options:
            server.graph.reopen_raw(each.node_name, each.file)


class BlockdevBackup(ActionCommand):
    """Freeze a disk, and let a scratch image that has it as its backing node show it so.

    The job ends by block-job-cancel. Only ``sync`` = ``none`` is there: to copy a disk, pull it.
    """

    device: str
    target: str
    sync: Literal["full", "top", "none", "incremental", "bitmap"]
    job_id: str | None = None
    auto_finalize: bool = True
    auto_dismiss: bool = True

    def action(self, server: Controlled) -> Action:
        """What is to be done."""
        if self.sync != "none":
            raise QmpError(
                f"sync '{self.sync}' is not supported, only 'none': pull the disk from an export"
            )
        return server.jobs.backup(
            self.device if self.job_id is None else self.job_id,
            self.device,
            self.target,
            auto_finalize=self.auto_finalize,
            auto_dismiss=self.auto_dismiss,
        )


class BlockJobCancel(Command):
    """End a job; exports of its target are removed first."""

    device: str
    force: bool = False

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        try:
            await server.jobs.cancel(self.device)
        except NoJobError:
            raise QmpError(f"Block job '{self.device}' not found", "DeviceNotActive") from None


class JobCancel(Command):
    """End a job; exports of its target are removed first."""

    id: str

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        await server.jobs.cancel(self.id)


class JobDismiss(Command):
    """Forget a job that has ended and was not to be forgotten by itself."""

    id: str

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        server.jobs.dismiss(self.id)


class BlockJobDismiss(Command):
    """As job-dismiss."""

    id: str

    async def run(self, server: Controlled) -> None:
        """Carry it out."""
        server.jobs.dismiss(self.id)


class QueryJobs(Command):
    """List all jobs, in QEMU's shape."""

    async def run(self, server: Controlled) -> list[dict[str, Any]]:
        """Carry it out."""
        return [
            {
                "id": job.id,
                "type": "backup",
                "status": job.status,
                "current-progress": 0,
                "total-progress": job.disk.size,
                **_error(job),
            }
            for job in server.jobs
        ]


class QueryBlockJobs(Command):
    """List all block jobs, in QEMU's shape."""

    async def run(self, server: Controlled) -> list[dict[str, Any]]:
        """Carry it out."""
        return [
            {
                "type": "backup",
                "device": job.id,
                "len": job.disk.size,
                "offset": 0,
                "busy": False,
                "paused": False,
                "speed": 0,
                "io-status": "ok" if _is_good(job) else "failed",
                "ready": False,
                "status": job.status,
                "auto-finalize": job.auto_finalize,
                "auto-dismiss": job.auto_dismiss,
                **_error(job),
            }
            for job in server.jobs
        ]


def _is_good(job: BackupJob) -> bool:
    return job.snapshot is None or job.snapshot.error is None


def _error(job: BackupJob) -> dict[str, str]:
    """Why it ended, or why what it shows is broken."""
    if job.status == "concluded":
        return {"error": "Operation canceled"}
    if job.snapshot is not None and job.snapshot.error is not None:
        return {"error": job.snapshot.error}
    return {}


COMMANDS: Final = (
    BlockdevAdd,
    BlockdevDel,
    BlockdevReopen,
    BlockdevBackup,
    BlockJobCancel,
    JobCancel,
    JobDismiss,
    BlockJobDismiss,
    QueryJobs,
    QueryBlockJobs,
)
