"""Clients of the benchmark: how long they take is measured, and not when somebody looked."""

from __future__ import annotations

import subprocess
import time

import pytest

from benchmark import clients
from benchmark.images import Images
from nbdfleece.testing import LiveServer


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
        writer = clients.RatedFio(
            images.place, server.uri, "randwrite", size=1 << 20, iodepth=1, number_ios=200,
            norandommap=1, thinktime=100_000, thinktime_blocks=50,
        )  # fmt: skip
        assert writer.finish()["total_ios"] == 200
        end = time.time()
    assert writer.rate(begin - 1, end + 1) * (end - begin + 2) == pytest.approx(200)
    assert writer.rate(begin - 2, begin - 1) == 0
    assert not list(images.place.memory.glob("*.log"))
