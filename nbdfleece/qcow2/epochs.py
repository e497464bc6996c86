"""The order in which the file learns of changes: flushes in epochs (rule 4).

All metadata changes happen in memory. A flush takes a copy of what is dirty, at one
instant, and writes it in this order, with an ``fdatasync`` after each part:

1. *A*: what nothing in the file leads to yet, or what only protects: guest data (it
   is in the page cache already), new L2 tables, refcount blocks, a moved refcount table.
2. *R*, only when refcount blocks were added: the entries of the refcount table that
   lead to them, or the header's 12 bytes that lead to a moved table. A refcount in
   a block that the table does not lead to protects nothing, so *B* may not go with it.
3. *B*: what leads to all that: existing L2 tables, L1 entries, header fields.

Then the clusters that were freed before the copy was taken leave quarantine; their
decrements are made in memory and written by some later *A*.

Guest writes go on meanwhile: what they change is dirty for the next flush, which may
begin only when this one has ended. Flushes asked for while one runs share the next.
A flush that fails leaves everything that it took dirty again, and all its callers
get the error. What it made durable in *A* may be in force from then on, whatever the
writes of *R* and *B* came to: the next flush treats it so and changes it in *B* only.
With no dirty metadata a flush is one ``fdatasync``.

A power cut between any two of these writes leaks clusters at worst.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

from ..block.file import FileNode
from .entries import L2Table
from .header import INCOMPATIBLE_FIELD, REFCOUNT_TABLE_FIELD, Header
from .quarantine import FreedBatch, Quarantine
from .refcounts import RefcountBlock, Refcounts
from .table_codec import pack_table
from .tables import Mapping

DIRTY_BYTES_MAX: Final = 16 << 20
"""Dirty tables beyond which a flush begins by itself; at twice as much writers wait."""

FREED_RUNS_MAX: Final = 1 << 16
"""Freed runs in quarantine beyond which a flush begins by itself: some 10 MiB of memory."""

_SECTOR: Final = 512

_TURN_BYTES: Final = 64 << 10
"""Written before everybody else has a turn."""

_WRITE_BYTES_MIN: Final = 4096
"""As what a write counts, at least."""

_log = logging.getLogger(__name__)

_Write = tuple[int, bytes]
"""Host offset and what to write there."""


@dataclass(slots=True)
class _TakenTable:
    """Entries of an L2 table that a flush has taken, and is to write as they were then.

    They are packed when they are written, or else just before the table changes: to pack all
    tables of a flush at once takes 15 ms and more, in which nobody else is served (rule 5).
    """

    l1_index: int
    table: L2Table
    first: int
    end: int
    was_new: bool
    offset: int
    """Where in the file they go."""
    _kept: bytes | None = None

    def __post_init__(self) -> None:
        self.table.pins += 1
        self.table.before_change = self._keep

    def _keep(self) -> None:
        _, self._kept = self.pack()

    def pack(self) -> _Write:
        """What is to be written; the table may change from here on."""
        self.table.before_change = None
        if self._kept is not None:
            return self.offset, self._kept
        return self.offset, pack_table(self.table, self.first, self.end)

    def release(self) -> None:
        """The flush has ended."""
        self.table.before_change = None
        self.table.pins -= 1


@dataclass(slots=True)
class _Plan:
    """What one flush writes, and what to mark dirty again if it fails."""

    freed: FreedBatch
    epoch_a: list[_Write] = field(default_factory=list)
    epoch_r: list[_Write] = field(default_factory=list)
    epoch_b: list[_Write] = field(default_factory=list)
    file_end: int = 0
    tables: list[_TakenTable] = field(default_factory=list)
    l1_indices: set[int] = field(default_factory=set)
    blocks: list[tuple[int, RefcountBlock, int, int]] = field(default_factory=list)
    urgent: set[int] = field(default_factory=set)
    table_indices: set[int] = field(default_factory=set)
    table_has_moved: bool = False
    has_switch: bool = False
    has_header: bool = False
    is_protected: bool = False
    """Epoch A is durable: what it wrote may come into force."""


class Epochs:
    """The flushes of one image open for writing.

    Args:
        file: The image file.
        header: Its header.
        mapping: L1 and L2 tables.
        refcounts: Refcount table and blocks.
        quarantine: Freed clusters.
        data_file: Where guest data lie, if not in the image file.
    """

    def __init__(
        self,
        file: FileNode,
        header: Header,
        mapping: Mapping,
        refcounts: Refcounts,
        quarantine: Quarantine,
        data_file: FileNode,
    ) -> None:
        self._file = file
        self._header = header
        self._mapping = mapping
        self._refcounts = refcounts
        self._quarantine = quarantine
        self._data_file = data_file
        self._waiting: asyncio.Task[None] | None = None
        self._exclusive = asyncio.Lock()
        self.header_is_dirty = False
        """The incompatible feature bits differ from the file."""

    @property
    def is_dirty(self) -> bool:
        """Whether a flush has metadata to write or freed clusters to settle."""
        return bool(
            self._mapping.dirty
            or self._mapping.dirty_l1
            or self._refcounts.needs_flush
            or self._quarantine.has_unsettled
            or self.header_is_dirty
        )

    async def flush(self) -> None:
        """Make everything durable that was written before this call."""
        if self._waiting is None and not self._exclusive.locked() and not self.is_dirty:
            await self._flush_data()
            await self._file.flush()
            return
        await asyncio.shield(self._request())

    def _request(self) -> asyncio.Task[None]:
        """The flush that has not begun yet and covers everything done up to now."""
        if self._waiting is None:
            self._waiting = asyncio.ensure_future(self._run())
        return self._waiting

    async def _run(self) -> None:
        async with self._exclusive:
            self._waiting = None  # what changes from here on is for the next flush
            await self._flush_epochs()

    @property
    def is_at_ease(self) -> bool:
        """Whether :meth:`relieve` has nothing to do."""
        dirty = self._mapping.dirty_bytes
        return dirty <= DIRTY_BYTES_MAX and self._quarantine.runs_waiting <= FREED_RUNS_MAX

    async def relieve(self) -> None:
        """Begin a flush if much is dirty; wait for it if very much is."""
        if self.is_at_ease:
            return
        dirty = self._mapping.dirty_bytes
        if self._waiting is None and not self._exclusive.locked():
            self._request().add_done_callback(_report)
        if dirty > 2 * DIRTY_BYTES_MAX:
            await self.flush()

    async def exclusively(self, job: Callable[[], Awaitable[None]]) -> None:
        """Run a job that writes the header when everything before it is durable.

        No flush runs meanwhile, and the header in memory says what the file says; the
        job's own writes are made durable after it.
        """
        async with self._exclusive:
            await self._flush_epochs()
            await job()
            await self._file.flush()

    async def settle(self) -> None:
        """Flush until the file has everything, the decrements after the freeing too."""
        await self.flush()
        async with self._exclusive:
            await self._release()  # what had readers until after the last flush
            if self._refcounts.dirty:
                await self._flush_epochs()

    async def _flush_data(self) -> None:
        if self._data_file is not self._file:
            await self._data_file.flush()

    async def _flush_epochs(self) -> None:
        while self._refcounts.table_is_homeless:
            await self._refcounts.place_table()
        plan = self._take_plan()
        try:
            await self._flush_data()
            if plan.file_end > self._file.size:
                await self._file.grow(plan.file_end)
            await self._write_epoch(plan.epoch_a, [it for it in plan.tables if it.was_new])
            await self._file.flush()
            plan.is_protected = True
            if await self._write_epoch(plan.epoch_r, []):
                await self._file.flush()
            if await self._write_epoch(plan.epoch_b, [it for it in plan.tables if not it.was_new]):
                await self._file.flush()
        except BaseException:
            self._restore(plan)
            raise
        self._unpin(plan)
        self._quarantine.settle(plan.freed)
        await self._release()

    async def _write_epoch(self, writes: list[_Write], tables: list[_TakenTable]) -> bool:
        """Make the writes of an epoch, and let others have their turns between.

        Returns:
            Whether there were any.
        """
        spent = 0
        for offset, data in chain(_joined(writes), map(_TakenTable.pack, tables)):
            await self._file.write(offset, memoryview(data))
            spent += max(len(data), _WRITE_BYTES_MIN)
            if spent >= _TURN_BYTES:
                spent = 0
                await asyncio.sleep(0)
        return bool(writes or tables)

    async def _release(self) -> None:
        """Free what has left quarantine, and give the guest's discards back to the host.

        Everything is durable by now, so an error here is none of the flush's callers'.
        """
        for offset, length, punch in self._quarantine.take_released():
            if punch:
                try:
                    await self._file.trim(offset, length)
                except OSError as error:  # the clusters are free all the same
                    _log.warning("%s: no hole at %#x: %s", self._file.path, offset, error)
            try:
                await self._refcounts.release(offset, length)
            except OSError as error:
                _log.warning("%s: leaked clusters at %#x: %s", self._file.path, offset, error)

    def _take_plan(self) -> _Plan:
        """Copy everything that is dirty; it is clean from here on unless :meth:`_restore`."""
        plan = _Plan(self._quarantine.close(), file_end=self._refcounts.end)
        self._plan_tables(plan)
        self._plan_refcounts(plan)
        if self.header_is_dirty:
            bits = struct.pack(">Q", self._header.incompatible_features)
            plan.epoch_b.append((INCOMPATIBLE_FIELD, bits))
            plan.has_header, self.header_is_dirty = True, False
        return plan

    def _plan_tables(self, plan: _Plan) -> None:
        mapping = self._mapping
        entry_bytes = 16 if self._header.has_extended_l2 else 8
        per_sector = _SECTOR // entry_bytes
        for l1_index in sorted(mapping.dirty):
            table = mapping.tables[l1_index]
            first = table.dirty_first // per_sector * per_sector
            end = min(-(-table.dirty_end // per_sector) * per_sector, len(table.entries))
            offset = table.host_offset + first * entry_bytes
            plan.tables.append(_TakenTable(l1_index, table, first, end, table.is_new, offset))
            table.dirty_first = table.dirty_end = 0
            table.is_new = False
        for l1_index in sorted(mapping.dirty_l1):
            entry = struct.pack(">Q", int(mapping.l1[l1_index]))
            plan.epoch_b.append((self._header.l1_table_offset + 8 * l1_index, entry))
        plan.l1_indices = set(mapping.dirty_l1)
        mapping.dirty.clear()
        mapping.dirty_l1.clear()

    def _plan_refcounts(self, plan: _Plan) -> None:
        refcounts = self._refcounts
        for index in sorted(refcounts.dirty):
            block = refcounts.blocks[index]
            plan.blocks.append((index, block, block.dirty_first, block.dirty_end))
            plan.epoch_a.append(refcounts.pack_block(block))
            block.dirty_first = block.dirty_end = 0
            block.pins += 1
        place = self._header.refcount_table_offset
        if refcounts.table_has_moved:
            words = struct.pack(f">{len(refcounts.table)}Q", *refcounts.table)
            plan.epoch_a.append((place, words))
        else:
            plan.epoch_r += [
                (place + 8 * index, struct.pack(">Q", refcounts.table[index]))
                for index in sorted(refcounts.dirty_table)
            ]
        if refcounts.switch_is_due:
            switch = struct.pack(">QI", place, self._header.refcount_table_clusters)
            plan.epoch_r.append((REFCOUNT_TABLE_FIELD, switch))
        plan.table_has_moved, refcounts.table_has_moved = refcounts.table_has_moved, False
        plan.has_switch, refcounts.switch_is_due = refcounts.switch_is_due, False
        plan.table_indices = set(refcounts.dirty_table)
        plan.urgent = set(refcounts.urgent)
        refcounts.dirty.clear()
        refcounts.urgent.clear()
        refcounts.dirty_table.clear()

    def _unpin(self, plan: _Plan) -> None:
        for taken in plan.tables:
            taken.release()
        for _, block, _, _ in plan.blocks:
            block.pins -= 1

    def _restore(self, plan: _Plan) -> None:
        """The flush failed: what it took is dirty again, on top of what is dirty since."""
        self._unpin(plan)
        for taken in plan.tables:
            table = taken.table
            self._mapping.touch(taken.l1_index, table, taken.first, taken.end)
            if taken.was_new and not plan.is_protected:
                table.is_new = True
                table.mark_dirty(0, len(table.entries))
        self._mapping.dirty_l1 |= plan.l1_indices
        for index, block, first, end in plan.blocks:
            block.mark_dirty(first, end)
            self._refcounts.dirty.add(index)
        self._refcounts.urgent |= plan.urgent
        self._refcounts.dirty_table |= plan.table_indices
        self._refcounts.table_has_moved |= plan.table_has_moved and not plan.is_protected
        self._refcounts.switch_is_due |= plan.has_switch
        self._quarantine.restore(plan.freed)
        self.header_is_dirty |= plan.has_header


def _joined(writes: list[_Write]) -> list[_Write]:
    """The writes in the file's order, those that touch one another made one."""
    rows: list[tuple[int, list[bytes]]] = []
    end = -1
    for offset, data in sorted(writes, key=lambda write: write[0]):
        if offset == end:
            rows[-1][1].append(data)
        else:
            rows.append((offset, [data]))
        end = offset + len(data)
    return [(offset, b"".join(parts)) for offset, parts in rows]


def _report(task: asyncio.Task[None]) -> None:
    """A flush that nobody waited for has ended: its error is met again by the next flush."""
    if not task.cancelled() and task.exception() is not None:
        _log.warning("a flush in the background failed: %s", task.exception())
