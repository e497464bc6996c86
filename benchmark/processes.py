"""Server processes: starting them, waiting until they listen, ending them by their id."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Final, Self

START_SECONDS: Final = 120.0
STOP_SECONDS: Final = 120.0


class StartError(Exception):
    """A server ended at once or does not listen; the text has its command line and output."""


class Process:
    """A server process, from entering this context to leaving it.

    Args:
        argv: Its command line.
        address: A Unix socket's path or a TCP port of 127.0.0.1, where it will listen.
        log: Where its output goes.
    """

    def __init__(self, argv: list[str], address: Path | int, log: Path) -> None:
        self._argv = argv
        self._address = address
        self._log = log
        self.pid = 0

    def __enter__(self) -> Self:
        if can_connect(self._address):
            raise StartError(f"somebody listens at {self._address} already")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.pid = self._process.pid
        deadline = time.monotonic() + START_SECONDS
        while not can_connect(self._address):
            if time.monotonic() > deadline or self._process.poll() is not None:
                self._stop()
                raise StartError(f"{' '.join(self._argv)}: {self._log.read_text()[-2000:]}")
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def status_bytes(self, name: str) -> int:
        """A line of /proc/PID/status that is in kB, such as VmRSS, in bytes."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        raise KeyError(name)

    def user_and_system_seconds(self) -> tuple[float, float]:
        """The processor time that it and its processes have used, outside and inside the kernel."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        user = system = 0
        for pid in (self.pid, *children):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            user += int(fields[11])
            system += int(fields[12])
        ticks = os.sysconf("SC_CLK_TCK")
        return user / ticks, system / ticks


def can_connect(address: Path | int) -> bool:
    """Whether somebody listens there."""
    family = socket.AF_INET if isinstance(address, int) else socket.AF_UNIX
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(2)
        try:
            probe.connect(("127.0.0.1", address) if isinstance(address, int) else str(address))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
