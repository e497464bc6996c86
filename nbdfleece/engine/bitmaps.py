"""Bitmaps of a disk that belong to no checkpoint: the steps that QEMU has for them.

Each function gives the state to come, for :meth:`Engine.change_bitmaps`. The bitmaps of the
chain are refused: what they mean depends on one another. A change that needs bits computes
them without awaiting anything afterwards, so that no guest write falls between (rule 2).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..bitmaps.bitmap import Bitmap
from ..errors import StateError
from .chain import check_name
from .disk import Disk
from .disk_state import DiskBitmap, DiskState

GRANULARITY_MIN = 512
GRANULARITY_MAX = 1 << 31
"""Bytes; QEMU's and the format's limits."""


async def added(
    disk: Disk, name: str, *, granularity: int | None, recording: bool, persistent: bool
) -> DiskState:
    """The state with one more bitmap, empty.

    Args:
        disk: The disk.
        name: The bitmap's name.
        granularity: Bytes per bit; None for the usual.
        recording: Guest writes mark it.
        persistent: The image is to hold it.

    Raises:
        StateError: The name is taken or cannot be, or the granularity cannot be.
    """
    check_name(name, "bitmap")
    if name in disk.state.bitmaps:
        raise StateError(f"Bitmap already exists: {name}")
    size = disk.default_granularity if granularity is None else granularity
    if size & (size - 1) or not GRANULARITY_MIN <= size <= GRANULARITY_MAX:
        raise StateError(f"Granularity must be power of 2 and at least {GRANULARITY_MIN}")
    bits = Bitmap(disk.size, size)
    fresh = DiskBitmap(name, size, recording, bits=bits, in_image=False, persistent=persistent)
    return _with(disk.state, fresh)


async def removed(disk: Disk, name: str) -> DiskState:
    """The state without a bitmap, which may be inconsistent.

    Raises:
        StateError: There is none, or it is the chain's.
    """
    _own(disk, name)
    kept = {each: bitmap for each, bitmap in disk.state.bitmaps.items() if each != name}
    return disk.state._replace(bitmaps=kept)


async def cleared(disk: Disk, name: str) -> DiskState:
    """The state in which a bitmap marks nothing.

    Raises:
        StateError: There is none, it is the chain's, or inconsistent.
    """
    bitmap = _usable(disk, name)
    return _with(disk.state, _with_bits(bitmap, Bitmap(disk.size, bitmap.granularity)))


async def recording(disk: Disk, name: str, *, enabled: bool) -> DiskState:
    """The state in which guest writes mark a bitmap, or do not.

    Raises:
        StateError: There is none, it is the chain's, or inconsistent.
    """
    _usable(disk, name)
    bits = await disk.bits(name)
    return _with(disk.state, _usable(disk, name)._replace(recording=enabled, bits=bits))


async def merged(disk: Disk, target: str, sources: Sequence[tuple[Disk, str]]) -> DiskState:
    """The state in which a bitmap also marks what others mark, those of other disks too.

    Raises:
        StateError: One is not there, inconsistent or of a disk of another size, or the target
            is the chain's.
    """
    _usable(disk, target)
    parts = [await _source_bits(disk, *source) for source in sources]
    bits = (await disk.bits(target)).copy()
    for part in parts:
        bits.merge(part)
    return _with(disk.state, _with_bits(_usable(disk, target), bits))


async def _source_bits(disk: Disk, source: Disk, name: str) -> Bitmap:
    _consistent(source, name)
    bits = await source.bits(name)
    if bits.size != disk.size:
        raise StateError(
            f"Bitmaps are of different sizes (destination size is {disk.size}) and can't be merged"
        )
    return bits


def _with(state: DiskState, bitmap: DiskBitmap) -> DiskState:
    return state._replace(bitmaps={**state.bitmaps, bitmap.name: bitmap})


def _with_bits(bitmap: DiskBitmap, bits: Bitmap) -> DiskBitmap:
    """The bitmap with other bits, which neither the image nor its log has."""
    return bitmap._replace(bits=bits, in_image=False, log=None)


def _own(disk: Disk, name: str) -> DiskBitmap:
    """A bitmap that is nobody else's."""
    bitmap = disk.state.bitmaps.get(name)
    if bitmap is None:
        raise StateError(f"Dirty bitmap '{name}' not found")
    for checkpoint in disk.state.chain.checkpoints:
        if checkpoint.bitmap_name == name:
            raise StateError(f"bitmap '{name}' belongs to checkpoint '{checkpoint.name}'")
    return bitmap


def _usable(disk: Disk, name: str) -> DiskBitmap:
    """A bitmap that is nobody else's and consistent."""
    _own(disk, name)
    return _consistent(disk, name)


def _consistent(disk: Disk, name: str) -> DiskBitmap:
    bitmap = disk.state.bitmaps.get(name)
    if bitmap is None:
        raise StateError(f"Dirty bitmap '{name}' not found")
    if bitmap.inconsistent:
        raise StateError(f"Bitmap '{name}' is inconsistent and cannot be used; remove it")
    return bitmap
