"""An event loop in a thread of its own, for callers that are not coroutines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

from .loop import loop_factory

T = TypeVar("T")


class LoopThread:
    """Runs from entering this context to leaving it; any thread may call :meth:`run`.

    The loop is uvloop's where that is installed: it hands work over five times as fast.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._loop = loop_factory()()
        self._thread = threading.Thread(target=self._loop.run_forever, name="nbdfleece-loop")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the loop and all threads that it made; the caller has let its work end."""
        assert self._loop is not None, "entered"
        assert self._thread is not None, "entered"
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = self._thread = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and wait for its result."""
        assert self._loop is not None, "entered"
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
