"""Guest writes, zeroes and discards on a qcow2 image.

Every operation here holds the guest clusters that it touches in the image's range
lock, so whatever suspends (a cold read of old data, a large write) finds them as it
left them. The pure fast path, overwriting one cluster where it is, is in
:meth:`nbdfleece.qcow2.image.Qcow2Image.write`; it never suspends and asks only
whether any range is held.

An entry is changed in memory only after its data are in the file's page cache, so
that a flush (:mod:`nbdfleece.qcow2.epochs`) never makes an entry durable before them.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from ..block.single_flight import SingleFlight
from .compressed import compressed_entry
from .entries import (
    COPIED,
    OFFSET_MASK,
    SUBCLUSTERS,
    SUBCLUSTERS_PER_CLUSTER,
    ZERO,
    Kind,
    L2Table,
    Run,
    find_runs,
    kind_of,
)
from .subclusters import bitmap_of, entry_with_bitmap, kind_of_subcluster
from .table_codec import copied_table, empty_table

if TYPE_CHECKING:
    from .image import Qcow2Image


class _Part(NamedTuple):
    """A pinned L2 table and the entries of it that an operation is about."""

    l1_index: int
    table: L2Table
    first: int
    end: int


_Change = Callable[[_Part, int, Run], Awaitable[None]]
"""Does something with the run at an index of a part's table."""


class Writer:
    """The writing half of an image that is open for writing."""

    def __init__(self, image: Qcow2Image) -> None:
        self._image = image
        self._mapping = image.mapping
        self._refcounts = image.refcounts
        self._quarantine = image.quarantine
        self._space = image.space
        self._cluster_bits = image.layout.cluster_bits
        self._cluster_size = image.layout.cluster_size
        self._l2_entries = image.layout.l2_entries
        self._subcluster_size = (
            self._cluster_size // SUBCLUSTERS_PER_CLUSTER if image.layout.has_extended_l2 else 0
        )
        self._has_zero_flag = image.layout.version >= 3
        self._making = SingleFlight()

    def write_new_at_once(self, offset: int, data: memoryview) -> bool:
        """Write whole clusters that have no place yet, if nothing needs waiting for.

        The caller has asked whether the image can be written and any range is held.

        Returns:
            Whether they are written; if not, nothing has changed.

        Raises:
            OSError: They could not be written.
        """
        l1_index, first = divmod(offset >> self._cluster_bits, self._l2_entries)
        clusters = len(data) >> self._cluster_bits
        table = self._mapping.tables.get(l1_index)
        if (
            table is None
            or not clusters
            or (offset | len(data)) & self._cluster_size - 1
            or first + clusters > self._l2_entries
            or self._subcluster_size
            or any(table.entries[first : first + clusters])
            or self._mapping.is_shared(l1_index)
            or not self._image.epochs.is_at_ease
        ):
            return False
        host = self._space.write_new_at_once(clusters, data)
        if host is None:
            return False
        table.is_recent = True
        table.set_run(first, clusters, host | COPIED, self._cluster_size)
        self._mapping.touch(l1_index, table, first, first + clusters)
        return True

    async def write(self, offset: int, data: memoryview) -> None:
        """Write guest data wherever they belong."""
        await self._image.epochs.relieve()
        async with self._image.ranges.hold(*self._aligned(offset, offset + len(data))):
            self._image.check_writable()
            await self._write(offset, data)

    async def _write(self, offset: int, data: memoryview) -> None:
        await self._for_each_part(
            offset, offset + len(data), partial(self._write_part, offset, data)
        )

    async def _write_part(self, offset: int, data: memoryview, part: _Part) -> None:
        """Write what of ``data``, which begin at ``offset``, lies in one L2 table's range."""
        end = offset + len(data)
        guest = self._offset_of(part, part.first)
        for run in find_runs(part.table, part.first, part.end, self._cluster_size):
            run_end = guest + (run.clusters << self._cluster_bits)
            low, high = max(guest, offset), min(run_end, end)
            await self._write_run(part, run, low, data[low - offset : high - offset])
            guest = run_end

    async def _write_run(self, part: _Part, run: Run, offset: int, data: memoryview) -> None:
        """Write data that lie within one run of clusters."""
        if run.kind is Kind.NORMAL and run.entry & COPIED:
            skip = offset & self._cluster_size - 1
            await self._space.write((run.entry & OFFSET_MASK) + skip, data)
        elif run.kind is Kind.ZERO_ALLOC and run.entry & COPIED:
            index = self._index(offset)
            host, size = run.entry & OFFSET_MASK, self._cluster_size
            await self._fill(host, offset, data, size, lambda _: False, False)
            self._set(part, index, run.clusters, run.entry & ~ZERO, self._cluster_size)
        elif run.kind is Kind.INVALID:
            raise OSError(errno.EIO, "damaged L2 entry", self._image.path)
        elif self._subcluster_size and _may_be_partial(run):
            await self._write_extended(part, run, offset, data)
        else:
            await self._write_new(part, run, offset, data)

    async def _write_extended(self, part: _Part, run: Run, offset: int, data: memoryview) -> None:
        """Write data where clusters need not be filled whole: only subclusters are."""
        while len(data):
            skip = offset & self._cluster_size - 1
            if skip or len(data) < self._cluster_size or run.entry & COPIED:
                length = min(len(data), self._cluster_size - skip)
                await self._write_subclusters(part, offset, data[:length])
            else:
                length = len(data) & ~(self._cluster_size - 1)
                await self._write_new(part, run, offset, data[:length])
            offset += length
            data = data[length:]

    async def _write_subclusters(self, part: _Part, offset: int, data: memoryview) -> None:
        """Write data that lie within one cluster, which is ours or has no host cluster."""
        index = self._index(offset)
        entry = part.table.entries[index]
        bitmap = bitmap_of(entry, part.table.bitmap(index))
        if entry & COPIED:
            host = entry & OFFSET_MASK
            await self._fill_subclusters(host, bitmap, offset, data, False)
        else:
            new = await self._space.take(offset & ~(self._cluster_size - 1), 1)
            host = new.offset
            try:
                await self._fill_subclusters(host, bitmap, offset, data, new.is_fresh)
            except BaseException:
                await self._space.give_back(new)
                raise
        within = offset & self._cluster_size - 1
        first = within // self._subcluster_size
        end = (within + len(data) - 1) // self._subcluster_size + 1
        touched = (1 << end) - (1 << first)
        bitmap = (bitmap | touched) & ~(touched << SUBCLUSTERS_PER_CLUSTER)
        part.table.set_bitmap(index, bitmap)
        self._set(part, index, 1, entry_with_bitmap(host | COPIED, bitmap), 0)

    async def _fill_subclusters(
        self, host: int, bitmap: int, offset: int, data: memoryview, is_fresh: bool
    ) -> None:
        """Write data, and the rest of the first and last subcluster where it is not there yet."""
        size = self._subcluster_size
        within = offset & self._cluster_size - 1

        def old_at(position: int) -> bool | None:
            kind = kind_of_subcluster(bitmap, (position & self._cluster_size - 1) // size)
            return None if kind is Kind.NORMAL else not self._reads_as_zeroes(kind)

        await self._fill(host + within - within % size, offset, data, size, old_at, is_fresh)

    async def write_packed(self, offset: int, packed: memoryview) -> None:
        """Let one guest cluster be what was compressed already."""
        await self._image.epochs.relieve()
        end = offset + self._cluster_size
        async with self._image.ranges.hold(offset, end):
            self._image.check_writable()
            await self._for_each_part(offset, end, partial(self._write_packed_part, packed))

    async def _write_packed_part(self, packed: memoryview, part: _Part) -> None:
        host = await self._space.take_packed(len(packed))
        try:
            await self._space.write(host, packed)
        except BaseException:
            await self._space.give_back_packed(host, len(packed))
            raise
        self._replace(part, part.first, 1, compressed_entry(host, len(packed), self._cluster_bits))

    async def _write_new(self, part: _Part, run: Run, offset: int, data: memoryview) -> None:
        """Write data into new host clusters, with what was around them copied along."""
        has_old = not self._reads_as_zeroes(run.kind)
        while len(data):
            start = offset & ~(self._cluster_size - 1)
            wanted = -(-(offset + len(data) - start) // self._cluster_size)
            new = await self._space.take(start, wanted)
            length = min(len(data), start + (new.clusters << self._cluster_bits) - offset)
            try:
                await self._fill(
                    new.offset,
                    offset,
                    data[:length],
                    self._cluster_size,
                    lambda _: has_old,
                    new.is_fresh,
                )
            except BaseException:
                await self._space.give_back(new)
                raise
            self._replace(part, self._index(offset), new.clusters, new.offset | COPIED)
            offset += length
            data = data[length:]

    async def _fill(
        self,
        host: int,
        offset: int,
        data: memoryview,
        unit: int,
        old_at: Callable[[int], bool | None],
        is_fresh: bool,
    ) -> None:
        """Write data and the rest of the first and last unit around them.

        Args:
            host: Host offset of the unit that holds guest offset ``offset``.
            offset: Guest offset of the data.
            data: What to write.
            unit: Bytes of a cluster or subcluster.
            old_at: What a unit, by a guest offset in it, reads as at present: True data,
                False zeroes, None data that are at this host offset already.
            is_fresh: Zeroes need not be written.
        """
        skip = offset % unit
        if skip:
            length = min(len(data), unit - skip)
            await self._fill_unit(host, offset, data[:length], unit, old_at(offset), is_fresh)
            host, offset, data = host + unit, offset + length, data[length:]
        whole = len(data) // unit * unit
        if whole:
            await self._space.write(host, data[:whole])
        if whole < len(data):
            host, offset = host + whole, offset + whole
            await self._fill_unit(host, offset, data[whole:], unit, old_at(offset), is_fresh)

    async def _fill_unit(
        self,
        host: int,
        offset: int,
        data: memoryview,
        unit: int,
        old: bool | None,
        is_fresh: bool,
    ) -> None:
        """Write data and the rest of their one unit, in one piece.

        In pieces, a sector of the file could have a part of the old content, which may
        still be what is durable, and a part of the new.
        """
        skip = offset % unit
        if old is None or (is_fresh and not old):
            await self._space.write(host + skip, data)
            return
        content = memoryview(bytearray(unit))
        if old:
            await self._read_old(offset - skip, content[:skip])
            await self._read_old(offset + len(data), content[skip + len(data) :])
        content[skip : skip + len(data)] = data
        await self._space.write(host, content)

    async def _read_old(self, offset: int, view: memoryview) -> None:
        """What the guest reads at present; zeroes stay where the disk has ended."""
        readable = min(len(view), self._image.size - offset)
        if readable > 0:
            await self._image.read_into(offset, view[:readable])

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        """Make a range read as zeroes; whole clusters by their entries alone."""
        await self._image.epochs.relieve()
        end = offset + length
        async with self._image.ranges.hold(*self._aligned(offset, end)):
            self._image.check_writable()
            first, last = self._whole_clusters(offset, end)
            if fast and not await self._is_fast(offset, end, first, last):
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), self._image.path)
            if first >= last:
                await self._write_zero_data(offset, end)
                return
            await self._write_zero_data(offset, first)
            if self._can_forget:
                await self._space.zero(first, last - first, unmap=unmap)
                await self._change_clusters(first, last, self._forget if unmap else self._keep)
            else:
                await self._write_zero_data(first, min(last, end))
            await self._write_zero_data(last, end)

    async def trim(self, offset: int, length: int) -> None:
        """Give up the whole clusters in a range; its edges stay as they are."""
        await self._image.epochs.relieve()
        first, last = self._whole_clusters(offset, offset + length)
        if first >= last or not self._can_forget:
            return
        async with self._image.ranges.hold(first, last):
            self._image.check_writable()
            await self._space.zero(first, last - first, unmap=True)
            await self._change_clusters(first, last, self._forget)

    async def unmap(self, offset: int, end: int) -> None:
        """Let whole clusters past the disk's end lead nowhere."""
        async with self._image.ranges.hold(offset, end):
            await self._change_clusters(offset, end, self._unmap)

    @property
    def _can_forget(self) -> bool:
        """Whether an entry alone can make a cluster read as zeroes.

        Version 2 has no zero flag: what is unallocated shows the backing file.
        """
        return self._has_zero_flag or self._image.backing is None

    async def _is_fast(self, offset: int, end: int, first: int, last: int) -> bool:
        """Whether zeroing a range with these whole clusters inside needs no writing of data."""
        if first < last and not self._can_forget:
            return False
        for low, high in ((offset, min(first, end)), (max(last, offset), end)):
            if low < high and not await self._is_zero(low):
                return False
        return True

    async def _is_zero(self, offset: int) -> bool:
        """Whether the cluster of a guest offset reads as zeroes by its entry."""
        l1_index, index = divmod(offset >> self._cluster_bits, self._l2_entries)
        table = await self._mapping.table(l1_index)
        return self._reads_as_zeroes(
            Kind.UNALLOCATED if table is None else kind_of(table.entries[index])
        )

    async def _write_zero_data(self, offset: int, end: int) -> None:
        """Write zeroes as data, cluster by cluster, where the range is not zero already.

        Whole subclusters get their zero bits instead.
        """
        while offset < end:
            stop = min(end, (offset | self._cluster_size - 1) + 1)
            if not await self._is_zero(offset):
                mask = self._subcluster_size - 1
                first, last = offset + mask & ~mask, stop & ~mask
                if self._subcluster_size and first < last:
                    await self._zero_subclusters(offset, first, last, stop)
                else:
                    await self._write(offset, memoryview(bytes(stop - offset)))
            offset = stop

    async def _zero_subclusters(self, offset: int, first: int, last: int, end: int) -> None:
        """Zero ``[offset, end)`` inside a cluster, whole subclusters from ``first`` to ``last``."""
        for low, high in ((offset, first), (last, end)):
            if low < high:
                await self._write(low, memoryview(bytes(high - low)))
        await self._space.zero(first, last - first, unmap=False)
        await self._for_each_part(first, last, partial(self._set_zero_bits, first, last))

    async def _set_zero_bits(self, offset: int, end: int, part: _Part) -> None:
        """Let subclusters read as zeroes, by their bits if the cluster's entry can have such."""
        index, entry = part.first, part.table.entries[part.first]
        kind = kind_of(entry)
        if not (_may_be_partial(Run(kind, 1, entry)) or (kind is Kind.NORMAL and entry & COPIED)):
            await self._write(offset, memoryview(bytes(end - offset)))
            return
        within = offset & self._cluster_size - 1
        first = within // self._subcluster_size
        touched = (1 << first + (end - offset) // self._subcluster_size) - (1 << first)
        bitmap = bitmap_of(entry, part.table.bitmap(index)) & ~touched
        bitmap |= touched << SUBCLUSTERS_PER_CLUSTER
        part.table.set_bitmap(index, bitmap)
        host_and_copied = entry & (OFFSET_MASK | COPIED)
        self._set(part, index, 1, entry_with_bitmap(host_and_copied, bitmap), 0)

    async def _change_clusters(self, first: int, last: int, change: _Change) -> None:
        """Apply a change to every run of the whole clusters in ``[first, last)``."""
        await self._for_each_part(
            first, last, partial(self._change_part, change), skip_empty=change == self._forget
        )

    async def _change_part(self, change: _Change, part: _Part) -> None:
        index = part.first
        for run in find_runs(part.table, part.first, part.end, self._cluster_size):
            if run.kind is Kind.INVALID:
                raise OSError(errno.EIO, "damaged L2 entry", self._image.path)
            await change(part, index, run)
            index += run.clusters

    async def _forget(self, part: _Part, index: int, run: Run) -> None:
        """Make a run read as zeroes and give its host clusters up."""
        if run.kind is Kind.ZERO_PLAIN:
            return
        if run.kind is Kind.UNALLOCATED and self._image.backing is None:
            return
        entry = ZERO if self._has_zero_flag else 0
        self._space.free(run.entry, run.clusters, punch=True)
        self._set(part, index, run.clusters, entry, 0)

    async def _unmap(self, part: _Part, index: int, run: Run) -> None:
        """Give a run's host clusters up, and let it show the backing file."""
        if run.kind is not Kind.UNALLOCATED:
            self._space.free(run.entry, run.clusters, punch=True)
            self._set(part, index, run.clusters, 0, 0)

    async def _keep(self, part: _Part, index: int, run: Run) -> None:
        """Make a run read as zeroes and keep, or take, host clusters for it."""
        if not self._has_zero_flag:
            await self._write(
                self._offset_of(part, index),
                memoryview(bytes(run.clusters << self._cluster_bits)),
            )
        elif run.kind is Kind.ZERO_ALLOC and run.entry & COPIED:
            return
        elif run.kind in (Kind.NORMAL, Kind.SUBCLUSTERS) and run.entry & COPIED:
            entry = run.entry & ~SUBCLUSTERS | ZERO
            self._set(part, index, run.clusters, entry, self._cluster_size)
        else:
            await self._provision(part, index, run.clusters)

    async def _provision(self, part: _Part, index: int, count: int) -> None:
        """Give a run new host clusters that read as zeroes."""
        while count:
            new = await self._space.take(self._offset_of(part, index), count)
            try:
                await self._space.provision(new)
            except BaseException:
                await self._space.give_back(new)
                raise
            self._replace(part, index, new.clusters, new.offset | COPIED | ZERO)
            index += new.clusters
            count -= new.clusters

    def _replace(self, part: _Part, index: int, count: int, entry: int) -> None:
        """Let entries lead to new host clusters, and free what they led to."""
        for run in find_runs(part.table, index, index + count, self._cluster_size):
            self._space.free(run.entry, run.clusters, punch=False)
        self._set(part, index, count, entry, self._cluster_size)

    def _set(self, part: _Part, index: int, count: int, entry: int, step: int) -> None:
        part.table.set_run(index, count, entry, step)
        self._mapping.touch(part.l1_index, part.table, index, index + count)

    def _reads_as_zeroes(self, kind: Kind) -> bool:
        if kind is Kind.UNALLOCATED:
            return self._image.backing is None
        return kind in (Kind.ZERO_PLAIN, Kind.ZERO_ALLOC)

    async def _for_each_part(
        self,
        offset: int,
        end: int,
        action: Callable[[_Part], Awaitable[None]],
        *,
        skip_empty: bool = False,
    ) -> None:
        """Do something with each L2 table of a range, writable and pinned meanwhile.

        Args:
            offset: Guest offset where the range begins.
            end: Guest offset where it ends.
            action: What to do.
            skip_empty: Leave out what has no table and reads as zeroes without one.
        """
        cluster = offset >> self._cluster_bits
        cluster_end = (end - 1 >> self._cluster_bits) + 1
        while cluster < cluster_end:
            l1_index, first = divmod(cluster, self._l2_entries)
            stop = min(cluster_end - cluster + first, self._l2_entries)
            if not (skip_empty and self._is_empty(l1_index)):
                table = await self._writable_table(l1_index)
                table.pins += 1
                try:
                    await action(_Part(l1_index, table, first, stop))
                finally:
                    table.pins -= 1
            cluster += stop - first
            if cluster < cluster_end:
                await asyncio.sleep(0)  # the range may have many tables: others have turns

    def _is_empty(self, l1_index: int) -> bool:
        """Whether a part of the disk has no table and reads as zeroes."""
        return not self._mapping.has_table(l1_index) and self._image.backing is None

    async def _writable_table(self, l1_index: int) -> L2Table:
        """The L2 table, made or copied if there is none of our own."""
        while True:
            table = await self._mapping.table(l1_index)
            if table is not None and not self._mapping.is_shared(l1_index):
                self._image.check_writable()  # loading it may have shown damage
                return table
            await self._making.run(l1_index, partial(self._make_table, l1_index, table))

    async def _make_table(self, l1_index: int, shared: L2Table | None) -> None:
        """Give an L1 entry a new L2 table: empty, or a copy of a shared one."""
        offset = await self._refcounts.allocate(1)
        if shared is None:
            table = empty_table(offset, self._image.layout)
        else:
            table = copied_table(shared, offset)
            self._image.metadata.remove(shared.host_offset, 1)
            self._quarantine.add(shared.host_offset, self._cluster_size)
        self._image.metadata.add(offset, 1)
        self._mapping.link(l1_index, table)

    def _aligned(self, offset: int, end: int) -> tuple[int, int]:
        """The range widened to whole clusters."""
        mask = self._cluster_size - 1
        return offset & ~mask, (end + mask) & ~mask

    def _whole_clusters(self, offset: int, end: int) -> tuple[int, int]:
        """The whole clusters inside a range; the disk's last cluster ends with the disk."""
        mask = self._cluster_size - 1
        last = (end + mask) & ~mask if end == self._image.size else end & ~mask
        return (offset + mask) & ~mask, last

    def _index(self, offset: int) -> int:
        """The index of a guest offset in its L2 table."""
        return (offset >> self._cluster_bits) % self._l2_entries

    def _offset_of(self, part: _Part, index: int) -> int:
        """The guest offset of the cluster at an index of a part's table."""
        return (part.l1_index * self._l2_entries + index) << self._cluster_bits


def _may_be_partial(run: Run) -> bool:
    """Whether single subclusters of a run can be written, the others staying as they are."""
    if run.kind is Kind.SUBCLUSTERS:
        return bool(run.entry & COPIED) or not run.entry & OFFSET_MASK
    return run.kind in (Kind.UNALLOCATED, Kind.ZERO_PLAIN)
