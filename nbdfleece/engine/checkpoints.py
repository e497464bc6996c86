"""Checkpoints over several disks: on all of them or on none (rule 6).

Disks are changed one after another, each by one atomic switch in its image. What
makes a change of several disks atomic is that each image tells how far the
change had got, and what :func:`settle` does about it at the next start:

=============================  ==================================================
a checkpoint is found          then it
=============================  ==================================================
pending on all its disks       goes everywhere: its backup was never committed
committed on one of them       is committed on all: that was decided
to be deleted on one of them   goes everywhere: that was decided
=============================  ==================================================

A checkpoint is made pending, and committed only once it is on all of its disks.
It stays pending while one of its disks is not there to be asked.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence

from ..errors import StateError
from .chain import Checkpoint, CheckpointState, check_name, new_identity
from .disk import Disk
from .disk_state import DiskState

_log = logging.getLogger("nbdfleece.engine")


def holders(disks: Collection[Disk], name: str) -> list[Disk]:
    """The disks that have a checkpoint.

    Raises:
        StateError: None has it.
    """
    found = [disk for disk in disks if disk.state.chain.find(name)]
    if not found:
        raise StateError(f"there is no checkpoint '{name}'")
    return found


async def prepare(
    disks: Collection[Disk], chosen: Sequence[Disk], name: str, owner: str
) -> dict[Disk, DiskState]:
    """What the state of the chosen disks will be once they have a new, pending checkpoint.

    Raises:
        StateError: The name is no good, or one of all ``disks`` has such a checkpoint.
        OSError: An image has no room for its bitmap.
    """
    check_name(name, "checkpoint")
    if any(disk.state.chain.find(name) for disk in disks):
        raise StateError(f"checkpoint '{name}' exists already")
    for disk in chosen:
        await disk.ensure_identity()
    identity, now = new_identity(), time.time_ns()
    states: dict[Disk, DiskState] = {}
    try:
        for disk in chosen:
            record = Checkpoint(
                id=identity,
                name=name,
                created_ns=now,
                size=disk.size,
                owner=owner,
                state=CheckpointState.PENDING,
                disks=tuple(each.state.chain.disk_id for each in chosen),
            )
            states[disk] = await disk.prepare_checkpoint(record)
    except BaseException:
        give_up(states)
        raise
    return states


def give_up(states: Mapping[Disk, DiskState]) -> None:
    """Discard states that were prepared and will not come to be."""
    for disk, state in states.items():
        disk.discard(state)


async def store_new(disks: Collection[Disk], name: str) -> None:
    """Put a checkpoint that is installed on all disks into their images.

    Raises:
        OSError, StateError: An image could not take it; it was taken back on all disks.
    """
    stored: list[Disk] = []
    try:
        for disk in disks:
            await disk.store_installed()
            stored.append(disk)
    except BaseException:
        for disk in disks:
            if disk not in stored:
                disk.uninstall(name)
        for disk in stored:
            await _take_back(disk, name)
        raise


async def _take_back(disk: Disk, name: str) -> None:
    """Merge a pending checkpoint away; where that cannot be stored, the next start does it."""
    try:
        await disk.remove_checkpoint(name)
    except OSError as error:
        _log.error(
            "disk '%s': checkpoint '%s' stays pending until the next start: %s",
            disk.name,
            name,
            error,
        )


async def commit(disks: Collection[Disk], name: str) -> None:
    """Keep a pending checkpoint.

    Raises:
        StateError: There is no such checkpoint.
        OSError: An image could not be written; try again, or let the next start settle it.
    """
    for disk in holders(disks, name):
        await _store_state(disk, name, CheckpointState.COMMITTED)


async def _store_state(disk: Disk, name: str, state: CheckpointState) -> None:
    await disk.store(disk.state.with_checkpoint_state(name, state))


async def remove(disks: Collection[Disk], name: str) -> None:
    """Merge a checkpoint away on every disk that has it.

    Raises:
        StateError: There is no such checkpoint.
        OSError: An image could not be written; try again, or let the next start settle it.
    """
    for disk in holders(disks, name):
        await disk.remove_checkpoint(name)


async def delete(disks: Collection[Disk], name: str) -> None:
    """Delete a committed checkpoint: decide it on all disks, then do it.

    Raises:
        StateError: There is no such checkpoint.
        OSError: As :func:`remove`; if the decision could not be stored, nothing was changed.
    """
    found = holders(disks, name)
    if len(found) > 1:
        await _decide_deletion(found, name)
    await remove(found, name)


def prunable(
    disks: Collection[Disk],
    keep: int | None,
    older_than_seconds: float | None,
    owner: str | None,
) -> list[str]:
    """The committed checkpoints of an owner that are neither among the newest nor young."""
    found = {
        record.name: record.created_ns
        for disk in disks
        for record in disk.state.chain.checkpoints
        if record.state is CheckpointState.COMMITTED and owner in (None, record.owner)
    }
    names = sorted(found, key=found.__getitem__)
    names = names[: max(0, len(names) - (keep or 0))]
    if older_than_seconds is None:
        return names
    oldest_ns = time.time_ns() - int(older_than_seconds * 1e9)
    return [name for name in names if found[name] < oldest_ns]


async def _decide_deletion(disks: Collection[Disk], name: str) -> None:
    decided: list[Disk] = []
    try:
        for disk in disks:
            await _store_state(disk, name, CheckpointState.DELETING)
            decided.append(disk)
    except OSError:
        for disk in decided:
            await _store_state(disk, name, CheckpointState.COMMITTED)
        raise


async def settle(disks: Collection[Disk], running: Collection[str | None] = ()) -> None:
    """Finish or take back what a crash left half done.

    Args:
        disks: All.
        running: The checkpoints of backups that are not finished, which stay pending.

    Raises:
        OSError: An image could not be written.
    """
    unsettled = {
        checkpoint.name
        for disk in disks
        for checkpoint in disk.state.chain.checkpoints
        if checkpoint.state is not CheckpointState.COMMITTED
    }
    for name in sorted(unsettled.difference(running)):
        await _settle_one(disks, name)


async def _settle_one(disks: Collection[Disk], name: str) -> None:
    records = [found for disk in disks if (found := disk.state.chain.find(name)) is not None]
    states = {record.state for record in records}
    here = {disk.state.chain.disk_id for disk in disks}
    if CheckpointState.DELETING in states:
        _log.warning("finishing the deletion of checkpoint '%s'", name)
        await remove(disks, name)
    elif CheckpointState.COMMITTED in states:
        _log.warning("finishing the commit of checkpoint '%s'", name)
        await commit(disks, name)
    elif here.issuperset(records[0].disks):
        _log.warning("taking back checkpoint '%s': its backup was not committed", name)
        await remove(disks, name)
    else:
        _log.warning("checkpoint '%s' stays pending: not all of its disks are here", name)
