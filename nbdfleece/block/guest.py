"""The node that the guest writes through: bitmaps first, then copies, then the disk."""

from __future__ import annotations

import asyncio
from typing import Protocol

from ..bitmaps.bitmap import Bitmap
from ..extents import Extents
from .copy_before_write import CopyBeforeWrite
from .node import BlockNode


class ActivityLog(Protocol):
    """What makes recording bitmaps survive a crash: see :mod:`nbdfleece.qcow2.activity_log`."""

    def covers(self, offset: int, length: int) -> bool:
        """Whether the range is marked, durably."""

    async def mark(self, offset: int, length: int) -> None:
        """Mark the range, durably, or raise OSError."""


class GuestNode(BlockNode):
    """The top of a disk's nodes.

    Every write, write of zeroes and discard marks the recording bitmaps and their logs,
    then lets copy-before-write keep the old data, and only then reaches the disk (rules 1
    and 2).

    Guest writes that are suspended are counted, so that a snapshot can be taken between
    them: :meth:`drain` holds new ones back until :meth:`resume`, and returns when none is
    in flight. What a write marks, displaces and changes thus lies wholly before or wholly
    after the instant (rule 3).

    Args:
        image: The disk.
        copies: Its copy-before-write.
    """

    def __init__(self, image: BlockNode, copies: CopyBeforeWrite) -> None:
        self._image = image
        self._copies = copies
        self._gate = WriteGate()
        self.recording: tuple[Bitmap, ...] = ()
        """The bitmaps that guest writes mark; replaced whole, never changed in place."""
        self.logs: tuple[ActivityLog, ...] = ()
        """What must durably cover a guest write before it is issued; likewise."""
        self.size = image.size
        self.read_only = image.read_only
        self.preferred_block_size = image.preferred_block_size

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Read the disk."""
        await self._image.read_into(offset, view)

    def read_at_once(self, offset: int, view: memoryview) -> bool:
        """Read the disk."""
        return self._image.read_at_once(offset, view)

    async def block_status(
        self, offset: int, length: int, *, extents_max: int = 1 << 20
    ) -> Extents:
        """Describe the disk."""
        return await self._image.block_status(offset, length, extents_max=extents_max)

    async def write(self, offset: int, data: memoryview) -> None:
        """Write as the guest."""
        if self._gate.is_closed:
            await self._gate.opened()
        with self._gate:
            await self._announce(offset, len(data))
            await self._image.write(offset, data)

    def write_at_once(self, offset: int, data: memoryview) -> bool:
        """Write as the guest, unless the gate is closed, or a log or a snapshot must be waited for.

        What was copied and marked does no harm if the disk itself cannot be written at once.
        """
        if self._gate.is_closed:
            return False
        length = len(data)
        for log in self.logs:
            if not log.covers(offset, length):
                return False
        copies = self._copies
        if copies.has_layers and not copies.protect_at_once(offset, length):
            return False
        for bitmap in self.recording:
            bitmap.set_range(offset, length)
        return self._image.write_at_once(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False
    ) -> None:
        """Write zeroes as the guest."""
        if self._gate.is_closed:
            await self._gate.opened()
        with self._gate:
            await self._announce(offset, length)
            await self._image.write_zeroes(offset, length, unmap=unmap, fast=fast)

    async def trim(self, offset: int, length: int) -> None:
        """Discard as the guest."""
        if self._gate.is_closed:
            await self._gate.opened()
        with self._gate:
            await self._announce(offset, length)
            await self._image.trim(offset, length)

    async def flush(self) -> None:
        """Make the guest's writes durable."""
        await self._image.flush()

    async def cache(self, offset: int, length: int) -> None:
        """Hint that the range will be read soon."""
        await self._image.cache(offset, length)

    async def close(self) -> None:
        """Close the disk."""
        await self._image.close()

    async def drain(self) -> None:
        """Hold new guest writes back and wait for those in flight; undone by :meth:`resume`."""
        await self._gate.drain()

    def resume(self) -> None:
        """Let guest writes go on."""
        self._gate.resume()

    async def _announce(self, offset: int, length: int) -> None:
        """What must have happened before the disk changes."""
        for bitmap in self.recording:
            bitmap.set_range(offset, length)
        for log in self.logs:
            if not log.covers(offset, length):
                await log.mark(offset, length)
        copies = self._copies
        if copies.has_layers and not copies.protect_at_once(offset, length):
            await copies.protect(offset, length)


class WriteGate:
    """Counts the writes in flight, and holds new ones back while it is closed.

    A write enters by ``with gate:`` once the gate is open.
    """

    __slots__ = ("_drained", "_in_flight", "_open", "is_closed")

    def __init__(self) -> None:
        self._in_flight = 0
        self._open = asyncio.Event()
        self._drained = asyncio.Event()
        self.is_closed = False

    def __enter__(self) -> None:
        self._in_flight += 1

    def __exit__(self, *exc_info: object) -> None:
        self._in_flight -= 1
        if self.is_closed and not self._in_flight:
            self._drained.set()

    async def opened(self) -> None:
        """Wait until the gate is open."""
        while self.is_closed:
            await self._open.wait()

    async def drain(self) -> None:
        """Close the gate and wait until no write is in flight."""
        assert not self.is_closed, "drained twice"
        self.is_closed = True
        self._open.clear()
        self._drained.clear()
        if self._in_flight:
            await self._drained.wait()

    def resume(self) -> None:
        """Open the gate."""
        self.is_closed = False
        self._open.set()
