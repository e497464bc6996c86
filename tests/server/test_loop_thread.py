"""A loop in a thread: results and errors come back, and nothing of it is left at the end."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbdfleece.server.loop_thread import LoopThread


def test_results_and_errors_come_back_to_the_thread_that_asked() -> None:
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        if number == 7:
            raise ValueError("seven")
        return 2 * number

    with LoopThread() as loop, ThreadPoolExecutor(4) as callers:
        assert list(callers.map(lambda number: loop.run(double(number)), range(5))) == [
            0, 2, 4, 6, 8,
        ]  # fmt: skip
        with pytest.raises(ValueError, match="seven"):
            loop.run(double(7))


def test_all_work_is_done_in_one_thread_that_ends_and_can_begin_again() -> None:
    async def here() -> int:
        return threading.get_ident()

    before = set(threading.enumerate())
    loop = LoopThread()
    for _ in range(2):
        with loop:
            found = {loop.run(here()) for _ in range(5)}
            assert len(found) == 1
            assert threading.get_ident() not in found
        assert set(threading.enumerate()) <= before


async def test_threads_of_the_loop_end_with_it() -> None:
    before = set(threading.enumerate())
    with LoopThread() as loop:
        await asyncio.to_thread(loop.run, asyncio.to_thread(int))
    left = set(threading.enumerate()) - before
    assert len(left) <= 1, "only that of this test's own loop is left"
