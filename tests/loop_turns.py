"""How often others are served while something long goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine


async def turns_of(work: Coroutine[object, object, object]) -> int:
    """Turns of the event loop from the beginning of some work to its end."""
    task = asyncio.create_task(work)
    turns = 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    await task
    return turns
