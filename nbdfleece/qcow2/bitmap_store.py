"""The dirty bitmaps that an image keeps: loading them, and replacing them all at once.

**What may be trusted.** The bitmap directory counts only while the autoclear bit
for bitmaps is set. A bitmap found ``in_use`` is inconsistent: somebody recorded
into it and never stored it. Only recording bitmaps are ever ``in_use`` while we
have an image open; a frozen one stays clean on disk, and out of memory until it
is asked for.

**One mutating operation.** :meth:`BitmapStore.replace` takes what the image shall
hold from now on. New bits, tables and a new directory go to newly allocated
clusters, the chain's record to the idle slot of the private extension
(:mod:`.private_extension`), and all of that is made durable. Then one write within
one sector puts it in force (rule 6):

=========================  ====================================================
from, to                   the write that does it
=========================  ====================================================
directory, directory       the bitmaps extension's 24 bytes
no directory, directory    the autoclear bit for bitmaps is set
directory, no directory    the autoclear bit for bitmaps is cleared
no directory, none         the slot itself, under its checksum
=========================  ====================================================

Only when that is durable are the old clusters given to the driver's quarantine.
If it fails, it is taken back; if that fails too, nobody knows what a power cut
would leave, neither old nor new clusters are reused, and the store refuses
further changes.

A disk that gets another size (:mod:`.resize`) has the same in steps: :meth:`BitmapStore.write`
takes all the room that there must be, and after the switch to no directory and the new size a
second one, which takes none, puts in force what was written.

**Before the first guest write** :meth:`BitmapStore.mark_in_use` marks what records,
in place: the flags of an entry lie within one sector. That goes for damaged
entries too: another program may believe them (rule 2).

**Damage.** :meth:`BitmapStore.load` never fails because of a bitmap: it lists what is
wrong. A directory with damage is not changed but by :meth:`BitmapStore.repair`,
which keeps what is good and drops the rest. The clusters of what was dropped are
leaked on purpose: a damaged table may point to anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from ..bitmaps.bitmap import Bitmap
from ..block.threads import to_its_end
from ..errors import ImageError, StateError
from .activity_log import ActivityLog
from .bitmap_bits import (
    PackedBits,
    cluster_runs,
    contains_any,
    pack_content,
    packed_elsewhere,
    span_clusters,
    stored_runs,
)
from .bitmap_directory import (
    BITMAPS_MAX,
    DIRECTORY_SIZE_MAX,
    ENTRY_FLAGS_POSITION,
    NAME_BYTES_MAX,
    TABLE_ENTRY_ALL_ONES,
    BitmapEntry,
    BitmapFlags,
    BitmapsExtension,
    DamagedEntry,
    Table,
    directory_size,
    list_directory,
    size_fault,
    stored_bitmap_bytes,
    table_entries_needed,
    tables_fault,
    unpack_table,
)
from .directory_switch import BitmapImage, ChainRecord, DirectorySwitch
from .written_bitmaps import (
    NOTHING_WRITTEN,
    HeldBitmap,
    PlannedBitmap,
    WrittenBitmaps,
    all_clusters,
    clusters_of,
    write_bitmaps,
)

_LOAD_BYTES: Final = 64 << 10
"""Bytes of bits that are read at once, into memory that is used again: zeroes cost none."""


class BitmapDescriptor(NamedTuple):
    """A bitmap in QEMU's terms."""

    name: str
    granularity: int
    """Bytes per bit."""
    recording: bool
    inconsistent: bool
    """It was in use when it was loaded: its bits may miss changes."""
    persistent: bool = True


class StoredBitmap(NamedTuple):
    """A bitmap that an image shall hold."""

    name: str
    granularity: int
    """Bytes per bit."""
    recording: bool
    in_use: bool
    """Marked as not to be trusted unless it is stored again; only for what is recording."""
    content: Bitmap | None = None
    """Its bits; None keeps those that are stored under the name, or are in ``log``."""
    log: ActivityLog | None = None
    """Where its bits are, if they are kept a superset while it records."""


class RepairReport(NamedTuple):
    """What became of a damaged directory."""

    kept: list[BitmapDescriptor]
    dropped: list[DamagedEntry]


class _Wanted(NamedTuple):
    """A :class:`StoredBitmap` whose bits can no longer change."""

    bitmap: StoredBitmap
    bits: PackedBits | None


class BitmapStore:
    """The persistent bitmaps of one open image. Made by :meth:`load`."""

    def __init__(self, image: BitmapImage, switch: DirectorySwitch | None) -> None:
        self._image = image
        self._switch = switch
        self._held: dict[str, HeldBitmap] = {}
        self._lock = asyncio.Lock()
        self.damaged: list[DamagedEntry] = []
        """What is wrong with the directory; while there is anything it is not written to."""

    @classmethod
    async def load(cls, image: BitmapImage) -> BitmapStore:
        """Read the directory and all tables, but no bits; once for each time an image is opened.

        Damage is listed in :attr:`damaged`, it is no error.

        Raises:
            OSError: The file could not be read.
        """
        # Version 2 has no autoclear bits, and so no bitmaps.
        switch = await DirectorySwitch.open(image) if image.header.version >= 3 else None
        store = cls(image, switch)
        if switch is not None:
            await store._load_directory(switch)
        return store

    # What there is

    def damage_of(self, name: str) -> str | None:
        """Why a bitmap is not there because of damage, or may not be; None if that is not so."""
        if name in self._held:
            return None
        return next((each.reason for each in self.damaged if each.name in (name, None)), None)

    @property
    def entries(self) -> list[BitmapDescriptor]:
        """All bitmaps that are not damaged, in the directory's order."""
        return [
            BitmapDescriptor(
                held.entry.name, held.entry.granularity, held.entry.auto, held.inconsistent
            )
            for held in self._held.values()
        ]

    @property
    def record(self) -> ChainRecord | None:
        """The private payload, or None if the image has none."""
        return None if self._switch is None else self._switch.record

    @property
    def private_bit_was_set(self) -> bool:
        """Whether, when the image was opened, nobody had written it since our last record."""
        return self._switch is not None and self._switch.private_bit_was_set

    @property
    def payload_bytes_max(self) -> int:
        """The largest private payload that the image's header has room for; 0 if it has none."""
        if self._switch is None:
            return 0
        return max(self._switch.payload_bytes_max(with_directory=True), 0)

    async def load_bits(self, name: str) -> Bitmap:
        """Read the bits of a bitmap as they were last stored.

        Those of an inconsistent one may miss changes; whoever asks for them must know
        how to make up for that (rule 2).

        Raises:
            StateError: There is no such bitmap.
            ImageError: Its table does not fit the disk.
            OSError: The file could not be read.
        """
        async with self._lock:
            entry, _, table, _ = self._get(name)
            if table is None:
                raise ImageError(
                    self._image.path, f"bitmap {name!r} is inconsistent and its bits are unreadable"
                )
            bitmap = Bitmap(self._image.size, entry.granularity)
            needed = stored_bitmap_bytes(self._image.size, entry.granularity)
            buffer = memoryview(bytearray(_LOAD_BYTES))
            for offset, start, end in stored_runs(table, self._image.cluster_size, needed):
                for position in range(start, end, _LOAD_BYTES):
                    part = buffer[: end - position]
                    if offset == TABLE_ENTRY_ALL_ONES:
                        part[:] = b"\xff" * len(part)
                    else:
                        await self._image.file.read_into(offset + position - start, part)
                    bitmap.put(position, part)
        return bitmap

    async def dirty_bytes(self, name: str) -> int:
        """How many bytes of the disk a stored bitmap marks; errors as for :meth:`load_bits`."""
        return (await self.load_bits(name)).dirty_bytes()

    def _get(self, name: str) -> HeldBitmap:
        held = self._held.get(name)
        if held is None:
            raise StateError(f"{self._image.path}: there is no bitmap {name!r}")
        return held

    # Loading

    async def _load_directory(self, switch: DirectorySwitch) -> None:
        if switch.fault is not None:
            self.damaged.append(DamagedEntry(0, None, switch.fault))
        count, size, offset = switch.directory
        if not count:
            return
        geometry = switch.geometry()
        data = await self._image.file.read(offset, size)
        listing = list_directory(data, count, geometry)
        self.damaged.extend(listing.damaged)
        entries = 0
        for entry, position in zip(listing.entries, listing.positions, strict=True):
            entries += entry.table_entries
            if reason := tables_fault(entries):
                self.damaged.append(DamagedEntry(position, entry.name, reason))
                continue
            await self._load_table(entry, position, switch)
        self._drop_shared_clusters()
        self._register_clusters()

    async def _load_table(self, entry: BitmapEntry, position: int, switch: DirectorySwitch) -> None:
        """Take up a bitmap, or note what is wrong with its table."""
        data = await self._image.file.read(entry.table_offset, 8 * entry.table_entries)
        table: Table | None = None
        try:
            table = unpack_table(data, entry, switch.geometry(), self._image.path)
        except ImageError as error:
            # Of a bitmap in use nothing is believed, so nothing can be wrong with it either.
            if not entry.in_use:
                self.damaged.append(DamagedEntry(position, entry.name, str(error)))
                return
        self._held[entry.name] = HeldBitmap(entry, position, table, inconsistent=entry.in_use)

    def _drop_shared_clusters(self) -> None:
        """Note bitmaps whose clusters are somebody else's too."""
        clusters, counts = np.unique(self._clusters(), return_counts=True)
        shared = clusters[counts > 1]
        for name, held in list(self._held.items()):
            mine = clusters_of(held, self._image.cluster_size)
            if contains_any(shared, mine) or self._is_foreign(mine):
                del self._held[name]
                reason = "shares clusters with another bitmap or with the image's own tables"
                self.damaged.append(DamagedEntry(held.position, name, reason))

    def _is_foreign(self, clusters: Table) -> bool:
        """Whether any of the clusters is the driver's."""
        size, overlaps = self._image.cluster_size, self._image.metadata.overlaps
        return any(overlaps(offset, count * size) for offset, count in cluster_runs(clusters, size))

    def _register_clusters(self) -> None:
        """Let no guest write reach the bitmaps, whatever the guest's tables say."""
        size = self._image.cluster_size
        for offset, count in cluster_runs(self._clusters(), size):
            self._image.metadata.add(offset, count * size)

    def _clusters(self) -> Table:
        """The offsets of all clusters of the directory in force and of what it holds."""
        assert self._switch is not None, "it has a directory"
        return all_clusters(self._switch.directory, self._held.values(), self._image.cluster_size)

    # Changing

    async def mark_in_use(self) -> None:
        """Durably mark what is recording as in use; before the first guest write (rule 2).

        The private bit is cleared: until the bitmaps are stored again the record is stale.

        Raises:
            OSError: It may not be durable: do not write to the disk.
        """
        await to_its_end(self._mark_in_use())

    async def _mark_in_use(self) -> None:
        async with self._lock:
            if self._switch is None or self._image.read_only:
                return
            # The damaged ones too: what we do not believe, others may.
            positions = [held.position for held in self._held.values()]
            positions += [damaged.position for damaged in self.damaged]
            await self._mark_entries(self._switch.directory, positions)
            for name, held in self._held.items():
                if held.entry.auto:
                    entry = held.entry._replace(flags=held.entry.flags | BitmapFlags.IN_USE)
                    self._held[name] = held._replace(entry=entry)
            await self._switch.note_generation()
            await self._switch.disown()

    async def _mark_entries(self, directory: BitmapsExtension, positions: list[int]) -> None:
        """Mark those of the directory's entries that record; none is torn, flags are 4 bytes."""
        _, size, offset = directory
        for position in positions:
            if position + ENTRY_FLAGS_POSITION + 4 <= size:
                place = offset + position + ENTRY_FLAGS_POSITION
                flags = int.from_bytes(await self._image.file.read(place, 4), "big")
                if flags & BitmapFlags.AUTO and not flags & BitmapFlags.IN_USE:
                    in_use = (flags | BitmapFlags.IN_USE).to_bytes(4, "big")
                    await self._image.file.write(place, memoryview(in_use))
        await self._image.file.flush()

    async def prepare_log(self, granularity: int, content: Bitmap | None = None) -> ActivityLog:
        """Store bits, or none, with all their clusters, so that marks can be added in place.

        Nothing leads to them until :meth:`replace` is given the log; :meth:`discard_log`
        gives up one that it was not given.

        Raises:
            StateError: The bitmap would be too large.
            OSError: There is no space, or the file could not be written.
        """
        size, cluster_size = self._image.size, self._image.cluster_size
        if reason := size_fault(size, granularity):
            raise StateError(f"{self._image.path}: a bitmap that records {reason}")
        count = table_entries_needed(size, granularity, cluster_size)
        length = count * cluster_size
        data = bytes(length) if content is None else bytes(content.data).ljust(length, b"\0")
        offset = await self._image.allocate_clusters(count)
        try:
            await self._image.file.write(offset, memoryview(data))
        except BaseException:
            self._image.free_clusters(offset, count)
            raise
        table = span_clusters(offset, len(data), cluster_size)
        return ActivityLog(self._image.file, table, cluster_size, size, granularity)

    def discard_log(self, log: ActivityLog) -> None:
        """Give up the clusters of a log that the image's directory does not lead to."""
        if self._switch is None or self._switch.is_uncertain:
            return  # leaked: after a power cut the directory might lead to them
        self._free(log.table)

    def replace(
        self, entries: Sequence[StoredBitmap], private_payload: bytes | None
    ) -> Coroutine[Any, Any, None]:
        """Make the image hold these bitmaps and this record, and no others, all or nothing.

        The bits are copied when this is called, not when the result is awaited: guest
        writes may go on (rule 3). Once it runs it is not cut short by cancellation.

        Args:
            entries: All bitmaps that there shall be, in the directory's order.
            private_payload: The record that belongs to them; None keeps the one there is.

        Returns:
            What is to be awaited; it ends when everything is durable.

        Raises:
            StateError: This cannot be; nothing was changed.
            OSError: It could not be done; nothing was changed, unless the image is beyond use.
        """
        return to_its_end(self._replace_locked(self._packed(entries), private_payload))

    def _packed(self, entries: Sequence[StoredBitmap]) -> list[_Wanted]:
        """The bitmaps as they are now."""
        size = self._image.cluster_size
        return [_Wanted(item, pack_content(item.content, size)) for item in entries]

    async def _replace_locked(self, wanted: list[_Wanted], payload: bytes | None) -> None:
        async with self._lock:
            switch = self._check(wanted, payload, self._image.size)
            old = self._clusters()
            await self._replace(switch, wanted, payload)
            self._free(np.setdiff1d(old, self._clusters()))

    async def write(
        self, entries: Sequence[StoredBitmap], private_payload: bytes | None, size: int
    ) -> WrittenBitmaps:
        """Write bitmaps of a disk of another size, without putting them in force.

        Args:
            entries: All bitmaps that there shall be, with their bits.
            private_payload: As of :meth:`replace`.
            size: Bytes of the disk.

        Raises:
            StateError: This cannot be; nothing was changed.
            OSError: They could not be written; nothing was changed.
        """
        async with self._lock:
            wanted = self._packed(entries)
            switch = self._check(wanted, private_payload, size)
            written = await self._write(switch, wanted, private_payload)
            try:
                await self._image.flush()  # with the refcounts, which take room, too
            except BaseException:
                self.discard(written)
                raise
            return written

    async def switch_off(self) -> WrittenBitmaps:
        """Have no bitmap in force; what was is returned, to be put in force again or discarded.

        Raises:
            StateError, OSError: As of :meth:`replace`.
        """
        async with self._lock:
            switch = self._check([], None, self._image.size)
            old = WrittenBitmaps(switch.directory, list(self._held.values()), 0, 0)
            await self._switch_to(switch, NOTHING_WRITTEN, None)
            return old

    async def put_in_force(self, written: WrittenBitmaps, private_payload: bytes | None) -> None:
        """Have the image hold what was written, after :meth:`switch_off`; it takes no room.

        Raises:
            OSError: It could not be done; no bitmap is in force, and the image may be beyond use.
        """
        async with self._lock:
            switch = self._switch
            assert switch is not None, "it was written by way of it"
            await switch.prepare(with_directory=True, with_record=private_payload is not None)
            await self._switch_to(switch, written, private_payload)

    def discard(self, written: WrittenBitmaps) -> None:
        """Give up the clusters of what is not in force, and shares none with what is."""
        self._free(written.clusters(self._image.cluster_size))

    def _free(self, clusters: Table) -> None:
        for offset, count in cluster_runs(clusters, self._image.cluster_size):
            self._image.free_clusters(offset, count)

    async def repair(self) -> RepairReport:
        """Drop what is damaged from the directory and keep the rest; errors as :meth:`replace`."""
        return await to_its_end(self._repair())

    async def _repair(self) -> RepairReport:
        async with self._lock:
            dropped, self.damaged = self.damaged, []
            try:
                if dropped:
                    wanted = [_Wanted(_kept(held), None) for held in self._held.values()]
                    switch = self._check(wanted, None, self._image.size)
                    await self._replace(switch, wanted, None)
            except BaseException:
                self.damaged = dropped
                raise
            return RepairReport(self.entries, dropped)

    async def _replace(
        self, switch: DirectorySwitch, wanted: list[_Wanted], payload: bytes | None
    ) -> None:
        await self._switch_to(switch, await self._write(switch, wanted, payload), payload)

    async def _write(
        self, switch: DirectorySwitch, wanted: list[_Wanted], payload: bytes | None
    ) -> WrittenBitmaps:
        """Make places in the header, and write a directory and the bits that are not kept."""
        await switch.prepare(with_directory=bool(wanted), with_record=payload is not None)
        return await write_bitmaps(self._image, [self._plan(item) for item in wanted])

    async def _switch_to(
        self, switch: DirectorySwitch, written: WrittenBitmaps, payload: bytes | None
    ) -> None:
        """Switch to what was written; if that fails, give it up."""
        try:
            slot = await switch.stage(written.directory, payload)
            await self._image.flush()
            await switch.commit(written.directory, slot)
        except BaseException:
            if written.new_clusters and not switch.is_uncertain:
                self._image.free_clusters(written.new_offset, written.new_clusters)
            raise
        self._held = {item.entry.name: item for item in written.held}
        await switch.tidy()

    def _check(self, wanted: list[_Wanted], payload: bytes | None, size: int) -> DirectorySwitch:
        """Insist that the image can hold ``wanted`` when the disk has ``size`` bytes."""
        path, switch = self._image.path, self._switch
        if switch is None:
            raise StateError(f"{path}: qcow2 version 2 has no bitmaps; use version 3")
        if self._image.read_only:
            raise StateError(f"{path}: the image is open for reading only")
        if switch.is_uncertain:
            raise StateError(f"{path}: a change of the bitmaps failed half-way; open it again")
        if self.damaged:
            damage = self.damaged[0].reason
            raise StateError(f"{path}: the bitmap directory is damaged ({damage}): repair it first")
        names = [item.bitmap.name for item in wanted]
        if len(set(names)) != len(names):
            raise StateError(f"{path}: two bitmaps have the same name")
        for item in wanted:
            if reason := self._fault(item, size):
                raise StateError(f"{path}: bitmap {item.bitmap.name!r} {reason}")
        if len(wanted) > BITMAPS_MAX or directory_size(names) > DIRECTORY_SIZE_MAX:
            raise StateError(f"{path}: these are more bitmaps than an image can hold")
        if reason := tables_fault(sum(self._table_entries(item, size) for item in wanted)):
            raise StateError(f"{path}: {reason}")
        if payload is not None:
            switch.check_room(payload, with_directory=bool(wanted))
        return switch

    def _table_entries(self, item: _Wanted, size: int) -> int:
        """How many a bitmap's table will have; what is kept in use may have any number."""
        _, granularity, _, _, content, log = item.bitmap
        if content is None and log is None:
            return self._held[item.bitmap.name].entry.table_entries
        return table_entries_needed(size, granularity, self._image.cluster_size)

    def _fault(self, item: _Wanted, size: int) -> str | None:
        """Why a bitmap cannot be stored, or None."""
        name, granularity, recording, in_use, content, log = item.bitmap
        try:
            is_name = 1 <= len(name.encode()) <= NAME_BYTES_MAX and "\0" not in name
        except UnicodeEncodeError:
            is_name = False
        if not is_name:
            return f"needs a name of 1 to {NAME_BYTES_MAX} bytes of UTF-8"
        if in_use and not recording and content is not None:
            return "is not recording, so it cannot be in use"
        if log is not None:
            return None if in_use else "is logged, so it is in use"
        if content is None:
            return self._keeping_fault(name, granularity, in_use)
        if content.size != size or content.granularity != granularity:
            return f"does not fit a disk of {size} bytes at granularity {granularity}"
        return size_fault(content.size, granularity)

    def _keeping_fault(self, name: str, granularity: int, in_use: bool) -> str | None:
        """Why a bitmap cannot be kept as it is stored, or None."""
        held = self._held.get(name)
        if held is None:
            return "is not stored yet, so there is nothing to keep"
        if held.entry.granularity != granularity:
            return f"has granularity {held.entry.granularity}"
        if held.entry.in_use and not in_use:
            return "is in use: without its content it cannot be called good"
        return None

    def _plan(self, item: _Wanted) -> PlannedBitmap:
        """What the directory is to have of a bitmap."""
        bitmap, bits = item
        if bitmap.log is not None and not self._is_held(bitmap.name, bitmap.log):
            bits = packed_elsewhere(bitmap.log.table, self._image.cluster_size)
        held = self._held.get(bitmap.name)
        return PlannedBitmap(bitmap.name, bitmap.granularity, _flags(bitmap), bits, held)

    def _is_held(self, name: str, log: ActivityLog) -> bool:
        """Whether the directory leads to the log's clusters already."""
        held = self._held.get(name)
        return held is not None and held.table is not None and np.array_equal(held.table, log.table)


def _flags(bitmap: StoredBitmap) -> BitmapFlags:
    flags = BitmapFlags.AUTO if bitmap.recording else BitmapFlags.NONE
    return flags | BitmapFlags.IN_USE if bitmap.in_use else flags


def _kept(held: HeldBitmap) -> StoredBitmap:
    """A bitmap as it is stored."""
    entry = held.entry
    return StoredBitmap(entry.name, entry.granularity, entry.auto, entry.in_use)
