"""Backup jobs of QEMU's commands with sync=none: a disk is frozen, its scratch image shows it.

Life of a job
    *created* and *running* at the instant of its transaction; cancelled, which is how such a
    job ends, it is *concluded*, and with that the frozen view ends and exports of it are
    removed. A job that was not to be dismissed by itself stays until it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..block.switchable import SwitchableView
from ..errors import StateError
from .chain import check_name
from .disk import Disk
from .graph import Graph, GraphNode
from .node_exports import NodeExports
from .snapshot import Snapshot
from .transaction import Action, BitmapNode, Draft


class NoJobError(StateError):
    """There is no such job."""


@dataclass(eq=False, slots=True, kw_only=True)
class BackupJob:
    """A job.

    Attributes:
        id: Its name, and its snapshot's.
        disk: What is frozen.
        target: The node that shows it.
        auto_finalize: As the client asked for; such a job has nothing to finalize.
        auto_dismiss: It is forgotten once it is concluded.
        status: QEMU's JobStatus.
        group: The jobs, this one among them, of which all are cancelled if one is.
        snapshot: What it keeps; None before and after.
    """

    id: str
    disk: Disk
    target: GraphNode
    auto_finalize: bool
    auto_dismiss: bool
    status: str = "created"
    group: Sequence[BackupJob] = ()
    snapshot: Snapshot | None = None

    def show(self) -> None:
        """Let the target show the frozen disk, or without a snapshot the live one."""
        assert isinstance(self.target.view, SwitchableView), "checked when the job was made"
        if self.snapshot is None:
            self.target.view.source = self.disk.node
        else:
            self.target.view.source = self.snapshot.disks[self.disk.name].node


class StartBackup(Action):
    """Start a job.

    Args:
        jobs: Where it is kept.
        job: The job, which is in ``jobs`` already, so that its name and its target are taken.
    """

    def __init__(self, jobs: Jobs, job: BackupJob) -> None:
        self._jobs = jobs
        self.job = job

    def nodes(self) -> Iterable[BitmapNode]:
        """The disk."""
        return (self.job.disk,)

    def apply(self, draft: Draft) -> None:
        """Freeze the disk and show it.

        Raises:
            StateError: The job's name is a snapshot's, or it was started already.
            OSError: The scratch file cannot be made.
        """
        self._jobs.claim(self.job)
        self.job.snapshot = draft.freeze(self.job.id, [self.job.disk])
        self.job.show()

    def committed(self) -> None:
        """It runs."""
        self._jobs.started(self.job)

    def taken_back(self) -> None:
        """It has never been."""
        self._jobs.unclaim(self.job)


class Jobs:
    """All jobs.

    Args:
        graph: Has the nodes.
        exports: Of the nodes.
        event: Called with the name and the data of each event.
    """

    def __init__(
        self, graph: Graph, exports: NodeExports, event: Callable[[str, Mapping[str, Any]], None]
    ) -> None:
        self._graph = graph
        self._exports = exports
        self._event = event
        self._jobs: dict[str, BackupJob] = {}

    def __iter__(self) -> Iterator[BackupJob]:
        return iter(list(self._jobs.values()))

    def backup(
        self, identity: str, device: str, target: str, *, auto_finalize: bool, auto_dismiss: bool
    ) -> StartBackup:
        """A job to be started in a transaction.

        Raises:
            StateError: A name is unknown, or the target is no scratch image over the disk.
        """
        disk = self._graph.find(device, device).disk
        node = self._graph.find(target, target)
        if disk is None or self._graph.find(device).view is not disk.node:
            raise StateError(f"node '{device}' is no disk")
        if not isinstance(node.view, SwitchableView) or node.disk is not disk:
            raise StateError(
                f"target '{target}' is no scratch image with '{device}' as its backing"
            )
        check_name(identity, "job")
        job = BackupJob(
            id=identity,
            disk=disk,
            target=node,
            auto_finalize=auto_finalize,
            auto_dismiss=auto_dismiss,
        )
        return StartBackup(self, job)

    def claim(self, job: BackupJob) -> None:
        """Take a job's name and target.

        Raises:
            StateError: One is taken.
        """
        for each in self:
            if each.snapshot is not None and each.target is job.target:
                raise StateError(
                    f"Node '{job.target.name}' is busy: block device is in use by block job: backup"
                )
        if job.id in self._jobs:
            raise StateError(f"Job ID '{job.id}' already in use")
        self._jobs[job.id] = job

    def unclaim(self, job: BackupJob) -> None:
        """Undo :meth:`claim`."""
        if self._jobs.get(job.id) is job:
            del self._jobs[job.id]
            job.snapshot = None
            job.show()

    def started(self, job: BackupJob) -> None:
        """Note that a job runs."""
        assert job.snapshot is not None, "it was frozen"
        job.snapshot.users.add(_user(job))
        self._set_status(job, "created")
        self._set_status(job, "running")

    def find(self, identity: str) -> BackupJob:
        """The job of that name.

        Raises:
            NoJobError: There is none.
        """
        try:
            return self._jobs[identity]
        except KeyError:
            raise NoJobError("Job not found") from None

    async def cancel(self, identity: str) -> None:
        """End a job, those of its group, and the exports of their targets.

        Raises:
            NoJobError: There is none.
            StateError: It has ended already, or something stands on a snapshot; jobs that were
                not ended run on.
        """
        job = self.find(identity)
        if job.status != "running" or job.snapshot is None:
            raise StateError(
                f"Job '{identity}' in state '{job.status}' cannot accept command verb 'cancel'"
            )
        ending = [job, *(each for each in job.group if each is not job)]
        ending = [each for each in ending if each.status == "running"]
        for each in ending:
            self._set_status(each, "aborting")
        try:
            while ending:
                await self._end(ending[-1])
                ending.pop()
        except BaseException:
            for each in ending:
                self._set_status(each, "running")
            raise

    async def _end(self, job: BackupJob) -> None:
        """End the frozen view of a job, and the job with it."""
        assert job.snapshot is not None, "it runs"
        await self._exports.close(job.target.view)
        await self._graph.end_snapshot(job.snapshot, _user(job))
        job.snapshot = None
        self._event(
            "BLOCK_JOB_CANCELLED",
            {"type": "backup", "device": job.id, "len": job.disk.size, "offset": 0, "speed": 0},
        )
        self._set_status(job, "concluded")
        if job.auto_dismiss:
            self._forget(job)

    def dismiss(self, identity: str) -> None:
        """Forget a job that has ended.

        Raises:
            NoJobError: There is none.
            StateError: It runs.
        """
        job = self.find(identity)
        if job.status != "concluded":
            raise StateError(
                f"Job '{identity}' in state '{job.status}' cannot accept command verb 'dismiss'"
            )
        self._forget(job)

    def are_on(self, node_name: str) -> bool:
        """Whether a job has a node as its target."""
        return any(each.target.name == node_name and each.snapshot is not None for each in self)

    async def close(self) -> None:
        """End all jobs."""
        for job in self:
            if job.status == "running":
                await self.cancel(job.id)

    def _forget(self, job: BackupJob) -> None:
        del self._jobs[job.id]
        self._event("JOB_STATUS_CHANGE", {"id": job.id, "status": "null"})

    def _set_status(self, job: BackupJob, status: str) -> None:
        job.status = status
        self._event("JOB_STATUS_CHANGE", {"id": job.id, "status": status})


def _user(job: BackupJob) -> str:
    return f"job '{job.id}'"
