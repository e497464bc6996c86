"""Moving one disk's blocks from a source to where they go: deep queues within bounded memory.

Every block is a task that reads (in several commands at once, over all connections), looks
for zeroes, hashes and compresses (in a thread, which leaves Python's lock alone), and writes.
How many tasks there are at one time is bounded by the bytes that they hold. Bytes go from the
socket into the block's buffer and from it into the image; they are not copied in between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

from .blocks import DATA, Block, Digest, Piece, digest
from .compress import ImageWriter, Part
from .journal import DoneBlock
from .libnbd import load_libnbd
from .manifest import BLOCK_BYTES
from .rate import RateLimit
from .source import Source
from .tasks import Crew, gather

IN_FLIGHT_BYTES_MAX: Final = 64 << 20
"""Held by all blocks under way: enough to keep a fast server and a fast disk busy."""

BLOCK_COST_MIN: Final = 128 << 10
"""What a block costs of that at least, so that small ones are at most 512 at a time."""

_PREPARE_INLINE_BYTES_MAX: Final = 64 << 10
"""Hashed, and at worst compressed, in the loop's thread: 0.1 ms, or 2 ms."""


class Progress(NamedTuple):
    """How far a disk is; ``done`` and ``total`` are bytes of its data and zeroes to be moved."""

    disk: str
    done: int
    total: int


ReportProgress = Callable[[Progress], None]


class Buffers:
    """Buffers of a block's size that are used again; smaller ones are made as needed."""

    def __init__(self) -> None:
        self._free: list[bytearray] = []

    def take(self, length: int) -> bytearray:
        """A buffer of at least ``length`` bytes with anything in it."""
        if length <= BLOCK_BYTES // 4:
            return bytearray(length)
        return self._free.pop() if self._free else bytearray(BLOCK_BYTES)

    def give_back(self, buffer: bytearray) -> None:
        """Return a buffer that nothing uses any more."""
        if len(buffer) == BLOCK_BYTES:
            self._free.append(buffer)


class Sink(Protocol):
    """Where blocks go."""

    def prepare(
        self, block: DoneBlock, found: Digest, content: memoryview
    ) -> Callable[[], Awaitable[None]]:
        """Get a block ready; may run in a thread, and may keep ``content`` until it is written.

        Returns:
            What writes it, in the loop's thread; it raises OSError if that fails.
        """


class ImageSink:
    """Blocks go into an image.

    Args:
        writer: What writes to it.
    """

    def __init__(self, writer: ImageWriter) -> None:
        self._writer = writer

    def prepare(
        self, block: DoneBlock, found: Digest, content: memoryview
    ) -> Callable[[], Awaitable[None]]:
        """Compress what can be."""
        return self._writer.prepare(cut_parts(found.pieces, content))


def cut_parts(pieces: Iterable[Piece], content: memoryview) -> list[Part]:
    """Pieces of a block with their bytes."""
    return [
        Part(offset, length, status, content[position : position + length])
        if status == DATA
        else Part(offset, length, status, None)
        for offset, length, status, position in pieces
    ]


class Transfer:
    """Pulls the blocks of one disk.

    Args:
        source: Where from.
        sink: Where to.
        disk: The disk's number in the journal.
        limit: On what is read.
        on_done: Called with every block that is written, but not yet durable.
    """

    def __init__(
        self,
        source: Source,
        sink: Sink,
        disk: int,
        limit: RateLimit,
        on_done: Callable[[DoneBlock], None],
    ) -> None:
        self._source = source
        self._sink = sink
        self._disk = disk
        self._limit = limit
        self._on_done = on_done
        self._buffers = Buffers()
        self._nbd = load_libnbd()

    async def run(self, blocks: Iterator[Block]) -> None:
        """Pull all blocks.

        Raises:
            ServerError: Reading failed.
            OSError: Writing failed.
        """
        async with Crew(IN_FLIGHT_BYTES_MAX, BLOCK_COST_MIN) as crew:
            for block in blocks:
                await self._limit.take(block.data_bytes)
                await crew.start(block.data_bytes, partial(self._move, block))

    async def _move(self, block: Block) -> None:
        buffer = self._buffers.take(block.data_bytes)
        try:
            await self._move_through(block, memoryview(buffer)[: block.data_bytes])
        finally:
            self._buffers.give_back(buffer)

    async def _move_through(self, block: Block, content: memoryview) -> None:
        await read_block(self._source, block, content)
        nbd_buffer = self._nbd.Buffer.from_buffer(content)
        if len(content) <= _PREPARE_INLINE_BYTES_MAX:
            done, write = self._prepare(block, content, nbd_buffer)
        else:
            done, write = await asyncio.to_thread(self._prepare, block, content, nbd_buffer)
        await write()
        self._on_done(done)

    def _prepare(
        self, block: Block, content: memoryview, nbd_buffer: Any
    ) -> tuple[DoneBlock, Callable[[], Awaitable[None]]]:
        """Find out what a block is, and get it ready for writing."""
        found = digest(block, content, nbd_buffer)
        extents = [(part.length, part.status) for part in found.pieces]
        done = DoneBlock(self._disk, block.number, found.checksum, extents, len(content))
        return done, self._sink.prepare(done, found, content)


async def read_block(source: Source, block: Block, content: memoryview) -> None:
    """Read a block's data ranges, one after another into ``content``, side by side.

    Raises:
        ServerError: A read failed.
    """
    reads = []
    position = 0
    for part in block.ranges:
        if part.status == DATA:
            reads.append(source.read_into(part.offset, content[position : position + part.length]))
            position += part.length
    await gather(reads)
