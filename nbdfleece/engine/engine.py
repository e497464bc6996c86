"""The engine: disks, snapshots and checkpoints, and the operations over several of them.

Life of a backup
    :meth:`Engine.begin_backup` takes a snapshot of some disks and makes a *pending*
    checkpoint, in one instant (rule 3); the exports of the snapshot are read; then
    :meth:`Engine.commit_backup` keeps the checkpoint, or :meth:`Engine.abort_backup` merges
    it away, as if it had never been.

A lock serialises the operations that change bitmaps, chains or snapshots. Guest
writes and snapshot reads never take it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from ..bitmaps.bitmap import Bitmap
from ..block.guest_options import DEFAULT_POLICY, GuestPolicy
from ..block.node import BlockNode
from ..errors import StateError
from ..export.contexts import DirtyBitmap
from ..export.export import Export, ExportTable
from . import checkpoints, joint
from .chain import check_name
from .disk import Disk, ScratchOptions
from .disk_state import DiskState
from .exports import live_export, snapshot_export
from .snapshot import BackupDisk, Release, Snapshot, freeze_disk
from .transaction import Action, carry_out

_log = logging.getLogger("nbdfleece.engine")


async def _nobody_serves(export: Export) -> None:
    """For an engine without a server."""


async def _nobody_connected(export: str) -> None:
    """Likewise."""


class Engine:
    """Disks, snapshots, checkpoints.

    Args:
        exports: The table that the server serves from; the engine adds and removes its own.
        scratch: How snapshots are kept.
        delegate: Called with each export of a snapshot once it is offered; others may serve it.
        disconnect: Called with the name of an export that was removed; returns once no
            client uses it any more.
        event: Called with the name and the data of each event.

    Attributes:
        changing: Held while disks, snapshots or chains change, and by who must see them hold still.
    """

    def __init__(
        self,
        exports: ExportTable,
        scratch: ScratchOptions | None = None,
        *,
        delegate: Callable[[Export], Awaitable[None]] = _nobody_serves,
        disconnect: Callable[[str], Awaitable[None]] = _nobody_connected,
        event: Callable[[str, Mapping[str, Any]], None] = lambda name, data: None,
    ) -> None:
        self.exports = exports
        self.disks: dict[str, Disk] = {}
        self.snapshots: dict[str, Snapshot] = {}
        self._scratch = scratch or ScratchOptions()
        self.delegate = delegate
        self._disconnect = disconnect
        self._event = event
        self.changing = asyncio.Lock()

    # -- disks --------------------------------------------------------------------

    async def open_disk(
        self,
        name: str,
        path: Path,
        policy: GuestPolicy = DEFAULT_POLICY,
        *,
        is_exported: bool = True,
        is_raw: bool = False,
        data: BlockNode | None = None,
    ) -> Disk:
        """Open an image for the guest, and export it under the disk's name.

        Args:
            name: What to call it.
            path: The image.
            policy: What becomes of the guest's discards and zeroes.
            is_exported: False leaves exporting it to the caller.
            is_raw: It is no qcow2 image but the disk's bytes.
            data: What has the guest's bytes, if it is not the image; see :meth:`Disk.open`.

        Raises:
            StateError: The name is taken.
            OSError, ImageError: The image cannot be opened.
        """
        async with self.changing:
            check_name(name, "disk")
            if name in self.disks:
                raise StateError(f"disk '{name}' exists already")
            if is_exported and self.exports.has(name):
                raise StateError(f"export '{name}' exists already")
            disk = await Disk.open(
                name,
                path,
                self._scratch,
                lambda _: self._tell_broken(name),
                policy,
                is_raw=is_raw,
                data=data,
            )
            try:
                if is_exported:
                    self.exports.add(live_export(disk))
            except BaseException:
                await disk.close()
                raise
            self.disks[name] = disk
            return disk

    async def give_up_disk(self, disk: Disk) -> None:
        """Forget a disk, which the caller closes, and its exports before.

        Raises:
            StateError: A snapshot stands on it.
        """
        async with self.changing:
            for snapshot in self.snapshots.values():
                if disk.name in snapshot.disks:
                    raise StateError(f"snapshot '{snapshot.name}' stands on disk '{disk.name}'")
            del self.disks[disk.name]

    def disk(self, name: str) -> Disk:
        """The disk of that name.

        Raises:
            StateError: There is none.
        """
        try:
            return self.disks[name]
        except KeyError:
            raise StateError(f"there is no disk '{name}'") from None

    def _chosen(self, names: Iterable[str] | None) -> list[Disk]:
        """The named disks, or all."""
        chosen = [self.disk(name) for name in (self.disks if names is None else names)]
        if not chosen:
            raise StateError("there is no disk")
        if len({disk.name for disk in chosen}) < len(chosen):
            raise StateError("a disk is named twice")
        return chosen

    async def close(self) -> None:
        """Abort what is pending, drop all snapshots, and close all disks.

        Every disk is tried; the last error is raised at the end.
        """
        async with AsyncExitStack() as ending:
            for disk in self.disks.values():
                ending.push_async_callback(self._end_disk, disk)
            for name, snapshot in self.snapshots.items():
                if snapshot.is_unfinished:
                    ending.push_async_callback(self.abort_backup, name)
                else:
                    ending.push_async_callback(self.drop_snapshot, name, is_told=False)

    async def _end_disk(self, disk: Disk) -> None:
        """End a disk's live export, if it has one, and close the disk."""
        del self.disks[disk.name]
        try:
            export = self.exports.find(disk.name)
            if export is not None and export.node is disk.node:
                self.exports.remove(disk.name)
                await self._disconnect(disk.name)
        finally:
            await disk.close()

    # -- snapshots ----------------------------------------------------------------

    async def create_snapshot(
        self,
        name: str,
        disks: Sequence[str] | None = None,
        *,
        checkpoint: str | None = None,
        owner: str = "",
        release: Release = Release.NEVER,
    ) -> Snapshot:
        """Freeze a view of some disks, and make a checkpoint of the same instant if asked.

        Args:
            name: What to call the snapshot.
            disks: Which disks; None for all.
            checkpoint: The name of the checkpoint to make; None for none.
            owner: Whose checkpoint it is.
            release: When ranges of the snapshot are given up.

        Raises:
            StateError: A name is taken or unknown.
            OSError: An image or the scratch directory cannot be written; nothing was changed.
        """
        async with self.changing:
            check_name(name, "snapshot")
            snapshot = await self._freeze(name, self._chosen(disks), checkpoint, owner, release)
            if checkpoint is not None:
                await self._commit_or_abort(snapshot, checkpoint)
            return snapshot

    async def _commit_or_abort(self, snapshot: Snapshot, checkpoint: str) -> None:
        """Keep the checkpoint of a new snapshot; if it cannot be stored, neither begins."""
        try:
            await checkpoints.commit(self.disks.values(), checkpoint)
            snapshot.is_pending = False
        except BaseException:
            await self._abort(snapshot)
            raise

    async def drop_snapshot(self, name: str, *, is_told: bool = True) -> None:
        """End a snapshot, its exports and their clients; an event tells, if it is to.

        Raises:
            StateError: There is none of that name, or its backup is not finished.
        """
        async with self.changing:
            snapshot = self.snapshot(name)
            if snapshot.is_unfinished:
                raise StateError(f"backup '{name}' is not finished: commit or abort it")
            snapshot.check_unused()
            await self._drop(name)
            if is_told:
                self._event("SNAPSHOT_DELETED", {"snapshot": name})

    def snapshot(self, name: str) -> Snapshot:
        """The snapshot of that name.

        Raises:
            StateError: There is none.
        """
        try:
            return self.snapshots[name]
        except KeyError:
            raise StateError(f"there is no snapshot '{name}'") from None

    async def _freeze(
        self,
        name: str,
        disks: list[Disk],
        checkpoint: str | None,
        owner: str,
        release: Release = Release.NEVER,
    ) -> Snapshot:
        """Take a snapshot, with a pending checkpoint if one is named, in one instant (rule 3)."""
        if name in self.snapshots:
            raise StateError(f"snapshot '{name}' exists already")
        states = None
        if checkpoint is not None:
            states = await checkpoints.prepare(self.disks.values(), disks, checkpoint, owner)
        snapshot = Snapshot(
            name=name,
            disks={},
            checkpoint=checkpoint,
            release=release,
            is_pending=checkpoint is not None,
        )
        self.snapshots[name] = snapshot
        try:
            await self._instant(snapshot, disks, states)
            if checkpoint is not None:
                await checkpoints.store_new(disks, checkpoint)
        except BaseException:
            await self._drop(name)
            raise
        return snapshot

    async def _instant(
        self, snapshot: Snapshot, disks: list[Disk], states: Mapping[Disk, DiskState] | None
    ) -> None:
        """Hold the guests' writes for as long as it takes to freeze all disks, without I/O."""
        try:
            await asyncio.gather(*(disk.drain() for disk in disks))
            for disk in disks:
                snapshot.disks[disk.name] = freeze_disk(
                    disk, snapshot.release, freezing=states is not None
                )
        except BaseException:
            checkpoints.give_up(states or {})
            raise
        else:
            for disk, state in (states or {}).items():
                disk.install(state)
        finally:
            for disk in disks:
                disk.resume()

    async def _drop(self, name: str) -> None:
        snapshot = self.snapshots.pop(name)
        for export in list(snapshot.exports):
            self.exports.remove(export)
            await self._disconnect(export)
        for part in snapshot.disks.values():
            await part.node.close()

    def _tell_broken(self, disk: str) -> None:
        for snapshot in self.snapshots.values():
            part = snapshot.disks.get(disk)
            if part is not None and part.node.error is not None:
                _log.error("snapshot '%s' of disk '%s': %s", snapshot.name, disk, part.node.error)
                data = {"snapshot": snapshot.name, "disk": disk, "reason": part.node.error}
                self._event("SNAPSHOT_BROKEN", data)

    # -- exports ------------------------------------------------------------------

    async def add_export(
        self,
        snapshot: str,
        disk: str,
        *,
        name: str | None = None,
        since: Mapping[str, str] | None = None,
        between: Mapping[str, tuple[str, str]] | None = None,
        allocation_depth: bool = True,
    ) -> Export:
        """Export one disk of a snapshot, read-only.

        Args:
            snapshot: The snapshot's name.
            disk: The disk's name.
            name: What to call the export; ``SNAPSHOT/DISK`` if not given.
            since: Checkpoints whose changes up to the snapshot are offered, each under the
                bitmap name that it maps to (``qemu:dirty-bitmap:NAME``).
            between: Bitmap names, each for the changes from one checkpoint to a later one.
            allocation_depth: Offer ``qemu:allocation-depth`` too.

        Raises:
            StateError: A name is unknown or taken, or changes are not known.
        """
        async with self.changing:
            found = self.snapshot(snapshot)
            if disk not in found.disks:
                raise StateError(f"snapshot '{snapshot}' has no disk '{disk}'")
            bitmaps = await found.disks[disk].changes(since or {}, between or {})
            return await self._export(found, disk, name, bitmaps, allocation_depth)

    async def _export(
        self,
        snapshot: Snapshot,
        disk: str,
        name: str | None,
        bitmaps: Mapping[str, Bitmap],
        allocation_depth: bool,
    ) -> Export:
        if name:
            check_name(name, "export")
        export = snapshot_export(snapshot, disk, name, bitmaps, allocation_depth=allocation_depth)
        self.exports.add(export)
        snapshot.exports.append(export.name)
        await self.delegate(export)
        return export

    async def remove_export(self, name: str) -> None:
        """Remove an export of a snapshot and disconnect its clients.

        Raises:
            StateError: There is none of that name, or it is a disk's live export.
        """
        async with self.changing:
            for snapshot in self.snapshots.values():
                if name in snapshot.exports:
                    self.exports.remove(name)
                    snapshot.exports.remove(name)
                    await self._disconnect(name)
                    return
        raise StateError(f"there is no export '{name}' of a snapshot")

    # -- backups ------------------------------------------------------------------

    async def begin_backup(
        self,
        name: str,
        disks: Sequence[str] | None = None,
        *,
        checkpoint: str | None = None,
        since: str | None = None,
        owner: str = "",
        release: Release = Release.NEVER,
        only_changes: bool = False,
    ) -> list[BackupDisk]:
        """Take a snapshot with a pending checkpoint and export it, with what changed.

        Args:
            name: What to call the backup; also the snapshot's name.
            disks: Which disks; None for all.
            checkpoint: The checkpoint to make; None makes none.
            since: The checkpoint of the backup that this one builds on; None for a full one.
            owner: Whose checkpoint it is.
            release: When ranges of the snapshot are given up.
            only_changes: Keep only what changed since ``since``; reading the rest is refused.

        Returns:
            What to read, per disk. A disk that has no usable chain since that checkpoint
            must be read in full; the others need not.

        Raises:
            StateError: A name is taken, or no disk knows ``since``; nothing was changed.
            OSError: An image or the scratch directory cannot be written; nothing was changed.
        """
        async with self.changing:
            chosen = self._chosen(disks)
            if since is not None and not any([await disk.knows(since) for disk in chosen]):
                raise StateError(f"there is no checkpoint '{since}'")
            check_name(name, "backup")
            snapshot = await self._freeze(name, chosen, checkpoint, owner, release)
            try:
                parts = [
                    await self._export_backup(snapshot, disk, since, only_changes)
                    for disk in chosen
                ]
            except BaseException:
                await self._abort(snapshot)
                raise
            snapshot.backup = parts
            self._tell_backup("BACKUP_STARTED", snapshot)
            return parts

    def _tell_backup(self, event: str, snapshot: Snapshot) -> None:
        data = {"backup": snapshot.name, "checkpoint": snapshot.checkpoint}
        self._event(event, {**data, "disks": list(snapshot.disks)})

    async def _export_backup(
        self, snapshot: Snapshot, disk: Disk, since: str | None, only_changes: bool
    ) -> BackupDisk:
        bitmaps = {}
        context = reason = None
        await asyncio.sleep(0)  # a guest's write must not wait for all the disks' bitmaps
        if since is not None:
            try:
                instant = snapshot.disks[disk.name].instant
                bitmaps[since] = await disk.changes_since(since, instant)
                context = DirtyBitmap(since, bitmaps[since]).name
                if only_changes:
                    await snapshot.disks[disk.name].node.limit(bitmaps[since])
            except StateError as error:
                reason = str(error)
        export = await self._export(snapshot, disk.name, None, bitmaps, allocation_depth=True)
        return BackupDisk(disk.name, export.name, context, reason)

    async def commit_backup(self, name: str) -> None:
        """Keep the backup's checkpoint, and end its snapshot.

        Raises:
            StateError: There is no such backup, or its snapshot is broken: what was read of
                it cannot be trusted to be complete. Abort it.
            OSError: An image could not be written; commit again, or let the next start settle it.
        """
        async with self.changing:
            snapshot = self._unfinished(name)
            if snapshot.error is not None:
                raise StateError(f"backup '{name}' cannot be committed: {snapshot.error}")
            if snapshot.is_pending and snapshot.checkpoint is not None:
                await checkpoints.commit(self.disks.values(), snapshot.checkpoint)
            await self._drop(name)
            self._tell_backup("BACKUP_COMMITTED", snapshot)

    async def abort_backup(self, name: str) -> None:
        """End a backup as if it had not begun: its checkpoint is merged away.

        Raises:
            StateError: There is no such backup.
            OSError: An image could not be written; the checkpoint is still pending.
        """
        async with self.changing:
            snapshot = self._unfinished(name)
            await self._abort(snapshot)
            self._tell_backup("BACKUP_ABORTED", snapshot)

    def _unfinished(self, name: str) -> Snapshot:
        snapshot = self.snapshots.get(name)
        if snapshot is None or not snapshot.is_unfinished:
            raise StateError(f"there is no backup '{name}'")
        snapshot.check_unused()
        return snapshot

    async def _abort(self, snapshot: Snapshot) -> None:
        """Merge the pending checkpoint away and end the snapshot."""
        if snapshot.is_pending and snapshot.checkpoint is not None:
            await checkpoints.remove(self.disks.values(), snapshot.checkpoint)
        await self._drop(snapshot.name)

    # -- checkpoints --------------------------------------------------------------

    async def create_checkpoint(
        self, name: str, disks: Sequence[str] | None = None, *, owner: str = ""
    ) -> None:
        """Make a checkpoint without a snapshot.

        Raises:
            As :meth:`create_snapshot`.
        """
        async with self.changing:
            chosen = self._chosen(disks)
            snapshot = await self._freeze(f"checkpoint {name}", chosen, name, owner)
            await self._drop(snapshot.name)
            await checkpoints.commit(chosen, name)

    async def delete_checkpoint(self, name: str) -> None:
        """Delete a checkpoint on all its disks; its changes go to the one before.

        Raises:
            StateError: There is no such checkpoint, or a running backup needs it.
            OSError: An image could not be written. If the deletion had been decided, it is
                finished by trying again, or at the next start.
        """
        async with self.changing:
            for snapshot in self.snapshots.values():
                if snapshot.is_pending and snapshot.checkpoint == name:
                    raise StateError(f"checkpoint '{name}' belongs to backup '{snapshot.name}'")
            await checkpoints.delete(self.disks.values(), name)

    async def prune_checkpoints(
        self,
        *,
        keep: int | None = None,
        older_than_seconds: float | None = None,
        owner: str | None = None,
    ) -> list[str]:
        """Delete checkpoints that are not needed any more, oldest first.

        Args:
            keep: The newest so many stay.
            older_than_seconds: Younger ones stay.
            owner: Only this owner's go; None for anybody's.

        Returns:
            The names of those that were deleted; each deletion is one of its own.

        Raises:
            StateError: Neither ``keep`` nor ``older_than_seconds`` was given.
            OSError: As :meth:`delete_checkpoint`.
        """
        if keep is None and older_than_seconds is None:
            raise StateError("say how many checkpoints to keep, or how old one may be")
        async with self.changing:
            names = checkpoints.prunable(self.disks.values(), keep, older_than_seconds, owner)
            for name in names:
                await checkpoints.delete(self.disks.values(), name)
            return names

    # -- bitmaps ------------------------------------------------------------------

    async def change_bitmaps(
        self, disk: Disk, change: Callable[[Disk], Awaitable[DiskState]]
    ) -> None:
        """Change bitmaps and chain of a disk together.

        Args:
            disk: The disk.
            change: Gives the state to come; one of :mod:`nbdfleece.engine.cumulative`.

        Raises:
            StateError: What ``change`` raises.
            OSError: The image could not be written; nothing was changed.
        """
        async with self.changing:
            await disk.store(await change(disk))

    async def transact(self, actions: Sequence[Action]) -> None:
        """Carry out all actions or none, in one instant.

        Raises:
            As :func:`~nbdfleece.engine.transaction.carry_out`; nothing was changed.
        """
        async with self.changing:
            await carry_out(actions, self.snapshots)

    async def recover(self) -> None:
        """Settle what a crash left open; called once all disks are opened.

        Raises:
            OSError: An image could not be written.
        """
        async with self.changing:
            running = {each.checkpoint for each in self.snapshots.values() if each.is_pending}
            await joint.settle(self.disks.values())
            await checkpoints.settle(self.disks.values(), running)
