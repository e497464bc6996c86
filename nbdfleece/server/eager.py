"""Starting a coroutine without a task, and going on in one only if it waits.

A task and a future per request would cost more than a cached read of 4 KiB.
Most requests never wait (:mod:`nbdfleece.block.node`), so :func:`start` runs the
coroutine at once, in the caller's own stack frame:

* it finishes: its result is returned, and the event loop never heard of it;
* it waits for a future: that future was already yielded to us, outside any
  task. A task is made that runs :class:`_Continuation`, which first yields the
  same future once more, now to the task, and then is the coroutine itself.

Between the two moments the future may be done; a task that is given a done
future goes on in the next turn of the loop, so nothing is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


def start(coroutine: Coroutine[Any, Any, T]) -> T | asyncio.Task[T]:
    """Run a coroutine until it ends or waits.

    Args:
        coroutine: Not started yet; its result is not itself a task. Until its first wait it
            runs outside any task: ``asyncio.current_task()`` is the caller's, or None.

    Returns:
        The result if the coroutine never waited, else the task that runs the rest of it.
        The caller keeps a reference to the task.

    Raises:
        BaseException: What the coroutine raised before it waited.
    """
    try:
        pending = coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    if asyncio.isfuture(pending):
        # What a task does with a future that is yielded to it; others may await it too.
        pending._asyncio_future_blocking = False
    return asyncio.get_running_loop().create_task(_Continuation(coroutine, pending))


class _Continuation(Coroutine[Any, Any, T]):
    """The rest of a coroutine that has already yielded a future to nobody.

    It is a class and not a generator, because a task that is cancelled before its first
    step throws into what it runs: a generator that never started would end there and
    leave the coroutine inside it hanging at its ``await``, with locks held.
    """

    __slots__ = ("_coroutine", "_pending")

    def __init__(self, coroutine: Coroutine[Any, Any, T], pending: Any) -> None:
        self._coroutine = coroutine
        self._pending: tuple[Any] | None = (pending,)

    def send(self, value: Any) -> Any:
        """Yield the future that was pending, then whatever the coroutine yields."""
        if self._pending is None:
            return self._coroutine.send(value)
        (pending,) = self._pending
        self._pending = None
        if asyncio.isfuture(pending):
            # What ``await`` does to a future; a task refuses one that was not awaited.
            pending._asyncio_future_blocking = True
        return pending

    def throw(
        self,
        typ: type[BaseException] | BaseException,
        val: BaseException | object = None,
        tb: TracebackType | None = None,
    ) -> Any:
        """Throw into the coroutine; a cancellation before the first step cancels its future."""
        if self._pending is not None:
            (pending,) = self._pending
            self._pending = None
            if asyncio.isfuture(pending):
                pending.cancel()
        error = typ if isinstance(typ, BaseException) else typ()
        return self._coroutine.throw(error)

    def close(self) -> None:
        """Close the coroutine."""
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, T]:
        raise TypeError("a continuation is run by its task only")
