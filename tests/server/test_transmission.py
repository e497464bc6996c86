"""Requests and replies, over a real socket."""

from __future__ import annotations

import asyncio
import errno
import random

import pytest

from nbdfleece.errors import SnapshotError
from nbdfleece.export.export import Export
from nbdfleece.extents import Extents
from nbdfleece.nbd.constants import Command, CommandFlag, Error, ReplyType
from nbdfleece.nbd.limits import Limits as WireLimits
from nbdfleece.server.limits import Limits
from nbdfleece.server.outbox import ARENA_BYTES
from nbdfleece.server.reads import BAD_BLOCKS_MAX
from nbdfleece.testing.memory_node import MemoryNode
from tests.loop_turns import until

from .harness import (
    Chunk,
    Client,
    Serve,
    export_of,
    extents_of,
    pack_request,
    settled,
)

MIB = 1 << 20
CONTENT = random.Random(1).randbytes(4 * MIB)


def node_with_bad_blocks(*bad: int) -> MemoryNode:
    """A disk whose 4 KiB blocks at these offsets cannot be read."""
    node = MemoryNode(CONTENT)
    read_into = node.read_into

    async def read_around(offset: int, view: memoryview) -> None:
        if any(offset < block + 4096 and block < offset + len(view) for block in bad):
            raise OSError(errno.EIO, "bad sector")
        await read_into(offset, view)

    node.read_into = read_around  # type: ignore[method-assign]  # a disk with a fault
    return node


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("length", [1, 4096, 70001, 1 * MIB, 1 * MIB + 1, 3 * MIB])
async def test_read_returns_the_content(serve: Serve, structured: bool, length: int) -> None:
    client = await serve(MemoryNode(CONTENT)).open(structured=structured)
    assert await client.read(12345, length) == CONTENT[12345 : 12345 + length]


@pytest.mark.parametrize("seed", range(4))
async def test_stream_of_writes_of_any_size_is_stored(serve: Serve, seed: int) -> None:
    """Large messages are received one at a time, small ones together: in any order."""
    rng = random.Random(seed)
    node = MemoryNode(4 * MIB)
    client = await serve(node).open(structured=False)
    lengths = rng.choices([1, 4096, 65_536, 262_144, 524_288, 524_289, MIB], k=40)
    expected, sent = bytearray(4 * MIB), bytearray()
    for cookie, length in enumerate(lengths):
        offset, data = rng.randrange(4 * MIB - length), rng.randbytes(length)
        expected[offset : offset + length] = data
        sent += pack_request(Command.WRITE, offset, length, cookie=cookie) + data
    sending = asyncio.create_task(client.send(bytes(sent)))
    assert [(await client.reply()).cookie for _ in lengths] == list(range(len(lengths)))
    await sending
    assert node.content == expected


async def test_connection_that_breaks_inside_a_large_write_is_lost(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    node = MemoryNode(MIB)
    served = serve(node)
    client = await served.open(structured=False)
    (connection,) = served.server.connections
    receive, calls = connection._inbox.source.recv_into, 0

    def break_off(view: memoryview) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise ConnectionResetError(errno.ECONNRESET, "broken")
        return receive(view)

    caplog.set_level("INFO")
    connection._inbox.source.recv_into = break_off
    await client.send(pack_request(Command.WRITE, 0, 256 * 1024) + b"x" * 100_000)
    assert await client.is_at_end()
    assert "connection lost: [Errno 104] broken" in caplog.text
    assert "internal error" not in caplog.text
    assert node.content == bytes(MIB), "a write is whole or not at all"


@pytest.mark.parametrize("length", [1, 4096, 70001, 512 * 1024, 512 * 1024 + 1, 3 * MIB])
async def test_write_is_read_back(serve: Serve, length: int) -> None:
    node = MemoryNode(4 * MIB)
    client = await serve(node).open()
    data = random.Random(2).randbytes(length)
    assert (await client.perform(Command.WRITE, 777, payload=data)).error == 0
    assert node.content[777 : 777 + length] == data
    assert node.content[:777] == bytes(777)
    assert await client.read(777, length) == data


async def test_many_requests_in_one_send_are_all_answered(serve: Serve) -> None:
    client = await serve(MemoryNode(CONTENT)).open()
    offsets = [index * 4096 for index in range(500)]
    requests = (pack_request(Command.READ, offset, 4096, cookie=offset) for offset in offsets)
    sending = asyncio.ensure_future(client.send(b"".join(requests)))
    for _ in offsets:
        chunk = await client.reply()
        assert chunk.payload == CONTENT[chunk.cookie : chunk.cookie + 4096]
    await sending


async def test_writes_mixed_with_reads_in_one_send_keep_their_order(serve: Serve) -> None:
    node = MemoryNode(MIB)
    client = await serve(node).open(structured=False)
    stream = bytearray()
    for index in range(100):
        stream += pack_request(Command.WRITE, 0, 4096, cookie=index) + bytes([index]) * 4096
        stream += pack_request(Command.READ, 0, 4096, cookie=index)
    sending = asyncio.ensure_future(client.send(stream))
    for index in range(100):
        assert (await client.reply()).cookie == index
        assert (await client.reply(4096)).payload == bytes([index]) * 4096
    await sending


async def test_dribbled_bytes_are_understood(serve: Serve) -> None:
    node = MemoryNode(MIB)
    client = await serve(node).open(structured=False)
    stream = (
        pack_request(Command.WRITE, 4096, 64) + b"w" * 64 + pack_request(Command.READ, 4096, 64)
    )
    for byte in stream:
        await client.send(bytes([byte]))
        await settled(3)
    assert (await client.reply()).error == 0
    assert (await client.reply(64)).payload == b"w" * 64


async def test_request_that_waits_is_overtaken(serve: Serve) -> None:
    node = MemoryNode(CONTENT)
    client = await serve(node).open(structured=False)
    gate = asyncio.get_running_loop().create_future()
    node.pause = lambda operation: gate if operation == "flush" else None
    await client.request(Command.FLUSH, cookie=1)
    await client.request(Command.READ, 0, 512, cookie=2)
    assert (await client.reply(512)).cookie == 2
    gate.set_result(None)
    assert (await client.reply()).cookie == 1


async def test_reads_that_wait_are_answered_with_their_own_data(serve: Serve) -> None:
    node = MemoryNode(CONTENT)
    client = await serve(node).open(structured=False)
    gates = [asyncio.get_running_loop().create_future() for _ in range(20)]
    waiting = iter(gates)
    node.pause = lambda operation: next(waiting)
    for index in range(20):
        await client.request(Command.READ, index * 8192, 8192, cookie=index)
    await settled()
    for index in random.Random(3).sample(range(20), 20):
        gates[index].set_result(None)
        reply = await client.reply(8192)
        assert reply.cookie == index
        assert reply.payload == CONTENT[index * 8192 : index * 8192 + 8192]


async def test_write_that_waits_keeps_its_payload(serve: Serve) -> None:
    """What is received meanwhile must not overwrite it."""
    node = MemoryNode(8 * MIB)
    client = await serve(node).open(structured=False)
    gate = asyncio.get_running_loop().create_future()
    waiting = iter([gate])
    node.pause = lambda operation: next(waiting, None)
    first = b"first" * 20000
    await client.request(Command.WRITE, 0, cookie=1, payload=first)
    for index in range(40):
        await client.request(Command.WRITE, 4 * MIB, cookie=2, payload=bytes([index]) * 100_000)
        assert (await client.reply()).cookie == 2
    gate.set_result(None)
    assert (await client.reply()).cookie == 1
    assert node.content[: len(first)] == first


async def test_fua_write_flushes_before_the_reply(serve: Serve) -> None:
    """Requirement 103."""
    node = MemoryNode(MIB)
    client = await serve(node).open()
    flags = CommandFlag.FUA
    await client.perform(Command.WRITE, 0, payload=b"a" * 512)
    assert node.flushes == 0
    for command in (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES):
        before = node.flushes
        payload = b"a" * 512 if command == Command.WRITE else b""
        assert (await client.perform(command, 0, 512, flags=flags, payload=payload)).error == 0
        assert node.flushes == before + 1


async def test_write_zeroes_passes_its_flags_on(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    node = MemoryNode(MIB)
    seen: list[tuple[bool, bool]] = []

    async def write_zeroes(offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        seen.append((unmap, fast))
        if fast:
            raise OSError(errno.ENOTSUP, "slow")

    node.write_zeroes = write_zeroes  # type: ignore[method-assign]  # a spy
    client = await serve(node).open()
    for flags in (0, CommandFlag.NO_HOLE):
        assert (await client.perform(Command.WRITE_ZEROES, 0, 512, flags=flags)).error == 0
    fast = CommandFlag.FAST_ZERO
    assert (await client.perform(Command.WRITE_ZEROES, 0, 512, flags=fast)).error == Error.ENOTSUP
    assert seen == [(True, False), (False, False), (True, True)]
    assert "slow" not in caplog.text, "an answer that is no failure was logged as one"


async def test_cache_and_flush_succeed(serve: Serve) -> None:
    node = MemoryNode(MIB)
    client = await serve(node).open()
    assert (await client.perform(Command.CACHE, 0, 4096)).error == 0
    assert (await client.perform(Command.FLUSH)).error == 0
    assert node.flushes == 1


async def test_write_error_is_answered_and_the_connection_goes_on(serve: Serve) -> None:
    node = MemoryNode(CONTENT)

    def fail(operation: str, offset: int) -> None:
        if operation == "write":
            raise OSError(errno.EDQUOT, "quota", "/secret/path")

    node.fail = fail
    client = await serve(node).open()
    reply = await client.perform(Command.WRITE, 0, payload=b"x" * 4096)
    assert reply.kind == ReplyType.ERROR
    assert reply.error == Error.ENOSPC
    assert "quota" in reply.text
    assert "secret" not in reply.text
    assert await client.read(0, 4096) == CONTENT[:4096]


@pytest.mark.parametrize("size", [512, 700_000])
async def test_payload_of_a_refused_write_is_thrown_away(serve: Serve, size: int) -> None:
    """Requirement 139."""
    export = export_of(MemoryNode(CONTENT), read_only=True)
    client = await serve([export]).open()
    reply = await client.perform(Command.WRITE, 0, payload=b"\x25\x60\x95\x13" * (size // 4))
    assert reply.error == Error.EPERM
    assert await client.read(0, 4096) == CONTENT[:4096]


async def test_refused_write_is_answered_when_its_payload_is_through(serve: Serve) -> None:
    """libnbd takes a reply to a request that it still sends for one to no request at all."""
    client = await serve([export_of(MemoryNode(CONTENT), read_only=True)]).open()
    await client.send(pack_request(Command.WRITE, 0, MIB) + bytes(MIB - 1))
    waiting = asyncio.ensure_future(client.reply())
    await settled(50)
    assert not waiting.done()
    await client.send(bytes(1))
    assert (await waiting).error == Error.EPERM


async def test_dead_snapshot_is_an_io_error_with_its_text(serve: Serve) -> None:
    node = MemoryNode(MIB)

    def fail(operation: str, offset: int) -> None:
        raise SnapshotError("snapshot 's1' is broken: scratch is full")

    node.fail = fail
    client = await serve(node).open()
    reply = await client.perform(Command.READ, 0, 4096)
    assert reply.kind == ReplyType.ERROR
    assert reply.error == Error.EIO
    assert "scratch is full" in reply.text


async def test_bug_below_is_an_io_error_and_the_connection_goes_on(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    node = MemoryNode(CONTENT)

    def fail(operation: str, offset: int) -> None:
        if operation == "flush":
            raise KeyError("surprise")

    node.fail = fail
    client = await serve(node).open()
    assert (await client.perform(Command.FLUSH)).error == Error.EIO
    assert "surprise" in caplog.text
    assert await client.read(0, 512) == CONTENT[:512]


async def test_bug_in_a_read_at_once_is_an_io_error_and_the_connection_goes_on(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    node = MemoryNode(CONTENT)
    node.is_at_hand = lambda: True

    def fail(operation: str, offset: int) -> None:
        if offset == 4096:
            raise KeyError("surprise")

    node.fail = fail
    served = serve(node)
    client = await served.open()
    for length in (512, 64 * 1024):
        assert (await client.perform(Command.READ, 4096, length)).error == Error.EIO
    assert "surprise" in caplog.text
    assert await client.read(0, 512) == CONTENT[:512]
    assert served.server.pool.taken_bytes <= 2 * ARENA_BYTES


async def test_reads_that_wait_hold_no_more_than_what_they_read(serve: Serve) -> None:
    """Rule 5: "make memory grow without bound"; what was tried at once before takes no place."""
    node = MemoryNode(CONTENT)
    held = asyncio.get_running_loop().create_future()
    node.pause = lambda operation: held
    served = serve(node)
    client = await served.open()
    lengths = [250_000] * 12
    for cookie, length in enumerate(lengths):
        await client.request(Command.READ, cookie, length)
    (connection,) = served.server.connections
    await until(lambda: connection.requests_in_flight == len(lengths))
    assert served.server.pool.taken_bytes <= 4 * ARENA_BYTES
    held.set_result(None)
    for _ in lengths:
        assert not (await client.reply()).error


async def test_read_around_a_bad_sector_gives_the_rest(serve: Serve) -> None:
    """Requirement 134, and what no peer does: the good part as data, the bad as ERROR_OFFSET."""
    bad = 5 * 4096
    client = await serve(node_with_bad_blocks(bad)).open()
    await client.request(Command.READ, 100, 64 * 1024)
    chunks = await client.replies()
    errors = [chunk for chunk in chunks if chunk.error]
    assert [chunk.kind for chunk in errors] == [ReplyType.ERROR_OFFSET]
    assert errors[0].error == Error.EIO
    covered = set()
    for chunk in chunks:
        if chunk.kind == ReplyType.OFFSET_DATA:
            end = chunk.offset + len(chunk.payload)
            assert chunk.payload == CONTENT[chunk.offset : end]
            covered |= set(range(chunk.offset, end))
    missing = set(range(100, 100 + 64 * 1024)) - covered
    assert errors[0].offset in missing
    assert missing == set(range(bad, bad + 4096))
    assert chunks[-1].kind == ReplyType.NONE
    assert await client.read(0, 4096) == CONTENT[:4096]


async def test_read_of_a_bad_disk_is_given_up(serve: Serve) -> None:
    client = await serve(node_with_bad_blocks(*range(0, 4 * MIB, 4096))).open()
    await client.request(Command.READ, 0, 4 * MIB)
    chunks = await client.replies()
    assert sum(1 for chunk in chunks if chunk.error) == BAD_BLOCKS_MAX


@pytest.mark.parametrize(("structured", "flags"), [(False, 0), (True, CommandFlag.DF)])
async def test_read_in_one_piece_fails_as_a_whole(
    serve: Serve, structured: bool, flags: int
) -> None:
    client = await serve(node_with_bad_blocks(8192)).open(structured=structured)
    await client.request(Command.READ, 0, 65536, flags=flags)
    reply = await client.reply()
    assert (reply.error, reply.done) == (Error.EIO, True)
    assert await client.read(65536, 512) == CONTENT[65536 : 65536 + 512]


async def test_df_read_is_one_chunk(serve: Serve) -> None:
    """Requirement 136."""
    client = await serve(MemoryNode(CONTENT)).open()
    await client.request(Command.READ, 0, 4 * MIB, flags=CommandFlag.DF)
    (chunk,) = await client.replies()
    assert chunk.payload == CONTENT


def sparse_node(*holes: range) -> MemoryNode:
    """A disk of data with holes, given in blocks of 4 KiB."""
    node = MemoryNode(CONTENT)
    for blocks in holes:
        node.content[blocks.start * 4096 : blocks.stop * 4096] = bytes(len(blocks) * 4096)
        node.holes.update(blocks)
    return node


def shape(chunks: list[Chunk]) -> list[tuple[ReplyType, int, int]]:
    return [(ReplyType(chunk.kind), chunk.offset, len(chunk.payload)) for chunk in chunks]


@pytest.mark.parametrize("is_at_hand", [False, True])
async def test_holes_in_a_read_are_not_sent(serve: Serve, is_at_hand: bool) -> None:
    node = sparse_node(range(16, 32), range(64, 1000))
    node.is_at_hand = lambda: is_at_hand
    operations: list[str] = []
    node.fail = lambda operation, offset: operations.append(operation)
    client = await serve(node).open()
    await client.request(Command.READ, 64 << 10, 256 << 10)
    chunks = await client.replies()
    assert shape(chunks) == [
        (ReplyType.OFFSET_HOLE, 64 << 10, 64 << 10),
        (ReplyType.OFFSET_DATA, 128 << 10, 128 << 10),
        (ReplyType.OFFSET_HOLE, 256 << 10, 64 << 10),
    ]
    assert [chunk.done for chunk in chunks] == [False, False, True]
    assert operations == ["read", "block_status"], "it is read once"
    assert await client.read(0, 4 * MIB) == node.content


async def test_hole_is_one_chunk_however_long(serve: Serve) -> None:
    client = await serve(sparse_node(range(256))).open()
    await client.request(Command.READ, 0, MIB)
    assert shape(await client.replies()) == [(ReplyType.OFFSET_HOLE, 0, MIB)]


async def test_finely_scattered_holes_do_not_make_many_chunks(serve: Serve) -> None:
    """Requirement 109."""
    node = sparse_node(*(range(block, block + 1) for block in range(0, 256, 2)))
    client = await serve(node).open()
    await client.request(Command.READ, 0, MIB)
    chunks = await client.replies()
    assert len(chunks) < 40
    assert b"".join(chunk.payload for chunk in chunks) == node.content[:MIB]


@pytest.mark.parametrize(("structured", "flags"), [(False, 0), (True, CommandFlag.DF)])
async def test_read_in_one_piece_has_its_zeroes_sent(
    serve: Serve, structured: bool, flags: int
) -> None:
    client = await serve(sparse_node(range(256))).open(structured=structured)
    await client.request(Command.READ, 0, 64 << 10, flags=flags)
    chunk = await client.reply(64 << 10)
    assert chunk.kind != ReplyType.OFFSET_HOLE
    assert chunk.payload == bytes(64 << 10)


@pytest.mark.parametrize("is_at_hand", [False, True])
async def test_disk_that_does_not_tell_its_holes_is_read_all_the_same(
    serve: Serve, is_at_hand: bool
) -> None:
    node = sparse_node(range(256))
    node.is_at_hand = lambda: is_at_hand

    def fail(operation: str, offset: int) -> None:
        if operation == "block_status":
            raise OSError(errno.EIO, "no map")

    node.fail = fail
    assert await (await serve(node).open()).read(0, MIB) == bytes(MIB)


async def test_read_above_the_maximum_payload_comes_in_chunks(serve: Serve) -> None:
    node = MemoryNode(40 * MIB)
    node.content[39 * MIB :] = b"z" * MIB
    client = await serve(node).open()
    data = await client.read(0, 40 * MIB)
    assert data == node.content


async def test_block_status_answers_all_contexts_in_one_reply(serve: Serve) -> None:
    node = MemoryNode(MIB)
    node.holes = {1, 2}
    client = await serve(node).open(contexts=["base:allocation", "qemu:allocation-depth"])
    await client.request(Command.BLOCK_STATUS, 0, 5 * 4096)
    chunks = await client.replies()
    assert [chunk.done for chunk in chunks] == [False, True]
    found = dict(extents_of(chunk) for chunk in chunks)
    assert found == {
        client.context_ids["base:allocation"]: [(4096, 0), (8192, 3), (8192, 0)],
        client.context_ids["qemu:allocation-depth"]: [(4096, 1), (8192, 0), (8192, 1)],
    }


async def test_req_one_gives_one_extent(serve: Serve) -> None:
    node = MemoryNode(MIB)
    node.holes = {1}
    client = await serve(node).open(contexts=["base:allocation"])
    reply = await client.perform(Command.BLOCK_STATUS, 0, MIB, flags=CommandFlag.REQ_ONE)
    assert extents_of(reply)[1] == [(4096, 0)]


async def test_failed_block_status_is_one_error_and_nothing_after(serve: Serve) -> None:
    """Requirement 108; QEMU sends more chunks after the error."""
    node = MemoryNode(CONTENT)

    class Broken:
        name = "x-test:broken"

        async def extents(self, offset: int, length: int, *, extents_max: int) -> Extents:
            raise OSError(errno.EIO, "no table")

    export = export_of(node)
    export.contexts = (*export.contexts, Broken())
    client = await serve([export]).open(contexts=["base:allocation", "x-test:broken"])
    reply = await client.perform(Command.BLOCK_STATUS, 0, 4096)
    assert (reply.kind, reply.error, reply.done) == (ReplyType.ERROR, Error.EIO, True)
    assert await client.read(0, 512) == CONTENT[:512]


async def test_block_status_without_a_context_is_invalid(serve: Serve) -> None:
    client = await serve(MemoryNode(MIB)).open()
    assert (await client.perform(Command.BLOCK_STATUS, 0, 4096)).error == Error.EINVAL


async def test_same_cookie_many_times_is_no_problem(serve: Serve) -> None:
    """Requirement 101."""
    client = await serve(MemoryNode(CONTENT)).open(structured=False)
    await client.send(pack_request(Command.READ, 0, 512, cookie=7) * 64)
    for _ in range(64):
        assert (await client.reply(512)) == (7, None, True, CONTENT[:512], 0, "", None)


async def test_more_requests_than_may_be_in_flight_wait_their_turn(serve: Serve) -> None:
    limits = Limits()
    node = MemoryNode(CONTENT)
    served = serve(node, limits=limits)
    client = await served.open(structured=False)
    gate = asyncio.get_running_loop().create_future()
    node.pause = lambda operation: gate
    count = 3 * limits.wire.requests_in_flight_max
    await client.send(pack_request(Command.FLUSH, 0, 0) * count)
    await settled(50)
    (connection,) = served.server.connections
    assert connection.requests_in_flight == limits.wire.requests_in_flight_max
    gate.set_result(None)
    for _ in range(count):
        assert (await client.reply()).error == 0


async def test_statistics_count_what_was_done(serve: Serve) -> None:
    served = serve(MemoryNode(CONTENT))
    client: Client = await served.open()
    await client.read(0, 1000)
    await client.perform(Command.WRITE, 0, payload=b"x" * 2000)
    await client.perform(Command.READ, 5 * MIB, 1)
    (connection,) = served.server.connections
    found = connection.statistics
    assert (found.requests, found.errors) == (3, 1)
    assert (found.read_bytes, found.written_bytes) == (1000, 2000)


async def test_export_below_its_minimum_block_size_is_refused(serve: Serve) -> None:
    export: Export = export_of(MemoryNode(CONTENT), minimum_block_size=4096)
    client = await serve([export]).open()
    assert (await client.perform(Command.READ, 512, 512)).error == Error.EINVAL


async def test_flush_on_one_connection_covers_writes_of_another(serve: Serve) -> None:
    """69: what CAN_MULTI_CONN promises."""
    node = MemoryNode(MIB)
    order: list[str] = []
    node.pause = lambda operation: order.append(operation)
    served = serve(node)
    writer, flusher = await served.open(), await served.open()
    assert (await writer.perform(Command.WRITE, 0, payload=b"m" * 512)).error == 0
    assert (await flusher.perform(Command.FLUSH)).error == 0
    assert order == ["write", "flush"], "one node, one cache, one flush"
    assert await flusher.read(0, 512) == b"m" * 512


async def test_walk_goes_on_where_a_reply_was_cut(serve: Serve) -> None:
    """155, 156: no more extents than the limit, and the next request continues."""
    node = sparse_node(*(range(block, block + 3) for block in range(0, 256, 7)))
    limits = Limits(wire=WireLimits(extents_max=3))
    client = await serve(node, limits=limits).open(contexts=["base:allocation"])
    offset, found = 0, []
    while offset < MIB:
        await client.request(Command.BLOCK_STATUS, offset, MIB - offset)
        _, extents = extents_of(await client.reply())
        assert 1 <= len(extents) <= 3
        found += extents
        offset += sum(length for length, _ in extents)
    assert offset == MIB
    holes = {
        block
        for index, (length, status) in enumerate(found)
        for block in range(
            sum(length for length, _ in found[:index]) // 4096,
            sum(length for length, _ in found[: index + 1]) // 4096,
        )
        if status
    }
    assert holes == {block for block in node.holes if block < 256}
