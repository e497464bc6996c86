"""Clients of the benchmark: how long they take is measured, and not when somebody looked."""

from __future__ import annotations

import asyncio
import subprocess
import time

import pytest

from benchmark import clients
from benchmark.images import Images
from nbdfleece.testing import LiveServer, MemoryNode


def test_end_of_a_program_is_waited_for_and_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elapsed times were rounded up to the next 50 ms."""

    def sleep(seconds: float) -> None:
        raise AssertionError(f"slept for {seconds} s")

    monkeypatch.setattr(time, "sleep", sleep)
    assert clients.timed(["sleep", "0.1"]) >= 0.1


def test_program_that_fails_is_no_measurement() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        clients.timed(["false"])


def test_program_that_hangs_is_killed() -> None:
    with pytest.raises(subprocess.CalledProcessError, match="SIGKILL"):
        clients.timed(["sleep", "3600"], seconds_max=0.1)


def test_rate_is_that_of_all_the_time_with_its_pauses(images: Images) -> None:
    """The mean of what fio says of intervals with operations was several times as much."""
    with LiveServer(1 << 20) as server:
        begin = time.time()
        writer = clients.LoggedFio(
            images.place, server.uri, "randwrite", size=1 << 20, iodepth=1, number_ios=200,
            norandommap=1, thinktime=100_000, thinktime_blocks=50,
        )  # fmt: skip
        assert writer.finish()["total_ios"] == 200
        end = time.time()
    assert writer.rate(begin - 1, end + 1) * (end - begin + 2) == pytest.approx(200)
    assert writer.rate(begin - 2, begin - 1) == 0
    assert not list(images.place.memory.glob("*.log"))


def test_percentile_is_of_what_ended_between_two_moments(images: Images) -> None:
    """What fio says is of its whole run: here one read that takes longer than all before it."""
    node = MemoryNode(8 << 20)
    begin = time.time()
    reads = 0
    held_at = 0.0

    def pause(operation: str) -> asyncio.Future[None] | None:
        nonlocal reads, held_at
        reads += operation == "read"
        if reads != 1201:
            return None
        held_at = time.time()
        return asyncio.ensure_future(asyncio.sleep(held_at - begin + 0.1))

    node.pause = pause
    with LiveServer(node) as server:
        reader = clients.LoggedFio(
            images.place, server.uri, "randread", size=8 << 20, iodepth=1, number_ios=1300,
            norandommap=1,
        )  # fmt: skip
        figures = reader.finish()
    end = time.time() + 1
    longest = figures["clat_ns"]["max"] / 1000
    assert reader.percentile(begin - 1, end, 100) == longest
    assert reader.percentile(begin - 1, held_at, 100) < longest
    for percent in (50, 99):
        expected = pytest.approx(clients.percentile_microseconds(figures, percent), rel=0.02)
        assert reader.percentile(begin - 1, end, percent) == expected, "fio's are rounded"
    with pytest.raises(clients.TooFewOperations, match="operations of fio in"):
        reader.percentile(held_at, end, 99)
    assert not list(images.place.memory.glob("*.log"))
