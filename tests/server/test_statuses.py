"""Block status of large maps: what is found ahead is never older than the bitmap (rule 2)."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import pytest

from nbdfleece.bitmaps.bitmap import Bitmap
from nbdfleece.export.contexts import BaseAllocation, DirtyBitmap
from nbdfleece.export.export import Export
from nbdfleece.extents import Extents
from nbdfleece.nbd.constants import Command, CommandFlag, Option
from nbdfleece.nbd.replies import ExtendedReplies, Replies, SimpleReplies, StructuredReplies
from nbdfleece.nbd.requests import EXTENDED_REQUEST, Request, StatusQuery
from nbdfleece.server.buffers import BufferPool
from nbdfleece.server.outbox import Outbox
from nbdfleece.server.statistics import Statistics
from nbdfleece.server.statuses import (
    BITS_BYTES_MAX,
    MANY_EXTENTS,
    STATUS_EXTENTS_MAX,
    BlockStatuses,
    Packed,
)
from nbdfleece.testing.memory_node import MemoryNode
from tests.loop_turns import until

from .harness import (
    GREETING_BYTES,
    Client,
    Serve,
    export_of,
    extents_of,
    pack_request,
    settled,
)

GRANULE: Final = 512
SIZE: Final = 4 * (MANY_EXTENTS + 1000) * GRANULE + 4096
PART: Final = (MANY_EXTENTS + 1000) * GRANULE
NAME: Final = "qemu:dirty-bitmap:b"


class WatchedBitmap(DirtyBitmap):
    """Notes what it is asked for by a request, and not ahead of one."""

    def __init__(self, leaf: str, bitmap: Bitmap) -> None:
        super().__init__(leaf, bitmap)
        self.asked: list[int] = []

    async def extents(self, offset: int, length: int, *, extents_max: int) -> Extents:
        self.asked.append(offset)
        return await super().extents(offset, length, extents_max=extents_max)


class RecordedNode(MemoryNode):
    """A disk whose writes are recorded."""

    def __init__(self, size: int, bitmap: Bitmap) -> None:
        super().__init__(size)
        self._bitmap = bitmap

    async def write(self, offset: int, data: memoryview) -> None:
        self._bitmap.set_range(offset, len(data))
        await super().write(offset, data)


def alternating(size: int = SIZE, pattern: int = 0xAA) -> Bitmap:
    """Every other granule dirty."""
    bitmap = Bitmap(size, GRANULE)
    bitmap.array()[:] = pattern
    bitmap._clear_tail()
    return bitmap


def walked(bitmap: Bitmap) -> tuple[Export, WatchedBitmap]:
    context = WatchedBitmap("b", bitmap)
    node = RecordedNode(bitmap.size, bitmap)
    return export_of(node, contexts=(BaseAllocation(node), context)), context


async def ask(client: Client, offset: int, length: int = PART, flags: int = 0) -> list[list[int]]:
    """The extents of all contexts, after which the server has had time to look ahead."""
    await client.request(Command.BLOCK_STATUS, offset, length, flags=flags)
    told = [extents_of(chunk)[1] for chunk in await client.replies()]
    await settled()
    return told


def truth(bitmap: Bitmap, offset: int, length: int = PART) -> list[tuple[int, int]]:
    return bitmap.extents(offset, length).pairs()


async def test_walk_is_found_ahead_and_true(serve: Serve) -> None:
    bitmap = alternating()
    export, context = walked(bitmap)
    client = await serve([export]).open(contexts=[NAME])
    for offset in range(0, SIZE, PART):
        length = min(PART, SIZE - offset)
        assert await ask(client, offset, length) == [truth(bitmap, offset, length)]
    assert context.asked == [0, SIZE // PART * PART], "the last part is small"


CHANGES: dict[str, Callable[[Bitmap], None]] = {
    "first granule": lambda bitmap: bitmap.set_range(PART, 1),
    "last granule": lambda bitmap: bitmap.set_range(2 * PART - 2 * GRANULE, 1),
    "all set": Bitmap.set_all,
    "cleared": lambda bitmap: bitmap.clear_range(0, bitmap.size),
    "a part cleared": lambda bitmap: bitmap.clear_range(PART + PART // 2, 5 * GRANULE),
    "merged": lambda bitmap: bitmap.merge(alternating(pattern=0x11)),
    "subtracted": lambda bitmap: bitmap.subtract(alternating(pattern=0x08)),
    "loaded": lambda bitmap: bitmap.put(PART // GRANULE // 8, memoryview(b"\x55" * 100)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
async def test_bitmap_that_changes_between_two_requests_is_told_as_it_is(
    serve: Serve, change: Callable[[Bitmap], None]
) -> None:
    bitmap = alternating()
    export, context = walked(bitmap)
    client = await serve([export]).open(contexts=[NAME])
    await ask(client, 0)
    before = truth(bitmap, PART)
    change(bitmap)
    told = await ask(client, PART)
    assert told == [truth(bitmap, PART)] != [before]
    assert context.asked == [0, PART]


async def test_write_of_another_client_between_two_requests_is_told(serve: Serve) -> None:
    """A live disk, whose recording bitmap is shown while a guest writes."""
    bitmap = alternating()
    export, _ = walked(bitmap)
    served = serve([export])
    backup, guest = await served.open(contexts=[NAME]), await served.open()
    await ask(backup, 0)
    assert (await guest.perform(Command.WRITE, PART + 4096, payload=b"w" * 4096)).error == 0
    (told,) = await ask(backup, PART)
    assert told == truth(bitmap, PART)
    assert max(length for length, status in told if status) == 9 * GRANULE


async def test_change_elsewhere_costs_nothing(serve: Serve) -> None:
    bitmap = alternating()
    export, context = walked(bitmap)
    client = await serve([export]).open(contexts=[NAME])
    await ask(client, 0)
    bitmap.set_range(0, PART - 8 * GRANULE)
    assert await ask(client, PART) == [truth(bitmap, PART)]
    assert context.asked == [0]


@pytest.mark.parametrize(
    ("offset", "length", "flags"),
    [
        (PART, PART, CommandFlag.REQ_ONE),
        (PART, PART - GRANULE, 0),
        (PART, PART + GRANULE, 0),
        (PART, 1, 0),
        (PART + 1, PART, 0),
        (PART - GRANULE, PART, 0),
        (0, PART, 0),
    ],
)
async def test_request_that_was_not_foreseen_has_its_own_answer(
    serve: Serve, offset: int, length: int, flags: int
) -> None:
    bitmap = alternating()
    export, context = walked(bitmap)
    client = await serve([export]).open(contexts=[NAME])
    await ask(client, 0)
    (told,) = await ask(client, offset, length, flags)
    assert told == truth(bitmap, offset, length)[: 1 if flags else None]
    assert context.asked == [0, offset]


async def test_only_bitmaps_are_found_ahead(serve: Serve) -> None:
    """What a node says cannot be compared: it is asked when the client asks."""
    bitmap = alternating()
    export, context = walked(bitmap)
    assert isinstance(export.node, MemoryNode)
    client = await serve([export]).open(contexts=["base:allocation", NAME])
    await ask(client, 0)
    export.node.holes = {PART // 4096 + 3}
    allocation, told = await ask(client, PART)
    assert any(status for _, status in allocation)
    assert told == truth(bitmap, PART)
    assert context.asked == [0]


async def test_other_requests_do_not_make_it_wrong(serve: Serve) -> None:
    bitmap = alternating()
    export, context = walked(bitmap)
    client = await serve([export]).open(contexts=[NAME])
    await ask(client, 0)
    assert await client.read(0, 512) == bytes(512)
    assert (await client.perform(Command.WRITE, PART + 512, payload=b"w" * 5000)).error == 0
    assert await ask(client, PART) == [truth(bitmap, PART)]
    assert context.asked == [0, PART]


async def test_two_clients_have_their_own(serve: Serve) -> None:
    bitmap = alternating()
    export, _ = walked(bitmap)
    served = serve([export])
    first, second = [await served.open(contexts=[NAME]) for _ in range(2)]
    for offset in range(0, 3 * PART, PART):
        assert await ask(first, offset) == [truth(bitmap, offset)]
        bitmap.set_range(offset + PART // 2, GRANULE * 3)
        assert await ask(second, offset) == [truth(bitmap, offset)]


async def test_requests_in_flight_together_are_answered_truly(serve: Serve) -> None:
    bitmap = alternating()
    export, _ = walked(bitmap)
    client = await serve([export]).open(contexts=[NAME])
    offsets = [0, PART, 2 * PART, 0, PART, PART]
    await client.send(
        b"".join(pack_request(Command.BLOCK_STATUS, offset, PART) for offset in offsets)
    )
    for offset in offsets:
        assert extents_of(await client.reply())[1] == truth(bitmap, offset)


async def test_client_may_leave_at_any_time(serve: Serve) -> None:
    """No task and no buffer is left, as the fixture looks, and no connection.

    libuv tells only once that a client has left with replies unread, perhaps amid a turn.
    """
    export, _ = walked(alternating())
    served = serve([export])
    for turns in range(12):
        client = await served.open(contexts=[NAME])
        await client.request(Command.BLOCK_STATUS, 0, PART)
        await settled(turns)
        client.close()
    async with asyncio.timeout(60):
        while served.server.connections:
            await asyncio.sleep(0)


async def test_reply_has_left_when_the_search_ahead_is_prepared(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client digests it meanwhile."""
    export, _ = walked(alternating())
    served = serve([export])
    client = await served.open(contexts=[NAME])
    (connection,) = served.server.connections
    queued_bytes = []
    look_ahead = BlockStatuses.look_ahead

    def looked(statuses: BlockStatuses) -> Coroutine[Any, Any, None]:
        queued_bytes.append(connection.outbox.queued_bytes)
        return look_ahead(statuses)

    monkeypatch.setattr(BlockStatuses, "look_ahead", looked)
    for offset in (0, PART):
        await ask(client, offset)
    assert queued_bytes == [0, 0]


async def test_nothing_is_searched_ahead_for_a_client_that_has_left(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    export, context = walked(alternating())
    served = serve([export])
    client = await served.open(contexts=[NAME])
    searches = []
    monkeypatch.setattr(BlockStatuses, "look_ahead", lambda *_: searches.append(settled(1)))
    await client.request(Command.BLOCK_STATUS, 0, PART)
    client.close()
    await until(lambda: not served.server.connections)
    assert (context.asked, searches) == ([0], [])


async def test_effect_length_and_ids_of_a_payload_decide(serve: Serve) -> None:
    """With extended headers a request names its length and its contexts in a payload."""
    bitmap, other = alternating(), alternating(pattern=0x55)
    export, context = walked(bitmap)
    second = WatchedBitmap("c", other)
    export.contexts += (second,)
    client = await serve([export]).connect()
    await client.receive(GREETING_BYTES)
    await client.send(struct.pack(">I", 3))
    await client.option(Option.EXTENDED_HEADERS)
    await client.option_reply()
    await client._select(b"x", [NAME.encode(), second.name.encode()])
    await client.option(Option.GO, struct.pack(">I", 1) + b"x\0\0")
    for _ in range(3):
        await client.option_reply()
    ids = client.context_ids
    for name, offset, length in (
        (NAME, 0, PART),
        (second.name, PART, PART),
        (NAME, 2 * PART, PART),
        (NAME, 3 * PART, PART // 2),
    ):
        payload = struct.pack(">QI", length, ids[name])
        flags = int(CommandFlag.PAYLOAD_LEN)
        head = EXTENDED_REQUEST.pack(0x21E41C71, flags, Command.BLOCK_STATUS, 9, offset, 12)
        await client.send(head + payload)
        _, flags, _, _, _, size = struct.unpack(">IHHQQQ", await client.receive(32))
        context_id, count = struct.unpack(">II", await client.receive(8))
        words = struct.unpack(f">{2 * count}Q", await client.receive(size - 8))
        told = list(zip(words[::2], words[1::2], strict=True))
        assert (flags, context_id) == (1, ids[name])
        assert told == truth(bitmap if name == NAME else other, offset, length)
        await settled()
    assert (context.asked, second.asked) == ([0, 2 * PART, 3 * PART], [PART])


@pytest.mark.parametrize("seed", range(4))
async def test_random_walks_under_random_changes_are_true(serve: Serve, seed: int) -> None:
    rng = random.Random(seed)
    bitmap = alternating()
    export, context = walked(bitmap)
    served = serve([export])
    clients = [await served.open(contexts=[NAME]) for _ in range(2)]
    places = [0, 0]
    asked = 0
    for _ in range(60):
        who = rng.randrange(2)
        if rng.random() < 0.3:
            at = rng.randrange(SIZE)
            change = rng.choice([bitmap.set_range, bitmap.clear_range])
            change(at, rng.randint(1, min(SIZE - at, 20 * GRANULE)))
        if rng.random() < 0.15 or places[who] >= SIZE:
            places[who] = rng.randrange(SIZE)
        length = min(PART, SIZE - places[who])
        assert await ask(clients[who], places[who], length) == [truth(bitmap, places[who], length)]
        places[who] += length
        asked += 1
    assert len(context.asked) < asked, "some were found ahead"


# By itself.


class MeasuredBitmap(Bitmap):
    """Notes how much of it each search is of, in bytes of the disk."""

    __slots__ = ("searched",)

    def __init__(self, size: int = SIZE, granularity: int = GRANULE) -> None:
        super().__init__(size, granularity)
        self.array()[:] = 0xAA
        self._clear_tail()
        self.searched: list[int] = []

    def extents(self, offset: int, length: int, *, extents_max: int = 1 << 20) -> Extents:
        self.searched.append(length)
        return super().extents(offset, length, extents_max=extents_max)


async def _now() -> None:
    """A turn that comes at once."""


def by_itself(
    *bitmaps: Bitmap,
    extents_max: int = 1 << 17,
    replies: Replies | None = None,
    give_way: Callable[[], Awaitable[None]] = _now,
) -> tuple[BlockStatuses, Statistics, MemoryNode]:
    node = MemoryNode(0)
    node.size = bitmaps[0].size
    statistics = Statistics()
    export = Export(name="x", node=node)
    named = {number: DirtyBitmap(str(number), bitmap) for number, bitmap in enumerate(bitmaps)}
    replies = replies or StructuredReplies()
    statuses = BlockStatuses(named, extents_max, export, statistics, replies, give_way)
    return statuses, statistics, node


def status_request(offset: int, length: int) -> tuple[Request, StatusQuery]:
    return Request(0, 0, Command.BLOCK_STATUS, 1, offset, length), StatusQuery(length, (0,))


@pytest.mark.parametrize("replies", [StructuredReplies(), ExtendedReplies()])
async def test_packed_reply_is_the_same_bytes(
    replies: StructuredReplies | ExtendedReplies,
) -> None:
    bitmap = alternating()
    statuses, *_ = by_itself(bitmap, replies=replies)
    request, query = status_request(0, PART)
    found = await statuses.find(request, query)
    outbox = Outbox(BufferPool(0))
    statuses.put(outbox, request, found)
    sent = bytearray()

    class Taker:
        def sendmsg(self, views: list[memoryview], /) -> int:
            sent.extend(b"".join(views))
            return sum(map(len, views))

    outbox.send(Taker())
    assert sent == replies.block_status(request, 0, bitmap.extents(0, PART), done=True)


async def test_search_is_given_up_if_the_client_asks_meanwhile() -> None:
    bitmap = MeasuredBitmap()
    statuses, statistics, _ = by_itself(bitmap)
    request, query = status_request(0, PART)
    found = await statuses.find(request, query)
    assert statuses.foresee(request, query, found)
    statistics.requests += 1
    await statuses.look_ahead()
    assert bitmap.searched == [PART]


async def test_no_more_bits_than_the_limit_are_kept() -> None:
    """A part of the map that is long and has just enough extents."""
    size = 4 * 8 * (BITS_BYTES_MAX + 1) * GRANULE
    for extra, is_kept in ((0, True), (1, False)):
        length = 8 * (BITS_BYTES_MAX + extra) * GRANULE
        bitmap = MeasuredBitmap(size)
        bitmap.clear_range(0, bitmap.size)
        bitmap.array()[: MANY_EXTENTS // 8 * 2] = 0xAA
        bitmap.array()[length >> 12 : (length >> 12) + MANY_EXTENTS // 8 * 2] = 0xAA
        statuses, *_ = by_itself(bitmap)
        request, query = status_request(0, length)
        found = await statuses.find(request, query)
        assert statuses.foresee(request, query, found)
        await statuses.look_ahead()
        await statuses.find(*status_request(length, length))
        assert len(bitmap.searched) == (2 if is_kept else 3)


async def test_no_more_is_searched_ahead_than_may_be_kept() -> None:
    """A map of more extents than fit in a reply, but too long to be compared."""
    length = 8 * (4 * BITS_BYTES_MAX) * GRANULE
    bitmap = MeasuredBitmap(2 * length)
    bitmap.clear_range(0, bitmap.size)
    bitmap.array()[::5] = 0xAA
    statuses, *_ = by_itself(bitmap)
    request, query = status_request(0, length)
    found = await statuses.find(request, query)
    assert statuses.foresee(request, query, found)
    await statuses.look_ahead()
    assert bitmap.searched[1] <= 8 * BITS_BYTES_MAX * GRANULE
    ((_, first),) = found
    assert isinstance(first, Packed)
    ((_, told),) = await statuses.find(*status_request(first.length, length))
    assert bitmap.searched[2:] == [length], "what was found is no whole reply"
    assert isinstance(told, Packed)
    truth = bitmap.extents(first.length, length, extents_max=1 << 17)
    assert (told.extent_count, told.length) == (1 << 17, truth.total())


async def test_largest_reply_is_found_ahead() -> None:
    """Its bits are just as many as may be kept."""
    length = 8 * BITS_BYTES_MAX * GRANULE
    bitmap = MeasuredBitmap(3 * length)
    statuses, *_ = by_itself(bitmap, extents_max=STATUS_EXTENTS_MAX, replies=ExtendedReplies())
    request, query = status_request(0, 2 * length)
    assert statuses.foresee(request, query, await statuses.find(request, query))
    await statuses.look_ahead()
    ((_, told),) = await statuses.find(*status_request(length, 2 * length))
    assert len(bitmap.searched) == 2
    assert isinstance(told, Packed)
    assert (told.extent_count, told.length) == (STATUS_EXTENTS_MAX, length)


async def test_no_more_contexts_are_searched_ahead_than_in_one_turn() -> None:
    bitmap = alternating()
    for count, is_foreseen in ((4, True), (5, False)):
        statuses, *_ = by_itself(*[bitmap] * count)
        request, _ = status_request(0, PART)
        query = StatusQuery(PART, tuple(range(count)))
        found = await statuses.find(request, query)
        assert statuses.foresee(request, query, found) is is_foreseen


@pytest.mark.parametrize(
    ("extents", "turns"),
    [(1 << 16, [0, 1, 2, 3]), (1 << 12, [0, 0, 0, 0]), (1 << 15, [0, 0, 1, 1])],
)
async def test_contexts_of_many_extents_have_a_turn_each(extents: int, turns: list[int]) -> None:
    """Rule 5: to find and pack all of them would keep the others waiting for milliseconds."""
    turn = 0

    async def give_way() -> None:
        nonlocal turn
        turn += 1

    class Timed(MeasuredBitmap):
        def extents(self, offset: int, length: int, *, extents_max: int = 1 << 20) -> Extents:
            self.searched.append(turn)
            return Bitmap.extents(self, offset, length, extents_max=extents_max)

    length = extents * GRANULE
    bitmap = Timed(2 * length)
    statuses, *_ = by_itself(*[bitmap] * 4, give_way=give_way)
    query = StatusQuery(length, (0, 1, 2, 3))
    request, _ = status_request(0, length)
    found = await statuses.find(request, query)
    assert bitmap.searched == turns
    first, bitmap.searched = turn + 1, []
    assert statuses.foresee(request, query, found)
    await statuses.look_ahead()
    assert bitmap.searched == [first, first + 1, first + 2, first + 3]
    await statuses.find(status_request(length, length)[0], query)
    assert len(bitmap.searched) == 4, "all was found ahead"


async def test_bitmap_that_changes_amid_a_request_is_told_as_it_is_in_its_turn() -> None:
    """What was found ahead is compared when it is taken, not when the request comes (rule 2)."""
    length = (1 << 16) * GRANULE
    first, second = MeasuredBitmap(2 * length), MeasuredBitmap(2 * length)

    async def give_way() -> None:
        if len(first.searched) == 3:  # anew, for the second request
            second.set_range(length + length // 2, 4 * GRANULE)

    statuses, *_ = by_itself(first, second, give_way=give_way)
    query = StatusQuery(length, (0, 1))
    request, _ = status_request(0, length)
    assert statuses.foresee(request, query, await statuses.find(request, query))
    await statuses.look_ahead()
    first.set_range(length, 1)
    found = await statuses.find(status_request(length, length)[0], query)
    counts = [each.extent_count for _, each in found if isinstance(each, Packed)]
    assert counts[1] == len(second.extents(length, length).lengths) < counts[0]


async def test_request_amid_a_search_ahead_has_what_was_found_until_then() -> None:
    bitmap = MeasuredBitmap()
    asked: list[int] = []

    async def give_way() -> None:
        asked.append(statistics.requests)
        if len(asked) == 3:
            statistics.requests += 1

    statuses, statistics, _ = by_itself(*[bitmap] * 4, give_way=give_way)
    query = StatusQuery(PART, (0, 1, 2, 3))
    request, _ = status_request(0, PART)
    assert statuses.foresee(request, query, await statuses.find(request, query))
    await statuses.look_ahead()
    assert len(bitmap.searched) == 4 + 2, "of four contexts two were searched ahead"
    found = await statuses.find(status_request(PART, PART)[0], query)
    assert len(bitmap.searched) == 4 + 2 + 2
    assert {each.extent_count for _, each in found if isinstance(each, Packed)} == {5096}
    assert statuses.foresee(request, query, found)


async def test_nothing_is_foreseen_where_it_is_not_worth_it() -> None:
    bitmap = alternating()
    statuses, *_ = by_itself(bitmap)
    for offset, length in ((0, (MANY_EXTENTS - 1) * GRANULE), (SIZE - PART, PART)):
        request, query = status_request(offset, length)
        assert not statuses.foresee(request, query, await statuses.find(request, query))


async def test_simple_replies_have_no_status_to_look_ahead_for() -> None:
    statuses, *_ = by_itself(alternating(), replies=SimpleReplies())
    request, query = status_request(0, PART)
    statuses.foresee(request, query, await statuses.find(request, query))
    await statuses.look_ahead()
    assert not isinstance((await statuses.find(*status_request(PART, PART)))[0][1], Packed)


@pytest.mark.parametrize("size", [PART // 2, PART, SIZE + PART])
async def test_disk_that_was_resized_is_no_failure(size: int) -> None:
    """Its new bitmaps are others; the one that is shown keeps its size."""
    bitmap = alternating(2 * PART)
    statuses, _, node = by_itself(bitmap)
    request, query = status_request(0, PART)
    found = await statuses.find(request, query)
    node.size = size
    statuses.foresee(request, query, found)
    await statuses.look_ahead()
    request, query = status_request(PART, 2 * PART)
    found = await statuses.find(request, query)
    statuses.foresee(request, query, found)
    await statuses.look_ahead()
