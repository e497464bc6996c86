from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import pytest

from nbdfleece.backup.tasks import Budget, Crew, gather

Work = Callable[[], Coroutine[object, object, None]]


async def test_budget_lends_no_more_than_there_is_and_in_order() -> None:
    budget = Budget(10)
    await budget.borrow(6)
    second = asyncio.create_task(budget.borrow(6))
    third = asyncio.create_task(budget.borrow(1))
    await asyncio.sleep(0)
    assert not second.done()
    assert not third.done()
    budget.give_back(6)
    await asyncio.wait_for(asyncio.gather(second, third), 60)


async def test_budget_lends_more_than_it_has_when_nothing_else_is_lent() -> None:
    budget = Budget(10)
    await asyncio.wait_for(budget.borrow(100), 60)
    other = asyncio.create_task(budget.borrow(1))
    await asyncio.sleep(0)
    assert not other.done()
    budget.give_back(100)
    await asyncio.wait_for(other, 60)


async def test_budget_forgets_who_was_cancelled() -> None:
    budget = Budget(1)
    await budget.borrow(1)
    waiting = asyncio.create_task(budget.borrow(1))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    budget.give_back(1)
    await asyncio.wait_for(budget.borrow(1), 60)


async def test_gather_raises_the_first_error_when_all_have_ended() -> None:
    ended = []

    async def work(number: int) -> None:
        await asyncio.sleep(0)
        ended.append(number)
        if number:
            raise ValueError(number)

    with pytest.raises(ValueError, match="1"):
        await gather(work(number) for number in range(3))
    assert ended == [0, 1, 2]


async def run_crew(bytes_max: int, cost: int, works: list[Work]) -> None:
    async with Crew(bytes_max, 1) as crew:
        for work in works:
            await crew.start(cost, work)


async def test_crew_waits_for_all_and_raises_the_first_error() -> None:
    ended = []

    async def good() -> None:
        await asyncio.sleep(0)
        ended.append(1)

    async def bad() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        await run_crew(100, 10, [good, bad, good])
    assert ended == [1, 1]


async def test_crew_starts_nothing_after_an_error() -> None:
    async def bad() -> None:
        raise OSError("no")

    async def never() -> None:
        raise AssertionError

    with pytest.raises(OSError, match="no"):
        await run_crew(1, 1, [bad, never])


async def test_crew_that_is_cancelled_cancels_its_tasks() -> None:
    cancelled = []

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(1)
            raise

    async def lead() -> None:
        async with Crew(100, 1) as crew:
            await crew.start(1, wait)
            await crew.start(1, wait)

    task = asyncio.create_task(lead())
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 60)
    assert cancelled == [1, 1]
