"""Range locks: exclusion where ranges overlap, nothing where they do not."""

from __future__ import annotations

import asyncio
import random

from nbdfleece.block.range_lock import RangeLock


async def test_disjoint_ranges_do_not_wait() -> None:
    lock = RangeLock()
    async with lock.hold(0, 10):
        assert lock.is_free(10, 20)
        assert not lock.is_free(9, 11)
        async with lock.hold(10, 20):
            pass
    assert lock.is_idle


async def test_overlapping_holders_exclude_each_other_and_all_get_their_turn() -> None:
    lock = RangeLock()
    owner: list[int | None] = [None] * 64
    chance = random.Random(1)

    async def work(number: int) -> None:
        for _ in range(20):
            begin = chance.randrange(63)
            end = chance.randint(begin + 1, 64)
            async with lock.hold(begin, end):
                assert owner[begin:end] == [None] * (end - begin)
                owner[begin:end] = [number] * (end - begin)
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
                assert owner[begin:end] == [number] * (end - begin)
                owner[begin:end] = [None] * (end - begin)

    await asyncio.gather(*(work(number) for number in range(12)))
    assert lock.is_idle


async def test_cancelled_waiter_leaves_nothing_behind() -> None:
    lock = RangeLock()
    async with lock.hold(0, 10):
        waiter = asyncio.ensure_future(lock.hold(5, 15).__aenter__())
        await asyncio.sleep(0)
        behind = asyncio.ensure_future(lock.hold(12, 20).__aenter__())
        await asyncio.sleep(0)
        assert not behind.done(), "waits for the earlier request that it overlaps"
        waiter.cancel()
        await asyncio.wait([waiter])
        held = await behind
    await held.__aexit__(None, None, None)
    assert lock.is_idle
