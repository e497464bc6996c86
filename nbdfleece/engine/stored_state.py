"""What an image tells of its bitmaps and its chain, for those who only read it."""

from __future__ import annotations

from ..qcow2.bitmap_store import BitmapStore
from .chain import Chain, unpack_chain
from .disk_state import DiskBitmap, DiskState


def stored_state(store: BitmapStore) -> DiskState:
    """The bitmaps and the chain as they are stored, no bits in memory.

    Raises:
        StateError: The chain's record cannot be understood.
    """
    record = store.record
    chain = Chain() if record is None else unpack_chain(record.payload)
    is_logged = chain.logged and record is not None and record.matches_directory
    bitmaps = {}
    for each in store.entries:
        # A log has kept the bits of what was recording a superset.
        inconsistent = each.inconsistent and not (is_logged and each.recording)
        bitmaps[each.name] = DiskBitmap(each.name, each.granularity, each.recording, inconsistent)
    return DiskState(bitmaps, chain)
