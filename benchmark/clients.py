"""Foreign load generators, and what they measured."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

from .place import Place

CLIENT_SECONDS: Final = 300
"""No run of a client takes longer unless something hangs."""

SETTLE_SECONDS: Final = 0.3
"""From fio's word that it begins to its first requests."""

OPERATIONS_MIN: Final = 500
"""What a percentile of a part of fio's run takes: of so many, five are above p99.

Beside a cold stream of 1 GiB there are thousands, but as few as 900 under a profiler.
"""


class WrongContent(Exception):
    """A server's data are not what was put into the image."""


class TooFewOperations(Exception):
    """So few that a percentile of them would say little."""


def timed(argv: list[str], seconds_max: float = CLIENT_SECONDS) -> float:
    """Seconds that a program runs; it must succeed, and is killed if it takes too long.

    Raises:
        subprocess.CalledProcessError: It failed, or was killed.
    """
    begin = time.perf_counter()
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process:
        watchdog = threading.Timer(seconds_max, process.kill)
        watchdog.start()
        try:
            status = process.wait()  # with a time limit it would look every 50 ms only
            seconds = time.perf_counter() - begin
        finally:
            watchdog.cancel()
    if status:
        raise subprocess.CalledProcessError(status, argv)
    return seconds


def pull(uri: str, *options: str) -> float:
    """Seconds that nbdcopy takes to read all of an export and throw it away."""
    return timed(["nbdcopy", *options, uri, "null:"])


def check_content(place: Place, uri: str, expected: str) -> None:
    """Pull all of an export into a file with nbdcopy and look at the file's SHA-256.

    Raises:
        WrongContent: It is another one.
    """
    path = place.path(".pull")
    try:
        timed(["nbdcopy", uri, str(path)])
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    finally:
        path.unlink(missing_ok=True)
    if found != expected:
        raise WrongContent(f"{uri}: SHA-256 {found}, expected {expected}")


class Fio:
    """One run of fio's nbd engine, from making this to :meth:`finish`.

    Args:
        place: Where its output goes.
        uri: The export.
        workload: fio's ``rw``: randread, randwrite, write, ...
        options: More of fio's options, underscores for hyphens as fio has them.
    """

    def __init__(self, place: Place, uri: str, workload: str, **options: str | int | float) -> None:
        self._output = place.path(".json")
        self._started = place.path(".run")
        merged: dict[str, str | int | float] = {"bs": "4k", "iodepth": 32, "randseed": 1}
        merged |= options
        argv = ["fio", "--name=v", "--ioengine=nbd", f"--uri={uri}", f"--rw={workload}"]
        argv += [f"--{name}={value}" for name, value in merged.items()]
        argv += ["--output-format=json", f"--output={self._output}"]
        argv.append(f"--exec_prerun=touch {self._started}")
        self._argv = argv
        self._process = subprocess.Popen(
            argv,
            cwd=place.memory,  # fio leaves a file of its own for a prerun command
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def wait_until_running(self) -> None:
        """Wait until it has begun to send requests, or nearly."""
        deadline = time.monotonic() + CLIENT_SECONDS
        while not self._started.exists() and self._process.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError("fio does not begin")
            time.sleep(0.01)
        time.sleep(SETTLE_SECONDS)

    def stop(self) -> None:
        """Let it end early, with its figures."""
        self._process.send_signal(signal.SIGINT)

    def finish(self) -> dict[str, Any]:
        """fio's figures for the direction that the workload has.

        Raises:
            CalledProcessError: It failed.
        """
        _, errors = self._process.communicate(timeout=CLIENT_SECONDS)
        text = self._output.read_text() if self._output.exists() else ""
        self._output.unlink(missing_ok=True)
        self._started.unlink(missing_ok=True)
        begin = text.find("{")
        if self._process.returncode not in (0, 128) or begin < 0:
            raise subprocess.CalledProcessError(
                self._process.returncode, self._argv, text, errors.decode()
            )
        job = json.loads(text[begin:])["jobs"][0]
        if job["error"]:
            raise subprocess.CalledProcessError(job["error"], self._argv, text)
        figures: dict[str, Any] = max(job["read"], job["write"], key=lambda it: it["total_ios"])
        return figures


class LoggedFio(Fio):
    """A run that also says how it went meanwhile, between two moments, in seconds since 1970.

    Operations are logged one by one: fio's means over intervals leave out those without any.
    An operation counts when it ends, which fio says to the millisecond.
    """

    def __init__(self, place: Place, uri: str, workload: str, **options: str | int | float) -> None:
        prefix = place.path("")
        self._log = Path(f"{prefix}_clat.log")
        self._operations: list[tuple[float, float]] = []  # when each ended, and its microseconds
        options |= {"write_lat_log": str(prefix), "per_job_logs": 0, "log_unix_epoch": 1}
        options |= {"disable_slat": 1, "disable_lat": 1}  # they would have logs of their own
        super().__init__(place, uri, workload, **options)

    def finish(self) -> dict[str, Any]:
        """As of :class:`Fio`."""
        try:
            figures = super().finish()
            lines = self._log.read_text().splitlines()
        finally:
            self._log.unlink(missing_ok=True)
        fields = (line.split(",", 2) for line in lines)
        self._operations = [(int(ms) / 1000, int(ns) / 1000) for ms, ns, _ in fields]
        return figures

    def rate(self, begin: float, end: float) -> float:
        """Operations for each second between two moments of the run."""
        return len(self._latencies(begin, end)) / (end - begin)

    def percentile(self, begin: float, end: float, percent: int) -> float:
        """A percentile of completion latency between two moments, in microseconds: nearest rank.

        Raises:
            TooFewOperations: There are fewer than a percentile takes.
        """
        latencies = sorted(self._latencies(begin, end))
        if len(latencies) < OPERATIONS_MIN:
            raise TooFewOperations(
                f"only {len(latencies)} operations of fio in {end - begin:.3f} s, and a percentile"
                f" takes {OPERATIONS_MIN}: the image is too small, or the machine too busy"
            )
        return latencies[math.ceil(len(latencies) * percent / 100) - 1]

    def _latencies(self, begin: float, end: float) -> list[float]:
        return [latency for at, latency in self._operations if begin < at <= end]


def fio(place: Place, uri: str, workload: str, **options: str | int | float) -> dict[str, Any]:
    """Run fio to its end."""
    return Fio(place, uri, workload, **options).finish()


def percentile_microseconds(figures: dict[str, Any], percent: int) -> float:
    """A percentile of fio's completion latency."""
    return float(figures["clat_ns"]["percentile"][f"{percent}.000000"]) / 1000


def map_totals(uri: str, context: str) -> float:
    """Seconds that nbdinfo takes to ask for the whole map of a metadata context."""
    return timed(["nbdinfo", f"--map={context}", "--totals", uri])


def pull_dirty(uri: str, context: str) -> dict[str, Any]:
    """Read what a bitmap says is dirty, by libnbd: what :mod:`.pull_dirty` prints."""
    return _pull_by_libnbd("", uri, context)


def pull_ranges(uri: str, ranges: list[tuple[int, int]]) -> dict[str, Any]:
    """Read ranges, ``(offset, length)``, in the same way."""
    return _pull_by_libnbd(json.dumps(ranges), uri)


def data_extents(uri: str) -> list[tuple[int, int]]:
    """``(offset, length)`` of what nbdinfo says is data, adjacent ones joined."""
    argv = ["nbdinfo", "--map", "--json", uri]
    done = subprocess.run(argv, check=True, capture_output=True, timeout=CLIENT_SECONDS)
    joined: list[tuple[int, int]] = []
    for extent in json.loads(done.stdout):
        offset, length = extent["offset"], extent["length"]
        if extent["type"]:
            continue
        if joined and sum(joined[-1]) == offset:
            joined[-1] = joined[-1][0], joined[-1][1] + length
        else:
            joined.append((offset, length))
    return joined


def _pull_by_libnbd(given: str, *arguments: str) -> dict[str, Any]:
    argv = [sys.executable, str(Path(__file__).with_name("pull_dirty.py")), *arguments]
    done = subprocess.run(
        argv, check=True, capture_output=True, timeout=CLIENT_SECONDS, input=given.encode()
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result
