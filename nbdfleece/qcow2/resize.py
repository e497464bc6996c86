"""Giving a disk another size, while nobody else uses the image.

What a power cut may leave at any point is the old size or the new one, with leaked
clusters at worst:

* **Growing**: a longer L1 table is written elsewhere and put in force by the 12 bytes of
  the header that lead to it. Then everything between the old end and the new one that
  would not read as zeroes (the rest of the last cluster, a backing file that was longer
  than the disk) is made zero, and last comes the new size.
* **Shrinking**: the new size comes first, then what lies past it is given up. If that
  is cut short, growing gives it up.

The tables of bitmaps are as long as the disk needs, so none fits both sizes: those that fit
the new size are written first, which takes all the room, and put in force just after the
size; none is in force while the size is written. A power cut in between loses them, but none
is ever incomplete (rule 2). On growing, a recording bitmap gets the new part marked, unlike in
QEMU: the disk may have been longer before, with other content.

An external data file is at least as long as the disk, and cut with it. What it has past the
old end is zeroed when the disk grows over it: a raw data file is to read like the disk.
"""

from __future__ import annotations

import struct
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from ..bitmaps.bitmap import Bitmap
from ..block.threads import to_its_end
from ..errors import StateError, UsageError
from .bitmap_directory import size_fault, table_entries_needed, tables_fault
from .bitmap_store import StoredBitmap
from .entries import find_runs
from .header import L1_BYTES_MAX, L1_SIZE_FIELD, SIZE_FIELD

if TYPE_CHECKING:
    from .bitmap_store import BitmapStore
    from .image import Qcow2Image

_L1_FIELDS: Final = struct.Struct(">IQ")


async def resize_image(image: Qcow2Image, store: BitmapStore, size: int) -> None:
    """Give the disk another size; what is new reads as zeroes.

    Args:
        image: Open for writing, with no reads or writes under way.
        store: Its bitmaps, into which nobody records.
        size: Bytes.

    Raises:
        UsageError: No L1 table would be long enough.
        StateError: A bitmap is inconsistent or damaged, or would become too large; or the
            image is of version 2 with internal snapshots. Nothing was changed.
        OSError: It could not be done; the disk has its old size and its bitmaps, unless the
            text says otherwise.
    """
    image.check_writable()
    if size == image.size:
        return
    entries = _l1_entries(image, size)
    if image.header.version < 3 and image.snapshots:
        raise StateError(f"{image.path}: version 2 cannot be resized while there are snapshots")
    bitmaps = await _load_bitmaps(image, store, size)
    old = image.size
    if size > old:
        await _make_room(image, size, entries)
    await to_its_end(_switch(image, store, bitmaps, size))
    if size < old:
        await _give_up(image, old)


async def _switch(
    image: Qcow2Image, store: BitmapStore, bitmaps: list[StoredBitmap], size: int
) -> None:
    """Write the size and put the bitmaps of that size in force; if it cannot be, the old ones."""
    if not bitmaps:
        if (failure := await _change_size(image, size)) is not None:
            raise failure
        return
    record = store.record
    payload = record.payload if record is not None and record.matches_directory else None
    resized = [bitmap._replace(content=_resized(bitmap, size)) for bitmap in bitmaps]
    new = await store.write(resized, payload, size)
    try:
        old = await store.switch_off()
    except BaseException:
        store.discard(new)
        raise
    failure = await _change_size(image, size)
    kept, other = (new, old) if failure is None else (old, new)
    store.discard(other)
    try:
        await store.put_in_force(kept, payload)
    except OSError as error:
        what = f"has {image.size} bytes now, but its bitmaps could not be stored and are lost"
        raise disk_error(image, what, error) from error
    if failure is not None:
        raise failure


async def _change_size(image: Qcow2Image, size: int) -> OSError | None:
    """Make another size durable, after everything before it.

    Returns:
        Why it could not be written, and was taken back.

    Raises:
        OSError: It could not be taken back either; the text says so.
    """
    write = partial(image.file.write, SIZE_FIELD, _packed_size(size))
    try:
        await image.epochs.exclusively(write)
    except OSError as error:
        try:
            await image.file.write(SIZE_FIELD, _packed_size(image.size))
            await image.file.flush()
        except OSError:
            what = f"has {image.size} or {size} bytes now, and no bitmaps"
            raise disk_error(image, what, error) from error
        return error
    image.size = image.header.size = size
    return None


def _l1_entries(image: Qcow2Image, size: int) -> int:
    """How long the L1 table of a disk of that size is."""
    table_bytes = image.layout.l2_entries * image.cluster_size
    entries = -(-size // table_bytes)
    if size < 0 or entries * 8 > L1_BYTES_MAX:
        largest = L1_BYTES_MAX // 8 * table_bytes
        raise UsageError(f"{image.path}: the disk can have {largest} bytes at most, not {size}")
    return entries


async def _load_bitmaps(image: Qcow2Image, store: BitmapStore, size: int) -> list[StoredBitmap]:
    """All bitmaps of the image with their bits."""
    if store.damaged:
        raise StateError(
            f"{image.path}: the bitmap directory is damaged ({store.damaged[0].reason}):"
            " drop what is damaged ('nbdfleece bitmap repair') before the disk is resized"
        )
    for entry in store.entries:
        if entry.inconsistent:
            raise StateError(
                f"{image.path}: bitmap {entry.name!r} is inconsistent: remove it, or the"
                " checkpoint that it belongs to, before the disk is resized"
            )
        if reason := size_fault(size, entry.granularity):
            raise StateError(f"{image.path}: bitmap {entry.name!r} {reason}")
    if reason := tables_fault(
        sum(
            table_entries_needed(size, entry.granularity, image.cluster_size)
            for entry in store.entries
        )
    ):
        raise StateError(f"{image.path}: {reason}")
    return [
        StoredBitmap(
            entry.name,
            entry.granularity,
            entry.recording,
            in_use=False,
            content=await store.load_bits(entry.name),
        )
        for entry in store.entries
    ]


def disk_error(image: Qcow2Image, what: str, error: OSError) -> OSError:
    """The error that says what has become of the disk."""
    return OSError(error.errno, f"the disk {what}: {error.strerror}", image.path)


def _resized(bitmap: StoredBitmap, size: int) -> Bitmap:
    old = bitmap.content
    assert old is not None
    new = old.resized(size)
    if bitmap.recording and size > old.size:
        new.set_range(old.size, size - old.size)
    return new


async def _make_room(image: Qcow2Image, size: int, entries: int) -> None:
    """Prepare for a larger size: let everything up to it read as zeroes."""
    if entries > image.header.l1_size:
        await _move_l1(image, entries)
    old, old_end = image.size, _cluster_end(image, image.size)
    if image.data_file is not image.file:
        if stale := max(0, min(image.data_file.size, size) - old):
            await image.data_file.write_zeroes(old, stale)
        await image.data_file.grow(size)
    image.space.resize(size)
    await _drop_past(image, old_end)
    shown = 0 if image.backing is None else min(image.backing.size, size)
    end = max(old_end, _cluster_end(image, shown))
    if old < end:
        await image.write_zeroes(old, end - old)


async def _give_up(image: Qcow2Image, old: int) -> None:
    """Give up all that lies between the size and a larger one that the disk had.

    Raises:
        OSError: Some of it was not; the text says which size the disk has.
    """
    size, end = image.size, _cluster_end(image, image.size)
    try:
        if size < end:
            await image.write_zeroes(size, end - size)
        if end < old:
            await image.space.zero(end, old - end, unmap=True)
        await _drop_past(image, end)
        if image.data_file is not image.file:
            await image.data_file.shrink(size)
        await image.flush()
    except OSError as error:
        what = f"has {size} bytes now, but what lay past it was not all given up"
        raise disk_error(image, what, error) from error
    image.space.resize(size)


def _cluster_end(image: Qcow2Image, offset: int) -> int:
    mask = image.cluster_size - 1
    return offset + mask & ~mask


async def _drop_past(image: Qcow2Image, end: int) -> None:
    """Give up every cluster from a guest offset on, where the disk has ended."""
    table_bytes = image.layout.l2_entries * image.cluster_size
    kept = -(-end // table_bytes)
    kept_end = kept * table_bytes
    if end < kept_end and kept <= image.header.l1_size and image.mapping.has_table(kept - 1):
        await image.writer.unmap(end, kept_end)
    for l1_index in range(kept, image.header.l1_size):
        await _drop_table(image, l1_index)


async def _drop_table(image: Qcow2Image, l1_index: int) -> None:
    """Give up an L2 table and all that it leads to."""
    table = await image.mapping.table(l1_index)
    if table is None:
        return
    image.check_writable()  # loading it may have shown damage
    await image.epochs.relieve()
    for run in find_runs(table, 0, len(table.entries), image.cluster_size):
        image.space.free(run.entry, run.clusters, punch=True)
    image.mapping.unlink(l1_index)
    image.free_clusters(table.host_offset, 1)


def _packed_size(size: int) -> memoryview:
    return memoryview(struct.pack(">Q", size))


async def _move_l1(image: Qcow2Image, entries: int) -> None:
    """Put a longer L1 table in force."""
    header = image.header
    old_offset, old_clusters = header.l1_table_offset, _clusters(image, header.l1_size)
    clusters = _clusters(image, entries)
    offset = await image.allocate_clusters(clusters)

    async def switch() -> None:
        old = await image.file.read(old_offset, header.l1_size * 8)
        new = old.ljust(clusters * image.cluster_size, b"\0")
        await image.file.write(offset, memoryview(new))
        await image.file.flush()
        await image.file.write(L1_SIZE_FIELD, memoryview(_L1_FIELDS.pack(entries, offset)))

    # If this fails both places stay taken: nobody knows which one the file goes by.
    await image.epochs.exclusively(switch)
    added = np.zeros(entries - header.l1_size, dtype=np.uint64)
    image.mapping.l1 = np.concatenate([image.mapping.l1, added])
    header.l1_size, header.l1_table_offset = entries, offset
    if old_clusters:
        image.free_clusters(old_offset, old_clusters)


def _clusters(image: Qcow2Image, entries: int) -> int:
    return -(-entries * 8 // image.cluster_size)
