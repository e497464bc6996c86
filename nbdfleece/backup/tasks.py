"""Running coroutines side by side, within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from types import TracebackType


async def gather(coroutines: Iterable[Coroutine[object, object, None]]) -> None:
    """Run all side by side to their end; then raise the first error, if there was one.

    Unlike a task group this leaves the others alone when one fails: their buffers are in
    use until they are answered.
    """
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


class Budget:
    """An amount of something (bytes, in most cases) that is lent out and given back.

    Who asks first is served first. A loan larger than the whole budget is granted when
    nothing else is lent.
    """

    def __init__(self, amount: int) -> None:
        self._amount = amount
        self._lent = 0
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []

    async def borrow(self, amount: int) -> None:
        """Wait until ``amount`` can be lent."""
        if not self._waiters and self._fits(amount):
            self._lent += amount
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((amount, waiter))
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.give_back(amount)
            else:
                self._waiters.remove((amount, waiter))
            raise

    def give_back(self, amount: int) -> None:
        """Return a loan."""
        self._lent -= amount
        while self._waiters and self._fits(self._waiters[0][0]):
            granted, waiter = self._waiters.pop(0)
            self._lent += granted
            waiter.set_result(None)

    def _fits(self, amount: int) -> bool:
        return self._lent == 0 or self._lent + amount <= self._amount


class Crew:
    """Tasks side by side within a budget of bytes; the first error ends them all.

    Use it with ``async with``: leaving waits for all tasks and raises the first error.
    """

    def __init__(self, bytes_max: int, cost_min: int) -> None:
        self._budget = Budget(bytes_max)
        self._cost_min = cost_min
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: Exception | None = None

    async def start(self, cost: int, work: Callable[[], Coroutine[object, object, None]]) -> None:
        """Wait until ``cost`` bytes fit into the budget, then start ``work`` as a task.

        Raises:
            Exception: That of a task which has failed.
        """
        cost = max(cost, self._cost_min)
        await self._budget.borrow(cost)
        if self._error is not None:
            self._budget.give_back(cost)
            raise self._error
        task = asyncio.create_task(self._do(cost, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _do(self, cost: int, work: Callable[[], Coroutine[object, object, None]]) -> None:
        try:
            await work()
        except Exception as error:
            self._error = self._error or error
        finally:
            self._budget.give_back(cost)

    async def __aenter__(self) -> Crew:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        tasks = list(self._tasks)
        if error is not None:
            for task in tasks:
                task.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=error is not None)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        if error is None and self._error is not None:
            raise self._error
