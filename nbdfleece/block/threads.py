"""The threads of the block layer: where what may wait for a disk is done (rule 5).

A thread that works on a caller's buffer or file is waited for even when the caller is
cancelled: neither is in use after the call has returned.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

THREADS_MAX: Final = 16
"""Threads of each pool, for all files: as many operations may wait for disks at one time."""

_Result = TypeVar("_Result")

_pool = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="nbdfleece-file")
_flush_pool = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="nbdfleece-flush")


def begin_in_thread(function: Callable[..., _Result], *args: object) -> asyncio.Future[_Result]:
    """Have the block layer's thread pool run a blocking function."""
    return asyncio.get_running_loop().run_in_executor(_pool, function, *args)


def begin_flush(function: Callable[[], _Result]) -> asyncio.Future[_Result]:
    """As :func:`begin_in_thread`, but not behind the cold reads of those who stream (rule 5)."""
    return asyncio.get_running_loop().run_in_executor(_flush_pool, function)


async def in_thread(function: Callable[..., _Result], *args: object) -> _Result:
    """Run a blocking function in the block layer's thread pool and wait for it.

    A cancelled caller waits all the same: the function may be using its buffers.
    """
    return await finished(begin_in_thread(function, *args))


async def in_pool(
    pool: ThreadPoolExecutor, function: Callable[..., _Result], *args: object
) -> _Result:
    """As :func:`in_thread`, in a pool of the caller's."""
    return await finished(asyncio.get_running_loop().run_in_executor(pool, function, *args))


async def to_its_end(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Run ``work`` to its end even if the caller is cancelled meanwhile."""
    return await finished(asyncio.create_task(work))


async def finished(future: asyncio.Future[_Result]) -> _Result:
    """Wait for what has begun, also when cancelled."""
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError:
                continue
        if not future.cancelled():
            future.exception()  # seen, so that asyncio does not report it as lost
        raise
    finally:
        del future  # an error refers to this frame: what it holds must not wait for the collector
