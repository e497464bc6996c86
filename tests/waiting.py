"""Waiting for what happens in a thread or in another process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

SECONDS_MAX = 120


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until something is so."""
    async with asyncio.timeout(SECONDS_MAX):
        while not condition():
            await asyncio.sleep(0.002)
