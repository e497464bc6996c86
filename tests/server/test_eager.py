"""Coroutines that do not wait cost no task; those that do go on in one."""

from __future__ import annotations

import asyncio

import pytest

from nbdfleece.server.eager import start


async def answer() -> int:
    return 42


async def test_coroutine_that_never_waits_gives_its_result_without_a_task() -> None:
    before = asyncio.all_tasks()
    assert start(answer()) == 42
    assert asyncio.all_tasks() == before


async def test_coroutine_that_never_waits_raises_at_once() -> None:
    async def fail() -> None:
        raise OSError(5, "no luck")

    with pytest.raises(OSError, match="no luck"):
        start(fail())


async def test_coroutine_that_waits_goes_on_in_a_task() -> None:
    future = asyncio.get_running_loop().create_future()

    async def waits() -> tuple[int, int]:
        first = await future
        await asyncio.sleep(0)
        return first, await answer()

    task = start(waits())
    assert isinstance(task, asyncio.Task)
    asyncio.get_running_loop().call_soon(future.set_result, 7)
    assert await task == (7, 42)


async def test_coroutine_whose_future_is_done_before_its_task_runs_loses_nothing() -> None:
    future = asyncio.get_running_loop().create_future()

    async def waits() -> int:
        return await future

    task = start(waits())
    future.set_result(3)
    assert await task == 3


async def test_several_coroutines_may_wait_for_one_future() -> None:
    future = asyncio.get_running_loop().create_future()

    async def waits() -> int:
        return await future

    tasks = [start(waits()) for _ in range(3)]
    future.set_result(8)
    assert [await task for task in tasks] == [8, 8, 8]


async def test_coroutine_that_only_gives_way_goes_on_in_a_task() -> None:
    async def gives_way() -> int:
        await asyncio.sleep(0)
        return 9

    assert await start(gives_way()) == 9


async def test_exception_of_the_future_reaches_the_coroutine() -> None:
    future = asyncio.get_running_loop().create_future()

    async def waits() -> str:
        try:
            await future
        except OSError as error:
            return str(error.strerror)
        return "nothing raised"

    task = start(waits())
    future.set_exception(OSError(5, "bad sector"))
    assert await task == "bad sector"


@pytest.mark.parametrize("steps", [0, 1, 2])
async def test_cancellation_lets_the_coroutine_clean_up(steps: int) -> None:
    """Also before the task's first step."""

    future = asyncio.get_running_loop().create_future()
    cleaned = []

    async def waits() -> None:
        try:
            await future
        finally:
            cleaned.append(True)

    task = start(waits())
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned
    assert future.cancelled()


async def test_coroutine_may_refuse_its_cancellation() -> None:
    future = asyncio.get_running_loop().create_future()

    async def stubborn() -> int:
        try:
            await future
        except asyncio.CancelledError:
            await asyncio.sleep(0)
        return 5

    task = start(stubborn())
    task.cancel()
    assert await task == 5


async def test_work_in_a_thread_is_awaited() -> None:
    async def waits() -> int:
        return await asyncio.get_running_loop().run_in_executor(None, int, "11")

    assert await start(waits()) == 11
