"""READs of a disk of which some is at hand, some must be waited for, and some cannot be read."""

from __future__ import annotations

import asyncio
import errno
import random
import struct

import pytest

from nbdfleece.nbd.constants import Command, CommandFlag, Error, ReplyType
from nbdfleece.server.limits import Limits
from nbdfleece.testing.memory_node import MemoryNode
from tests.loop_turns import until

from .harness import Client, Serve

KIB = 1 << 10
SIZE = (1 << 20) + 3 * 512
BLOCK = 4096
SIMPLE = struct.Struct(">IIQ")


class MoodyNode(MemoryNode):
    """A disk with bad blocks and long zeroes, whose reads now and then fail at first."""

    preferred_block_size = BLOCK

    def __init__(self, chance: random.Random, bad_blocks: int) -> None:
        super().__init__(chance.randbytes(SIZE))
        self.chance = chance
        self.bad = {chance.randrange(SIZE // BLOCK) for _ in range(bad_blocks)}
        self.reads_at_once = 0
        for _ in range(6):
            begin = chance.randrange(SIZE - 70_000)
            self.content[begin : begin + 70_000] = bytes(70_000)

    def is_bad(self, offset: int, length: int) -> bool:
        return not self.bad.isdisjoint(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))

    async def read_into(self, offset: int, view: memoryview) -> None:
        if self.chance.random() < 0.3:
            await asyncio.sleep(0)
        view[:] = b"!" * len(view)
        if self.is_bad(offset, len(view)):
            raise OSError(errno.EIO, "bad block")
        await super().read_into(offset, view)

    def read_at_once(self, offset: int, view: memoryview) -> bool:
        view[:] = b"?" * len(view)
        mood = self.chance.random()
        if mood < 0.2:
            return False
        if mood < 0.3:
            raise OSError(errno.EIO, "not seen again")
        if mood < 0.35:
            raise KeyError("surprise")
        if self.is_bad(offset, len(view)):
            raise OSError(errno.EIO, "bad block")
        view[:] = self.content[offset : offset + len(view)]
        self.reads_at_once += 1
        return True


class Wanted:
    """What one READ asks for, and what has come of it."""

    def __init__(self, node: MoodyNode) -> None:
        chance = node.chance
        self.node = node
        self.offset = chance.randrange(SIZE)
        longest = chance.choice([512, 5000, 40_000, 400_000])
        self.length = chance.randint(1, min(SIZE - self.offset, longest))
        self.flags = chance.choice([0, 0, CommandFlag.DF])
        self.parts: dict[int, bytes | None] = {}
        """Data by their offset, None where a bad block was told."""

    def is_bad(self) -> bool:
        return self.node.is_bad(self.offset, self.length)

    def check(self) -> None:
        """The parts are the whole, and what was told as bad is, and lies in one block."""
        at, end = self.offset, self.offset + self.length
        if self.flags:
            assert len(self.parts) == 1, "a READ with DF is one chunk"
        starts = sorted(self.parts)
        for start, following in zip(starts, [*starts[1:], end], strict=True):
            assert start == at
            part = self.parts[start]
            if part is None:
                assert start // BLOCK == (following - 1) // BLOCK
                assert self.node.is_bad(start, following - start)
                at = following
            else:
                at += len(part)
                assert part == self.node.content[start:at]
        assert at == end


async def take_chunk(client: Client, wanted: dict[int, Wanted]) -> tuple[int | None, int]:
    """Take one chunk; the cookie of a READ that is done with it, and how many errors it told."""
    chunk = await client.reply()
    read = wanted[chunk.cookie]
    if chunk.kind == ReplyType.ERROR:
        assert read.flags
        assert read.is_bad()
        assert (chunk.error, read.parts) == (Error.EIO, {})
        return chunk.cookie, 1
    if chunk.kind == ReplyType.ERROR_OFFSET:
        read.parts[chunk.offset or 0] = None
    elif chunk.kind != ReplyType.NONE:
        read.parts[chunk.offset or 0] = chunk.payload
    if chunk.done:
        read.check()
    return chunk.cookie if chunk.done else None, chunk.kind == ReplyType.ERROR_OFFSET


async def take_simple(client: Client, wanted: dict[int, Wanted]) -> tuple[int | None, int]:
    """Likewise, of simple replies."""
    _, error, cookie = SIMPLE.unpack(await client.receive(SIMPLE.size))
    read = wanted[cookie]
    if error:
        assert read.is_bad()
        return cookie, 1
    data = await client.receive(read.length)
    assert data == read.node.content[read.offset : read.offset + read.length]
    return cookie, 0


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("seed", range(6))
async def test_any_reads_at_once_or_not_tell_data_and_bad_blocks_exactly(
    serve: Serve, seed: int, structured: bool
) -> None:
    chance = random.Random(seed)
    node = MoodyNode(chance, bad_blocks=seed % 3 * 2)
    chunk_bytes = chance.choice([64 * KIB, 128 * KIB, 2048 * KIB])
    served = serve(node, limits=Limits(read_chunk_bytes_max=chunk_bytes))
    client = await served.open(structured=structured)
    (connection,) = served.server.connections
    take = take_chunk if structured else take_simple
    errors = 0
    for _ in range(15):
        wanted = {cookie: Wanted(node) for cookie in range(8)}
        for cookie, read in wanted.items():
            read.flags *= structured
            await client.request(
                Command.READ, read.offset, read.length, cookie=cookie, flags=read.flags
            )
        while wanted:
            done, told = await take(client, wanted)
            errors += told
            if done is not None:
                del wanted[done]
    await until(lambda: not connection.requests_in_flight)
    assert node.reads_at_once
    assert connection._phase.statistics.errors == errors


async def test_read_across_the_edge_of_a_bad_block_gives_the_good_side(serve: Serve) -> None:
    """It is no larger than a block, and yet lies in two."""
    node = MoodyNode(random.Random(1), bad_blocks=0)
    node.bad = {5}
    client = await serve(node).open()
    await client.request(Command.READ, 5 * BLOCK - 1000, BLOCK)
    data, error, end = await client.replies()
    assert data.payload == node.content[5 * BLOCK - 1000 : 5 * BLOCK]
    assert (error.kind, error.offset) == (ReplyType.ERROR_OFFSET, 5 * BLOCK)
    assert (end.kind, end.done) == (ReplyType.NONE, True)
