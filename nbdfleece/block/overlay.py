"""A writable overlay: what is written to it stays beside its base, to be committed or thrown away.

Granules that were written are in a scratch file of the overlay's own, or known to be zero;
all others are read from the base. The overlay is as temporary as its scratch: nothing of it
survives the process, and a flush makes nothing durable. Only :meth:`Overlay.commit` does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

import numpy as np

from ..extents import Extents
from .granule_codes import (
    COPIED,
    UNALLOCATED,
    UNTOUCHED,
    continues,
    runs,
    status_of_codes,
)
from .granule_map import GranuleMap, page_end
from .granule_reads import read_granules
from .node import BlockNode
from .range_lock import RangeLock
from .scratch import Scratch

COMMIT_BYTES_MAX: Final = 1 << 20
"""Bytes committed at once: a bound on memory."""

_GRANULARITY: Final = 4096
"""Bytes of a granule, a power of two."""


class Overlay(BlockNode):
    """A block node over another one, which it never writes to until it is committed.

    Args:
        base: What shows through where nothing was written. It should hold still.
        scratch_directory: Where what is written goes.
        quota: Bytes of scratch at most; None for no limit of our own. A write beyond it fails.
    """

    read_only = False

    def __init__(
        self,
        base: BlockNode,
        scratch_directory: str | os.PathLike[str],
        *,
        quota: int | None = None,
    ) -> None:
        self._base = base
        self._shift = _GRANULARITY.bit_length() - 1
        self._scratch = Scratch(scratch_directory, _GRANULARITY, quota)
        self._map = GranuleMap()
        self._writing = RangeLock()
        self.size = base.size
        self.preferred_block_size = base.preferred_block_size

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Read what was written, and the base elsewhere."""
        first, end = self._granules(offset, len(view))
        codes = self._map.code_list(first, end)
        await read_granules(self._base, self._scratch, codes, self._shift, offset, view)

    async def block_status(
        self, offset: int, length: int, *, extents_max: int = 1 << 20
    ) -> Extents:
        """Describe the overlay; where it was not written, as the base does."""
        first, end = self._granules(offset, length)
        parts, found = [], 0
        for start, stop in self._touched_or_not(first, end):
            begin = max(offset, start << self._shift)
            stop_offset = min(offset + length, stop << self._shift)
            if self._map.code(start):
                codes = self._map.codes(start, stop)
                bounds = np.arange(start, stop + 1, dtype=np.int64) << self._shift
                lengths = np.diff(np.clip(bounds, begin, stop_offset))
                part = Extents(lengths, status_of_codes(codes)).merged()
            else:
                part = await self._base.block_status(
                    begin, stop_offset - begin, extents_max=extents_max
                )
            parts.append(part)
            found += len(part.lengths)
            if found > extents_max or part.total() < stop_offset - begin:
                break
        return Extents.concatenate(parts).limited(extents_max)

    async def write(self, offset: int, data: memoryview) -> None:
        """Write into the scratch."""
        first, end = self._granules(offset, len(data))
        async with self._writing.hold(first, end):
            while len(data):
                granule = offset >> self._shift
                whole = len(data) >> self._shift
                if whole and offset == granule << self._shift:
                    length = await self._write_whole(granule, data[: whole << self._shift])
                else:
                    length = min(len(data), (granule + 1 << self._shift) - offset)
                    await self._write_granule(granule, offset, data[:length])
                offset += length
                data = data[length:]

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        """Remember whole granules as zero, and write zeroes into the parts of others."""
        first, end = self._granules(offset, length)
        async with self._writing.hold(first, end):
            for granule in range(first, end):
                begin = max(offset, granule << self._shift)
                stop = min(offset + length, granule + 1 << self._shift)
                if stop - begin == self._length_of(granule):
                    self._forget(granule)
                else:
                    await self._write_granule(granule, begin, memoryview(bytes(stop - begin)))

    async def trim(self, offset: int, length: int) -> None:
        """Let the whole granules inside the range read as zeroes."""
        begin = -(-offset >> self._shift) << self._shift
        end = offset + length
        if end < self.size:
            end = end >> self._shift << self._shift
        if begin < end:
            await self.write_zeroes(begin, end - begin)

    async def commit(self, target: BlockNode) -> None:
        """Write to another node what was written here, and make it durable there.

        Raises:
            OSError: The target holds a part of it; committing again is safe.
        """
        for first, stop in self._touched():
            begin = first << self._shift
            length = min(stop << self._shift, self.size) - begin
            if self._map.code(first) == UNALLOCATED:
                await target.write_zeroes(begin, length)
                continue
            for offset in range(begin, begin + length, COMMIT_BYTES_MAX):
                part = memoryview(bytearray(min(COMMIT_BYTES_MAX, begin + length - offset)))
                await self.read_into(offset, part)
                await target.write(offset, part)
        await target.flush()

    async def close(self) -> None:
        """Throw away what was written."""
        await self._scratch.close()

    def _granules(self, offset: int, length: int) -> tuple[int, int]:
        """The granules ``[first, end)`` that a range touches."""
        return offset >> self._shift, (offset + length - 1 >> self._shift) + 1

    def _length_of(self, granule: int) -> int:
        """Bytes of a granule; the last one ends with the disk."""
        return min(1 << self._shift, self.size - (granule << self._shift))

    async def _write_whole(self, first: int, data: memoryview) -> int:
        """Write whole granules, as many as lie together in the scratch or have no place yet.

        Returns:
            How many bytes were written.
        """
        codes = self._map.codes(first, first + (len(data) >> self._shift))
        if codes[0] >= COPIED:
            count = next(runs(continues(codes)))[1]
            data = data[: count << self._shift]
            await self._scratch.write_part(int(codes[0]) - COPIED, 0, data)
            return len(data)
        is_new = codes < COPIED
        count = next(runs(is_new[1:] == is_new[:-1]))[1]
        data = data[: count << self._shift]
        place = self._scratch.allocate(count)
        try:
            await self._scratch.write(place, data)
        except BaseException:
            self._scratch.free(place, count)
            raise
        self._map.set(first, np.arange(place, place + count, dtype=np.uint32) + COPIED)
        return len(data)

    async def _write_granule(self, granule: int, offset: int, data: memoryview) -> None:
        """Write a part of one granule, which gets its place in the scratch if it has none."""
        code = self._map.code(granule)
        if code >= COPIED:
            await self._scratch.write_part(code - COPIED, offset - (granule << self._shift), data)
            return
        buffer = memoryview(bytearray(1 << self._shift))
        if code == UNTOUCHED and len(data) < self._length_of(granule):
            begin = granule << self._shift
            await self._base.read_into(begin, buffer[: self._length_of(granule)])
        within = offset - (granule << self._shift)
        buffer[within : within + len(data)] = data
        place = self._scratch.allocate(1)
        try:
            await self._scratch.write(place, buffer)
        except BaseException:
            self._scratch.free(place, 1)
            raise
        self._map.set_one(granule, COPIED + place)

    def _forget(self, granule: int) -> None:
        """Let a granule read as zeroes."""
        code = self._map.code(granule)
        self._map.set_one(granule, UNALLOCATED)
        if code >= COPIED:
            self._scratch.free(code - COPIED, 1)

    def _touched_or_not(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Runs of granules that are all written or all not, ``(start, stop)``."""
        while first < end:
            stop = self._map.next_page(first, end)
            if stop == first:
                stop = min(end, page_end(first))
                is_touched = self._map.codes(first, stop) != UNTOUCHED
                stop = first + next(runs(is_touched[1:] == is_touched[:-1]))[1]
            yield first, stop
            first = stop

    def _touched(self) -> Iterator[tuple[int, int]]:
        """Runs of written granules, each of zeroes only or of data only."""
        if not self.size:
            return
        for first, stop in self._touched_or_not(0, self._granules(0, self.size)[1]):
            if self._map.code(first):
                is_zero = self._map.codes(first, stop) == UNALLOCATED
                for start, end in runs(is_zero[1:] == is_zero[:-1]):
                    yield first + start, first + end
