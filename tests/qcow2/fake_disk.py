"""A disk in memory that records what reaches it, and what a power cut may leave of it."""

from __future__ import annotations

import asyncio
import errno
import random
from dataclasses import dataclass, field

from nbdfleece.block.file import FileNode
from nbdfleece.block.node import BlockStatus, block_status_word
from nbdfleece.extents import Extents

SECTOR = 512


@dataclass
class Record:
    """One operation: bytes written at an offset, or a size if ``data`` is None."""

    offset: int
    data: bytes | None


@dataclass
class Flush:
    """A flush: it covers the records before ``begin``, and has ended after ``end`` of them."""

    begin: int
    end: int


@dataclass
class CrashState:
    """The file's bytes as a power cut leaves them."""

    content: bytes
    records_seen: int
    """The power was cut after so many records."""


@dataclass
class Disk:
    """What survives: the content at the start and everything since."""

    start: bytes
    records: list[Record] = field(default_factory=list)
    flushes: list[Flush] = field(default_factory=list)

    def crash(self, point: int, rng: random.Random | None) -> CrashState:
        """Cut the power after ``point`` records.

        What the last flush covers is there; of the rest each sector of each record is there
        or not, as ``rng`` has it. Without ``rng`` all of it is there (a prefix).
        """
        durable = max((flush.begin for flush in self.flushes if flush.end <= point), default=0)
        content = bytearray(self.start)
        for index, record in enumerate(self.records[:point]):
            is_durable = index < durable or rng is None
            if record.data is None:
                if is_durable or rng.random() < 0.5:
                    content.extend(bytes(max(0, record.offset - len(content))))
            else:
                _apply(content, record.offset, record.data, None if is_durable else rng)
        return CrashState(bytes(content), point)


def _apply(content: bytearray, offset: int, data: bytes, rng: random.Random | None) -> None:
    """Write ``data``, or some of its sectors."""
    position = 0
    keep = 1.0 if rng is None else rng.choice([0.1, 0.5, 0.9])
    while position < len(data):
        stop = min(len(data), ((offset + position) // SECTOR + 1) * SECTOR - offset)
        if rng is None or rng.random() < keep:
            end = offset + stop
            content.extend(bytes(max(0, end - len(content))))
            content[offset + position : end] = data[position:stop]
        position = stop


@dataclass(frozen=True)
class Fault:
    """How one operation fails."""

    error: int
    is_short: bool = False
    """A write gets its first sectors done before it fails."""


class FakeDisk(FileNode):
    """Stands in for a file under an image.

    Args:
        content: What is on it.
        rng: If given, operations suspend now and then, as it has it.
    """

    def __init__(
        self, content: bytes, *, read_only: bool = False, rng: random.Random | None = None
    ) -> None:
        self.path = "fake.qcow2"
        self.read_only = read_only
        self.identity = (0, id(self))
        self.content = bytearray(content)
        self.size = len(content)
        self.log = Disk(bytes(content))
        self.closed = False
        self.fail_after: int | None = None
        """So many operations succeed, then all fail."""
        self.failure = errno.EIO
        self.operations = 0
        """Reads, writes and all others so far."""
        self.faults: dict[int, Fault] = {}
        """Those that fail, by their number; each is taken out when it has."""
        self.met: list[OSError] = []
        """The errors that were raised for them."""
        self.gate: asyncio.Event | None = None
        """If there is one, reads that begin now wait for it, as cold ones do for a disk."""
        self._rng = rng

    @property
    def is_closed(self) -> bool:
        return self.closed

    def _count(self) -> None:
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                raise OSError(self.failure, "the disk fails")

    def _meet_fault(self, offset: int = 0, data: memoryview | None = None) -> None:
        """Count an operation, and fail if it is to fail; a short write does its first part."""
        self.operations += 1
        fault = self.faults.pop(self.operations - 1, None)
        if fault is None:
            return
        if fault.is_short and data is not None:
            done = (offset + len(data) // 2) // SECTOR * SECTOR - offset
            if done > 0:
                size = self.size
                self._put(offset, data[:done])
                self.size = size  # what failed has not told us how far it came
        self.met.append(OSError(fault.error, "the disk fails once"))
        raise self.met[-1]

    async def _pause(self) -> None:
        if self._rng is not None:
            for _ in range(self._rng.choice([0, 0, 0, 1, 3])):
                await asyncio.sleep(0)

    async def read_into(self, offset: int, view: memoryview) -> None:
        if self.gate is not None:
            await self.gate.wait()
        await self._pause()
        self._meet_fault()
        part = self.content[offset : offset + len(view)]
        view[:] = part.ljust(len(view), b"\0")

    def read_at_once(self, offset: int, view: memoryview) -> bool:
        return False  # reads may suspend here

    async def write(self, offset: int, data: memoryview) -> None:
        self.write_at_once(offset, data)

    def write_at_once(self, offset: int, data: memoryview) -> bool:
        self._count()
        self._meet_fault(offset, data)
        self._put(offset, data)
        return True

    def _put(self, offset: int, data: memoryview) -> None:
        end = offset + len(data)
        self.content.extend(bytes(max(0, end - len(self.content))))
        self.content[offset:end] = data
        self.size = len(self.content)
        # The page cache writes whole sectors: what was in them before goes along.
        first = offset // SECTOR * SECTOR
        last = -(-end // SECTOR) * SECTOR
        self.log.records.append(Record(first, bytes(self.content[first:last])))

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        await self._pause()
        await self.write(offset, memoryview(bytes(length)))

    async def trim(self, offset: int, length: int) -> None:
        await self._pause()
        self._count()
        self._meet_fault()
        end = min(offset + length, len(self.content))
        if end > offset:
            # A hole is made at once or not at all, but what was there is gone either way.
            self._put(offset, memoryview(bytes(end - offset)))

    async def grow(self, size: int) -> None:
        self._count()
        self._meet_fault()
        self.content.extend(bytes(max(0, size - len(self.content))))
        self.size = len(self.content)
        self.log.records.append(Record(size, None))

    async def flush(self) -> None:
        begin = len(self.log.records)
        await self._pause()
        self._count()
        self._meet_fault()
        self.log.flushes.append(Flush(begin, len(self.log.records)))

    def allocated_bytes(self) -> int:
        return len(self.content)

    async def block_status(
        self, offset: int, length: int, *, extents_max: int = 1 << 20
    ) -> Extents:
        return Extents.single(length, block_status_word(BlockStatus.DATA, 1))

    async def close(self) -> None:
        if not self.closed and not self.read_only:
            await self.flush()
        self.closed = True
