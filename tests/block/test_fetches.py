"""Cold ranges are fetched by threads; a stream has few of them, and what waits goes together."""

from __future__ import annotations

import asyncio
import errno
from itertools import pairwise

import pytest

from nbdfleece.block.fetches import PART_BYTES, RUN_THREADS_MAX, Fetches, Range

KIB, MIB = 1 << 10, 1 << 20
READ = 256 * KIB


class Disk:
    """Threads that work until they are told to end."""

    def __init__(self) -> None:
        self.begun: list[list[Range]] = []
        self.jobs: list[asyncio.Future[None]] = []
        self.fetches = Fetches(self._begin)

    def _begin(self, ranges: list[Range]) -> asyncio.Future[None]:
        self.begun.append(ranges)
        self.jobs.append(asyncio.get_running_loop().create_future())
        return self.jobs[-1]

    async def ask(self, *offsets: int, length: int = READ) -> list[asyncio.Task[None]]:
        """Requests for one range each, all of which wait."""
        tasks = [asyncio.create_task(self.fetches.fetch([(offset, length)])) for offset in offsets]
        await turns()
        return tasks

    async def end(self, index: int, error: OSError | None = None) -> None:
        if error is None:
            self.jobs[index].set_result(None)
        else:
            self.jobs[index].set_exception(error)
        await turns()


async def turns() -> None:
    """As many turns of the loop as a future needs to wake a task that waits behind others."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_ranges_in_no_order_are_fetched_at_once_each_by_itself() -> None:
    disk = Disk()
    offsets = [index * 7 % 64 * 2 * READ for index in range(64)]
    tasks = await disk.ask(*offsets)
    assert disk.begun == [[(offset, READ)] for offset in offsets]
    await disk.end(5)
    assert [task.done() for task in tasks] == [index == 5 for index in range(64)]
    for index in set(range(64)) - {5}:
        await disk.end(index)
    await asyncio.gather(*tasks)
    assert not disk.fetches.runs


async def test_stream_has_few_threads_and_what_waits_for_them_is_fetched_together() -> None:
    """Rule 5: one client's stream does not take all threads of the pool."""
    disk = Disk()
    offsets = range(0, 16 * MIB, READ)
    tasks = await disk.ask(*offsets)
    assert disk.begun == [[(offset, READ)] for offset in offsets[:RUN_THREADS_MAX]]
    await disk.end(1)
    per_part = PART_BYTES // READ
    begin = RUN_THREADS_MAX
    assert disk.begun[begin:] == [[(offset, READ) for offset in offsets[begin : begin + per_part]]]
    assert [task.done() for task in tasks[:4]] == [False, True, False, False]
    await disk.end(begin)
    assert all(task.done() for task in tasks[begin : begin + per_part])
    assert not any(task.done() for task in tasks[begin + per_part :])
    for _ in range(len(offsets)):
        running = [index for index, job in enumerate(disk.jobs) if not job.done()]
        assert len(running) <= RUN_THREADS_MAX
        if not running:
            break
        await disk.end(running[0])
    await asyncio.gather(*tasks)
    fetched = [range_ for ranges in disk.begun for range_ in ranges]
    assert fetched == [(offset, READ) for offset in offsets], "each once, in order"
    assert not disk.fetches.runs


async def test_streams_beside_one_another_have_threads_of_their_own() -> None:
    disk = Disk()
    places = [0, 64 * MIB, 128 * MIB]
    for step in range(2 * RUN_THREADS_MAX):
        await disk.ask(*(place + step * READ for place in places))
    assert len(disk.begun) == len(places) * RUN_THREADS_MAX
    for index in range(len(disk.jobs)):
        await disk.end(index)
    for index in range(len(disk.jobs)):
        if not disk.jobs[index].done():
            await disk.end(index)
    for place in places:
        of_place = [
            offset
            for ranges in disk.begun
            for offset, _ in ranges
            if place <= offset < place + 64 * MIB
        ]
        assert all(b - a == READ for a, b in pairwise(of_place))
        assert len(of_place) == 2 * RUN_THREADS_MAX
    assert not disk.fetches.runs


async def test_two_clients_that_ask_for_the_same_are_both_served() -> None:
    """Two runs end in the same place: whichever ends first takes nothing from the other."""
    for first in (0, 1):
        disk = Disk()
        tasks = await disk.ask(0, 0)
        await disk.end(first)
        tasks += await disk.ask(READ, READ)
        for index in range(len(disk.jobs)):
            if not disk.jobs[index].done():
                await disk.end(index)
        await asyncio.gather(*tasks)
        assert not disk.fetches.runs


async def test_error_is_told_to_those_who_were_fetched_together_and_to_nobody_else() -> None:
    disk = Disk()
    tasks = await disk.ask(*range(0, 6 * MIB, READ))
    for index in range(RUN_THREADS_MAX):
        await disk.end(index)
    await disk.end(RUN_THREADS_MAX, OSError(errno.EIO, "bad block"))
    for index in range(RUN_THREADS_MAX + 1, len(disk.jobs)):
        await disk.end(index)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    bad = [isinstance(result, OSError) for result in results]
    begin, end = RUN_THREADS_MAX, RUN_THREADS_MAX + PART_BYTES // READ
    assert bad == [begin <= index < end for index in range(len(tasks))]
    assert not disk.fetches.runs


@pytest.mark.parametrize("waits_for_a_thread", [False, True])
async def test_cancelled_caller_waits_all_the_same(waits_for_a_thread: bool) -> None:
    """The file that it holds open is being read."""
    disk = Disk()
    count = RUN_THREADS_MAX + 1 if waits_for_a_thread else 1
    tasks = await disk.ask(*range(0, count * READ, READ))
    tasks[-1].cancel()
    await turns()
    assert not tasks[-1].done()
    for _ in range(count):
        for index in range(len(disk.jobs)):
            if not disk.jobs[index].done():
                assert not tasks[-1].done()
                await disk.end(index, OSError(errno.EIO, "seen by nobody, and not reported"))
    await asyncio.wait(tasks, timeout=60)
    assert tasks[-1].cancelled()
    for task in tasks[:-1]:
        assert isinstance(task.exception(), OSError)
