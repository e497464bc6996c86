"""A server that hangs is given up; one that is slow is not."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path

import pytest

from nbdfleece.backup import (
    BackupDirectory,
    DiskRequest,
    InterruptedPullError,
    PullOptions,
    ServerError,
    Source,
    offered_bitmaps,
    open_target,
    pull,
)
from nbdfleece.backup.connection import ConnectOptions, connect
from nbdfleece.backup.libnbd import load_libnbd

from .fake_server import BLOCK_STATUS, READ, Script, serving, truthful
from .programs import content_of, nbdkit

SECONDS = 0.3
"""For a handshake that is to be given up."""
PATIENCE_SECONDS = 600
"""For all else: a machine may be busy for a while."""
BLOCK = 65536


class Clock:
    """The event loop's clock, which can be put on: nobody needs to wait for a time limit."""

    def __init__(self, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
        self._loop = loop
        self._hours = 0
        self.time = loop.time
        monkeypatch.setattr(loop, "time", lambda: self.time() + 3600 * self._hours)

    def put_on(self) -> None:
        """An hour goes by."""
        self._hours += 1

    def race(self) -> None:
        """From now on an hour goes by in each 50 ms: also after what is under way has come."""
        self.put_on()
        self._next = self._loop.call_later(0.05, self.race)

    def calm_down(self) -> None:
        """No longer."""
        self._next.cancel()


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(asyncio.get_running_loop(), monkeypatch)


@pytest.fixture
def script() -> Script:
    content = bytearray(b"x" * (64 << 20))
    count = len(content) // BLOCK
    return Script(content, truthful(set(range(count)), set(), len(content), BLOCK))


async def test_handshake_that_hangs_is_given_up(tmp_path: Path, script: Script) -> None:
    script.hangs_at_once = True
    async with serving(script, tmp_path) as uri:
        for work in (
            Source.open(uri, timeout_seconds=SECONDS),
            offered_bitmaps(uri, timeout_seconds=SECONDS),
            open_target(uri, 512, timeout_seconds=SECONDS),
        ):
            with pytest.raises(ServerError, match=r"handshake: .* silent for 0.3 seconds"):
                await work


async def test_bitmaps_of_a_server_that_hangs_are_asked_for_once(
    tmp_path: Path, script: Script
) -> None:
    """The time limit is the user's, not half of what is waited for."""
    script.hangs_at_once = True
    async with serving(script, tmp_path) as uri:
        with pytest.raises(ServerError, match="silent for"):
            await offered_bitmaps(uri, timeout_seconds=SECONDS)
        assert script.connections == 1


async def test_handshake_that_nobody_waits_for_ends(tmp_path: Path, script: Script) -> None:
    script.hangs_at_once = True
    async with serving(script, tmp_path) as uri:
        task = asyncio.create_task(connect(uri, ConnectOptions(timeout_seconds=None)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # Its thread is one of the executor's, which ends only with all of them.
        await asyncio.wait_for(asyncio.get_running_loop().shutdown_default_executor(), 60)


async def test_block_status_that_hangs_is_an_error(
    tmp_path: Path, script: Script, clock: Clock
) -> None:
    def hangs(number: int, kind: int) -> bool:
        if kind == BLOCK_STATUS:
            clock.race()
        return kind == BLOCK_STATUS

    script.hangs = hangs
    async with serving(script, tmp_path) as uri:
        source = await Source.open(uri, timeout_seconds=PATIENCE_SECONDS)
        with pytest.raises(ServerError, match=r"block status of \d+ bytes at 0: .* silent for"):
            await source.extents()
        with pytest.raises(ServerError, match="silent for"):
            await source.read_into(0, memoryview(bytearray(512)))
        await source.close()


async def test_pull_from_a_server_that_hangs_can_go_on(
    tmp_path: Path, script: Script, clock: Clock
) -> None:
    seen = 0

    def hangs(number: int, kind: int) -> bool:
        nonlocal seen
        seen += kind == READ
        if seen == 41:
            clock.race()
        return seen > 40

    script.hangs = hangs
    directory = BackupDirectory(tmp_path / "backup")
    options = PullOptions(timeout_seconds=PATIENCE_SECONDS, journal_seconds=0.001, connections=2)
    async with serving(script, tmp_path) as uri:
        request = DiskRequest(name="vda", uri=uri, identity="view")
        with pytest.raises(InterruptedPullError, match=r"can go on: .*silent for 600 seconds"):
            await pull([request], directory, point="p", options=options)
    clock.calm_down()
    script.hangs = lambda number, kind: False
    script.reads.clear()
    async with serving(script, tmp_path) as uri:
        request = DiskRequest(name="vda", uri=uri, identity="view")
        point = await pull([request], directory, point="p")
    assert sum(length for _, length in script.reads) < len(script.content) + (16 << 22)
    assert content_of(directory.file_path(point.disks[0])) == script.content


async def test_idle_connection_is_not_a_hung_one(
    tmp_path: Path, script: Script, clock: Clock
) -> None:
    """Silence counts only while answers are owed."""
    async with serving(script, tmp_path) as uri:
        connection = await connect(uri, ConnectOptions(timeout_seconds=PATIENCE_SECONDS))
        view = bytearray(512)
        for _ in range(3):
            await connection.read_into(0, memoryview(view))
            assert view == b"x" * 512
            clock.put_on()
            await asyncio.sleep(0.01)  # what is due by now happens
        connection.disconnect()


class Buffer(bytearray):
    """A buffer that can be watched."""


async def test_buffers_are_free_once_they_are_answered_for(tmp_path: Path) -> None:
    """libnbd 1.14 never frees an nbd.Buffer that it was given: a restore held the whole disk."""
    watched = []
    with nbdkit(tmp_path, "memory", "1M") as uri:
        connection = await connect(uri, ConnectOptions())
        for work in (connection.read_into, connection.write):
            buffer = Buffer(65536)
            watched.append(weakref.ref(buffer))
            await work(0, memoryview(buffer))
            del buffer
        gc.collect()
        assert [each() for each in watched] == [None, None]
        connection.disconnect()


async def test_zeroes_are_looked_for_in_buffers_that_are_free_afterwards() -> None:
    buffer = Buffer(65536)
    watched = weakref.ref(buffer)
    assert load_libnbd().Buffer.from_buffer(memoryview(buffer)).is_zero(0, len(buffer))
    del buffer
    gc.collect()
    assert watched() is None
