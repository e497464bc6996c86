"""Clients of the benchmark: how long they take is measured, and not when somebody looked."""

from __future__ import annotations

import subprocess
import time

import pytest

from benchmark import clients


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
