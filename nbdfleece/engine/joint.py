"""Transactions over persistent bitmaps of several disks: on all of them or on none (rule 6).

Each image changes by one atomic switch, which brings its bitmaps and its chain record into
force together. What makes several of them one is that each image first holds both:

1. *prepared*: on every disk the bitmaps as they are to be stand beside the old ones, under
   interim names, and guest writes mark both; the record says which is to become which
   (:class:`~nbdfleece.engine.chain.JointChange`);
2. *done*: on one disk after another the new ones take the place of the old, and the record
   says so; with the first one it is decided;
3. the records of it are taken away.

What :func:`settle` does at the next start about one that was interrupted:

==========================================  =============================================
found                                       then
==========================================  =============================================
done on one of the disks                    it is done on the others too
done on none, and all of them are here      the new ones go: as if it had not begun
done on none, and some are not here         nobody can know: those bitmaps stay busy
==========================================  =============================================

A disk without the record is one that step 1 has not reached, or that step 3 has left.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

import msgspec

from ..bitmaps.bitmap import Bitmap
from ..errors import StateError
from .chain import JointChange, new_identity
from .disk import Disk
from .disk_state import DiskBitmap, DiskState

_log = logging.getLogger("nbdfleece.engine")

Part = tuple[Disk, DiskState]
"""A disk and the state to come, of whose bitmaps guest writes are recorded already."""


async def store_together(parts: Sequence[Part]) -> None:
    """Put the states to come in the place of the present ones, in all images or in none.

    Args:
        parts: Disks that have identities, and states with the chains that they have now.

    Raises:
        OSError, StateError: An image could not be prepared; all states are as they were.
    """
    for disk, _ in parts:
        if disk.state.chain.joint is not None:
            raise StateError(
                f"disk '{disk.name}': an earlier transaction over several disks is not settled:"
                " start the server with all of them"
            )
    identity, disks = new_identity(), tuple(disk.state.chain.disk_id for disk, _ in parts)
    prepared: list[Disk] = []
    try:
        for disk, state in parts:
            await disk.store(_prepared(disk.state, state, JointChange(id=identity, disks=disks)))
            prepared.append(disk)
        await _finish(*parts[0])
    except BaseException:
        for disk in prepared:
            if not await _take_back(disk):
                break  # the first may be done for all we know: then the others must follow it
        raise
    if all([await _finished(*part) for part in parts[1:]]):
        for disk, _ in parts:
            await _forget(disk)


def _prepared(old: DiskState, new: DiskState, joint: JointChange) -> DiskState:
    """The old bitmaps, and beside them those that differ in the new state, by interim names."""
    changed = [each for name, each in new.bitmaps.items() if old.bitmaps.get(name) is not each]
    kept = {name for name, each in new.bitmaps.items() if each.persistent}
    joint = msgspec.structs.replace(
        joint,
        renames=tuple(each.name if each.persistent else "" for each in changed),
        removed=tuple(
            name for name, each in old.bitmaps.items() if each.persistent and name not in kept
        ),
    )
    bitmaps = dict(old.bitmaps)
    for index, each in enumerate(changed):
        name = joint.interim_name(index)
        bitmaps[name] = each._replace(name=name)
    return DiskState(bitmaps, old.chain.with_joint(joint))


async def _finish(disk: Disk, new: DiskState) -> None:
    """Store the new state of a disk that is prepared; the recording ones keep their logs."""
    await disk.store(_done(disk.state, new))


def _done(prepared: DiskState, new: DiskState) -> DiskState:
    joint = prepared.chain.joint
    assert joint is not None, "it was prepared"
    bitmaps = dict(new.bitmaps)
    for index, name in enumerate(joint.renames):
        held = prepared.bitmaps[joint.interim_name(index)]
        if name and held.is_changing:
            bitmaps[name] = held._replace(name=name)
    chain = prepared.chain.with_joint(JointChange(id=joint.id, disks=joint.disks, done=True))
    return DiskState(bitmaps, chain)


async def _finished(disk: Disk, new: DiskState) -> bool:
    """As :func:`_finish`, once it is decided: what cannot be stored now is at the next start.

    Until then guest writes are recorded by both states.
    """
    try:
        await _finish(disk, new)
    except (OSError, StateError) as error:
        _log.error("disk '%s': a transaction is finished at the next start: %s", disk.name, error)
        disk.install(_done(disk.state, new))
        return False
    return True


async def _take_back(disk: Disk) -> bool:
    """Undo the preparation; where that cannot be stored, the next start settles it."""
    try:
        await disk.store(_undone(disk.state))
    except (OSError, StateError) as error:
        _log.error("disk '%s': a transaction is settled at the next start: %s", disk.name, error)
        return False
    return True


async def _forget(disk: Disk) -> None:
    try:
        await disk.store(disk.state._replace(chain=disk.state.chain.with_joint(None)))
    except (OSError, StateError) as error:
        _log.error("disk '%s': a transaction is forgotten at the next start: %s", disk.name, error)


def _undone(state: DiskState) -> DiskState:
    """The old bitmaps alone."""
    joint = state.chain.joint
    assert joint is not None, "it was prepared"
    interim = {joint.interim_name(index) for index in range(len(joint.renames))}
    kept = {name: each for name, each in state.bitmaps.items() if name not in interim}
    return DiskState(kept, state.chain.with_joint(None))


# -- after a crash ------------------------------------------------------------------------


async def settle(disks: Collection[Disk], *, forget: bool = False) -> None:
    """Finish or take back what was interrupted on these disks, as far as can be known.

    Args:
        disks: All.
        forget: Take back also what might be done on disks that are not here.

    Raises:
        OSError, StateError: An image could not be written.
    """
    here = {disk.state.chain.disk_id for disk in disks}
    found = {disk.state.chain.joint.id: disk for disk in disks if disk.state.chain.joint}
    for identity, one in found.items():
        concerned = [disk for disk in disks if _has(disk, identity)]
        joint = one.state.chain.joint
        assert joint is not None, "it was found"
        is_done = any(each.state.chain.joint.done for each in concerned if each.state.chain.joint)
        is_whole = here.issuperset(joint.disks) or forget
        if is_done:
            _log.warning("finishing a transaction over several disks")
            for disk in concerned:
                await _settle_forward(disk)
        elif is_whole:
            _log.warning("taking back a transaction over several disks")
            for disk in concerned:
                await _settle_back(disk)
        if is_done and is_whole:
            for disk in concerned:
                await disk.store(disk.state._replace(chain=disk.state.chain.with_joint(None)))
        elif not is_done and not is_whole:
            _log.warning("a transaction stays unsettled: not all of its disks are here")


def _has(disk: Disk, identity: str) -> bool:
    joint = disk.state.chain.joint
    return joint is not None and joint.id == identity


async def _settle_back(disk: Disk) -> None:
    joint = disk.state.chain.joint
    assert joint is not None, "it is concerned"
    await disk.store(_undone(disk.state))
    disk.busy.subtract(joint.names)


async def _settle_forward(disk: Disk) -> None:
    """Let the new bitmaps take the place of the old on a disk where they have not."""
    joint = disk.state.chain.joint
    assert joint is not None, "it is concerned"
    if joint.done:
        return
    bitmaps = {name: each for name, each in disk.state.bitmaps.items() if name not in joint.removed}
    for index, name in enumerate(joint.renames):
        interim = bitmaps.pop(joint.interim_name(index), None)
        if interim is not None:
            bitmaps[name] = await _renamed(disk, interim, name)
    done = JointChange(id=joint.id, disks=joint.disks, done=True)
    await disk.store(DiskState(bitmaps, disk.state.chain.with_joint(done)))
    disk.busy.subtract(joint.names)


async def _renamed(disk: Disk, bitmap: DiskBitmap, name: str) -> DiskBitmap:
    """A bitmap with its bits in memory, since the image has them by another name."""
    if bitmap.inconsistent:
        empty = Bitmap(disk.size, bitmap.granularity)
        return bitmap._replace(name=name, recording=True, bits=empty, in_image=False)
    bits = await disk.bits(bitmap.name)
    return bitmap._replace(name=name, bits=bits, in_image=False, log=None)
