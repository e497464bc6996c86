"""Where ``async def`` callbacks run: an event loop of the script's own, in a thread of its own.

So one that blocks its loop, or never ends, does not stop the server.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any


class CoroutineThread:
    """An event loop in a thread, started when it is first needed.

    The loop is the same from the first callback to the last, so that what a script keeps in it
    (sessions, locks) stays usable; its thread is stopped for a fork.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine to its end and return its result; called in any thread but ours.

        The context of the caller is the coroutine's.
        """
        return asyncio.run_coroutine_threadsafe(coroutine, self._running_loop()).result()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="nbdkit-coroutines", daemon=True
                )
                self._thread.start()
            return self._loop

    def pause(self) -> None:
        """Stop the thread, with nothing running in it; the next coroutine starts it again."""
        if self._thread is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._thread = None
