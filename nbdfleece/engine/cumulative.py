"""To and from cumulative bitmaps, exactly.

libvirt keeps a bitmap per checkpoint that records from then on: the bitmap C_k of checkpoint
k holds all that changed since k. A chain's bitmap B_k holds what changed from k to the next
one. So B_k = C_k minus C_(k+1), the last one's as it is; and C_k = B_k and C_(k+1) together.
Whatever was answered before about any checkpoint is answered the same afterwards.

Each function gives the state to come, for :meth:`Engine.change_bitmaps`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..bitmaps.bitmap import Bitmap
from ..errors import StateError
from .chain import Checkpoint, check_name, new_identity
from .disk import Disk
from .disk_state import DiskBitmap, DiskState


async def adopted(disk: Disk, names: Sequence[str], *, owner: str = "") -> DiskState:
    """The state in which cumulative bitmaps are a chain.

    Args:
        disk: The disk; it has no chain yet.
        names: The bitmaps, oldest first; each becomes the checkpoint of its name.
        owner: Whose checkpoints they will be.

    Raises:
        StateError: A bitmap is missing, inconsistent, not recording or of another
            granularity, or they are not cumulative in this order.
    """
    if len(disk.state.chain):
        raise StateError(f"disk '{disk.name}' has a chain already")
    if not names or len(set(names)) < len(names):
        raise StateError("name each bitmap to adopt once, oldest first")
    found = [_recording(disk, name) for name in names]
    bits = [each.bits for each in found if each.bits is not None]
    if len({each.granularity for each in bits}) > 1:
        raise StateError("bitmaps of several granularities cannot form a chain")
    bitmaps = dict(disk.state.bitmaps)
    chain = disk.state.chain.with_identity()
    for index, bitmap in enumerate(found):
        chain = chain.with_added(_checkpoint(disk, bitmap.name, owner))
        if index + 1 < len(found):
            own = _difference(bits[index], bits[index + 1], bitmap.name, names[index + 1])
            bitmaps[bitmap.name] = bitmap._replace(
                recording=False, bits=own, in_image=False, log=None
            )
    return DiskState(bitmaps, chain)


async def handed_over(disk: Disk) -> DiskState:
    """The state without a chain in which each checkpoint's bitmap is cumulative and records.

    Raises:
        StateError: There is no chain, or the changes since one of its checkpoints are not known.
    """
    checkpoints = disk.state.chain.checkpoints
    if not checkpoints:
        raise StateError(f"disk '{disk.name}' has no chain")
    disk.state.check_since(checkpoints[0].name)
    loaded = {each.name: await disk.bits(each.bitmap_name) for each in checkpoints}
    bitmaps = dict(disk.state.bitmaps)
    newer: Bitmap | None = None
    for each in reversed(checkpoints):
        bitmap = bitmaps[each.bitmap_name]
        if newer is not None:
            bits = loaded[each.name].copy()
            bits.merge(newer)
            bitmap = bitmap._replace(recording=True, bits=bits, in_image=False, log=None)
            bitmaps[each.bitmap_name] = bitmap
        newer = bitmap.bits
    return DiskState(bitmaps, disk.state.chain.without_checkpoints())


def _recording(disk: Disk, name: str) -> DiskBitmap:
    check_name(name, "checkpoint")
    bitmap = disk.state.bitmaps.get(name)
    if bitmap is None:
        raise StateError(f"disk '{disk.name}' has no bitmap '{name}'")
    if bitmap.inconsistent or not bitmap.recording or not bitmap.persistent:
        raise StateError(f"bitmap '{name}' is not recording, or inconsistent, or not persistent")
    return bitmap


def _difference(older: Bitmap, newer: Bitmap, older_name: str, newer_name: str) -> Bitmap:
    """What the older one marks and the newer one does not; the newer marks nothing else."""
    extra = newer.copy()
    extra.subtract(older)
    if not extra.is_empty():
        raise StateError(
            f"bitmap '{newer_name}' marks what '{older_name}' does not: they are not cumulative"
            " in this order"
        )
    own = older.copy()
    own.subtract(newer)
    return own


def _checkpoint(disk: Disk, name: str, owner: str) -> Checkpoint:
    return Checkpoint(
        id=new_identity(), name=name, created_ns=time.time_ns(), size=disk.size, owner=owner
    )
