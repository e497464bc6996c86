"""Every asynchronous test here runs on asyncio's loop in debug mode and on uvloop."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import uvloop

from tests.loop_turns import until

from .harness import Serve, Served


def debug_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_debug(True)
    return loop


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": debug_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="package", autouse=True)
def frozen() -> Iterator[None]:
    """What all tests share need not be looked through for garbage after each of them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest_asyncio.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """Starts servers; at the end each is shut down, and nothing of it may be left."""
    gc.collect()
    descriptors = set(os.listdir("/proc/self/fd"))
    served: list[Served] = []
    yield Serve(tmp_path, served)
    for entry in served:
        await entry.close()
        assert not entry.server.connections
        assert entry.server.pool.taken_bytes == 0
        assert all(export.connections == 0 for export in entry.server.exports)
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
    gc.collect()
    left = {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in set(os.listdir("/proc/self/fd")) - descriptors
        if os.path.islink(f"/proc/self/fd/{fd}")
    }
    assert not {name for name in left if name.startswith("socket:")}
