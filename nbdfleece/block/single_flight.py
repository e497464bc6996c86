"""One task's worth of work per key, whoever asks for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class SingleFlight:
    """Runs a job for a key unless one runs already, which is then waited for.

    Those who waited look at the state again and ask again if it is not what they need:
    a job that failed fails only the caller that ran it.
    """

    def __init__(self) -> None:
        self._running: dict[int, asyncio.Future[None]] = {}

    async def run(self, key: int, job: Callable[[], Awaitable[None]]) -> None:
        """Run ``job`` or wait for the end of the one that runs for ``key``."""
        running = self._running.get(key)
        if running is not None:
            await asyncio.shield(running)
            return
        done = self._running[key] = asyncio.get_running_loop().create_future()
        try:
            await job()
        finally:
            del self._running[key]
            done.set_result(None)
