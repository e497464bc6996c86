"""The event loop turn by turn: until something is so, or how many something long takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

SECONDS_MAX = 60.0


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until something is so."""
    async with asyncio.timeout(SECONDS_MAX):
        while not condition():
            await asyncio.sleep(0)


async def turns_of(work: Coroutine[object, object, object]) -> int:
    """Turns of the event loop from the beginning of some work to its end."""
    task = asyncio.create_task(work)
    turns = 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    await task
    return turns
