"""Calls in threads, and how many of them a thread model lets run at a time.

A :class:`Gate` lets so many calls in, the others wait in the order in which they came. A call
that has begun holds its place until it has really returned: nobody who stops waiting for it
makes room for the next one. So a script that asked to be serialised is, even where a client
has left in the middle.

Threads are made when all others are busy, and are never waited for at the end of the process:
a callback that does not return holds up what its thread model makes wait for it, no more.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Final, TypeVar

from .calls import Call, Client, current

T = TypeVar("T")
Job = Callable[[], Any]

IDLE_THREADS_MAX: Final = 32
"""Threads that are kept for the next call."""


class Threads:
    """Threads for calls; any number of them."""

    def __init__(self) -> None:
        self._idle: list[SimpleQueue[Job]] = []

    def run(self, job: Job) -> None:
        """Run a job, which must not raise, in a thread of its own."""
        try:
            queue = self._idle.pop()
        except IndexError:
            queue = SimpleQueue()
            threading.Thread(
                target=self._work, args=(queue,), name="nbdkit-callback", daemon=True
            ).start()
        queue.put(job)

    def _work(self, queue: SimpleQueue[Job]) -> None:
        is_needed = True
        while is_needed:
            queue.get()()
            is_needed = len(self._idle) < IDLE_THREADS_MAX
            if is_needed:
                self._idle.append(queue)


class Gate:
    """Lets a number of calls run at a time; used inside one event loop.

    Args:
        threads: Where they run.
        width: How many.
    """

    def __init__(self, threads: Threads, width: int) -> None:
        self._threads = threads
        self._free = width
        self._waiting: deque[tuple[asyncio.Future[Any], Client | None, Job]] = deque()
        self._loop = asyncio.get_running_loop()

    async def run(self, client: Client | None, job: Callable[[], T]) -> T:
        """Run a job for a client, and wait for it.

        Raises:
            BaseException: What the job has raised.
            asyncio.CancelledError: Nobody waits any more. The job goes on if it has begun.
        """
        return await self.begin(client, job)

    def begin(self, client: Client | None, job: Callable[[], T]) -> asyncio.Future[T]:
        """Run a job for a client as soon as it may; its result."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._waiting.append((future, client, job))
        self._let_in()
        return future

    def _let_in(self) -> None:
        while self._free and self._waiting:
            future, client, job = self._waiting.popleft()
            if not future.done():
                self._free -= 1
                self._threads.run(self._wrap(future, client, job))

    def _wrap(self, future: asyncio.Future[Any], client: Client | None, job: Job) -> Job:
        def run() -> None:
            current.set(Call(client))
            result, failure = None, None
            try:
                result = job()
            except BaseException as error:
                failure = error
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._end, future, result, failure)

        return run

    def _end(
        self, future: asyncio.Future[Any], result: object, failure: BaseException | None
    ) -> None:
        self._free += 1
        self._let_in()
        if future.done():
            return
        if failure is None:
            future.set_result(result)
        else:
            future.set_exception(failure)
