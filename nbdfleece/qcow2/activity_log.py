"""Keeps the stored bits of a recording bitmap a superset of what has changed, through crashes.

QEMU stores a bitmap when it closes the image, and loses it with the process. Here the
stored bits of a recording bitmap are kept usable while it records: before the first
write into a *region* of the disk, all of the region's bits are set in the image, and
made durable. What a crash leaves is then the bits as they were stored last with every
region since written marked whole: too much, never too little (rule 2).

A mark costs one durable write, so regions are large; a guest that writes on through the
disk gets several regions ahead marked at once. Marking only ever sets bits, so a torn
mark harms nothing, and writes that mark at the same time share one flush.

The log may be believed only if nobody else wrote the image in between; the private
autoclear bit tells (:mod:`.private_extension`).
"""

from __future__ import annotations

from typing import Final

import numpy as np

from ..block.file import FileNode
from .bitmap_directory import Table

REGION_BYTES: Final = 64 << 20
"""Bytes of disk that are marked at once, at least. A crash makes the next backup read up to so
much for each region written in; a disk of 1 TiB has 16384, so that a guest which writes
everywhere waits for so many marks in its life."""

AHEAD_MAX: Final = 16
"""Regions marked at once when the guest writes through the disk in order: 1 GiB."""


class ActivityLog:
    """The stored bits of one bitmap, all of whose clusters are allocated.

    Args:
        file: The image's file.
        table: The bitmap's table, shape (table_entries,): host offsets of its clusters.
        cluster_size: Bytes of a cluster of the image.
        disk_size: Bytes of the disk.
        granularity: Bytes of the disk per bit.
    """

    def __init__(
        self, file: FileNode, table: Table, cluster_size: int, disk_size: int, granularity: int
    ) -> None:
        self._file = file
        self._cluster_size = cluster_size
        self._disk_size = disk_size
        self._granularity = granularity
        region = max(REGION_BYTES, 8 * granularity)
        self._shift = region.bit_length() - 1
        self._marked = bytearray(-(-disk_size >> self._shift))
        self._ahead = 1
        self._expected = -1
        self.table = table

    def covers(self, offset: int, length: int) -> bool:
        """Whether the range is marked, durably."""
        marked = self._marked
        first = offset >> self._shift
        last = offset + length - 1 >> self._shift
        if first == last:
            return bool(marked[first])
        return 0 not in marked[first : last + 1]

    async def mark(self, offset: int, length: int) -> None:
        """Mark the regions that a range touches; returns when that is durable.

        Raises:
            OSError: It may not be: the range must not be written.
        """
        first = offset >> self._shift
        end = (offset + length - 1 >> self._shift) + 1
        self._ahead = min(2 * self._ahead, AHEAD_MAX) if first == self._expected else 1
        end = min(end + self._ahead - 1, len(self._marked))
        missing = [region for region in range(first, end) if not self._marked[region]]
        for region in missing:
            await self._write(region)
        await self._file.flush()
        for region in missing:
            self._marked[region] = 1
        self._expected = end

    async def _write(self, region: int) -> None:
        """Set the stored bits of one region."""
        begin = region << self._shift
        length = min(1 << self._shift, self._disk_size - begin)
        bits = np.packbits(
            np.ones(-(-length // self._granularity), dtype=np.uint8), bitorder="little"
        ).tobytes()
        position = begin // self._granularity // 8
        while bits:
            entry, within = divmod(position, self._cluster_size)
            part = bits[: self._cluster_size - within]
            await self._file.write(int(self.table[entry]) + within, memoryview(part))
            bits = bits[len(part) :]
            position += len(part)
