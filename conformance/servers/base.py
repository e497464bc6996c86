"""What all adapters share: a place to work in, a plan for a configuration, a running server."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

from conformance.case import Export, Server
from conformance.content import DIRTY, Images
from conformance.programs import Programs
from conformance.stream import Endpoint

START_SECONDS = 60.0
STOP_SECONDS = 30.0
GREETING_SECONDS = 10.0
"""A server that says nothing for so long is not there."""
STARTS_MAX = 3
"""A TCP port that was free a moment ago may be another's when the server asks for it."""


class Unsupported(Exception):
    """The server has no such configuration; the text says why."""


class StartError(Exception):
    """The server ended at once, or does not listen; the text has its command line and output."""


@dataclass
class Place:
    """Where a run works: a folder of its own, images, certificates and the programs to use."""

    folder: Path
    images: Images
    certificates: Path
    programs: Programs
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def python(self) -> tuple[str, ...]:
        """Python with libnbd's binding: this one, or the tree's."""
        if self.programs.tree is None:
            return (sys.executable,)
        return tuple(self.programs.argv("python3"))

    def path(self, ending: str) -> Path:
        """A new path in the folder; short, because Unix socket paths must be."""
        return self.folder / f"{next(self._numbers)}{ending}"


@dataclass(frozen=True)
class Plan:
    """A command line and what the server that it starts will have.

    Attributes:
        restart_argv: The command line after a SIGKILL, where it has to be another one.
        then: Command lines that set the started server up.
    """

    argv: list[str]
    endpoint: Endpoint
    exports: tuple[Export, ...]
    tls: str = "off"
    strict_names: bool = True
    pid_file: Path | None = None
    restart_argv: list[str] | None = None
    then: tuple[list[str], ...] = ()


class Adapter(ABC):
    """One kind of server."""

    name: str

    def __init__(self, place: Place) -> None:
        self.place = place

    @abstractmethod
    def version(self) -> str:
        """The server's name and version, as it tells them.

        Raises:
            FileNotFoundError: It is not installed.
        """

    @abstractmethod
    def plan(self, configuration: str) -> Plan:
        """How to start the server.

        Raises:
            Unsupported: It has no such configuration.
        """

    def private_plan(self, configuration: str) -> Plan:
        """How to start one that a case has for itself; it may come without dirty bitmaps."""
        return self.plan(configuration)

    def start(self, configuration: str, *, private: bool = False) -> Running:
        make = self.private_plan if private else self.plan
        for _ in range(STARTS_MAX - 1):
            try:
                return Running(self, configuration, make(configuration))
            except StartError as error:
                if "in use" not in str(error):
                    raise
        return Running(self, configuration, make(configuration))

    def known_export(self, name: str = "ex", **more: object) -> Export:
        """The suite's disk under ``name``, without bitmaps unless told."""
        content = self.place.images.content
        return Export(name, content.size, content=content, **more)  # type: ignore[arg-type] # passed on

    def qemu_export(self, name: str = "ex", **more: object) -> Export:
        """The same with what the qcow2 image has: bitmaps and a backing image."""
        return self.known_export(name, dirty=DIRTY, depth=True, **more)


class Running:
    """A server process with its handle; ends with :meth:`stop`."""

    def __init__(self, adapter: Adapter, configuration: str, plan: Plan) -> None:
        self.plan = plan
        self._log = adapter.place.path(".log")
        self._pid = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.server = Server(
            name=adapter.name,
            configuration=configuration,
            endpoint=plan.endpoint,
            exports=plan.exports,
            tls=plan.tls,
            certificates=adapter.place.certificates,
            strict_names=plan.strict_names,
            process=self,
            python=adapter.place.python,
        )
        self._launch(plan.argv)

    def _launch(self, argv: list[str]) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._pid = self._process.pid
        deadline = time.monotonic() + START_SECONDS
        while not self.greets():
            if time.monotonic() > deadline or not self._starting():
                self.stop()
                raise StartError(f"{' '.join(argv)}: {self.log()}")
            time.sleep(0.02)
        if self.plan.pid_file is not None:
            self._pid = int(self.plan.pid_file.read_text())
        for words in self.plan.then:
            self._set_up(words)

    def _set_up(self, words: list[str]) -> None:
        result = subprocess.run(words, capture_output=True, text=True, timeout=START_SECONDS)
        if result.returncode:
            self.stop()
            raise StartError(f"{' '.join(words)}: {result.stderr.strip()}")

    def _starting(self) -> bool:
        assert self._process is not None
        status = self._process.poll()
        return status is None or (status == 0 and self.plan.pid_file is not None)

    def greets(self) -> bool:
        """Whether it is there for new clients."""
        if self.plan.pid_file is not None and not self.plan.pid_file.exists():
            return False
        endpoint = self.plan.endpoint
        if endpoint.path:
            return _greets(socket.AF_UNIX, endpoint.path)
        return _greets(socket.AF_INET, (endpoint.host, endpoint.port))

    def log(self) -> str:
        """The end of what the server wrote."""
        return self._log.read_text(errors="replace")[-2000:].strip()

    def alive(self) -> bool:
        if self._process is not None and self.plan.pid_file is None:
            return self._process.poll() is None
        return _exists(self._pid)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._signal(signal.SIGKILL)
        self.wait_end()

    def restart(self) -> None:
        """Start it again after it ended."""
        if self.plan.endpoint.path:
            Path(self.plan.endpoint.path).unlink(missing_ok=True)
        if self.plan.pid_file is not None:
            self.plan.pid_file.unlink(missing_ok=True)
        self._launch(self.plan.restart_argv or self.plan.argv)

    def wait_end(self, seconds: float = STOP_SECONDS) -> bool:
        """Whether the server ends within ``seconds``."""
        deadline = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def stop(self) -> None:
        self.terminate()
        if not self.wait_end():
            self.kill()
        if self._process is not None:
            self._process.wait(STOP_SECONDS)

    def _signal(self, number: int) -> None:
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)


def _greets(family: int, address: str | tuple[str, int]) -> bool:
    """Whether a server is there and ready: nbd-server listens long before it accepts."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(GREETING_SECONDS)
        try:
            probe.connect(address)
            return bool(probe.recv(1))
        except OSError:
            return False


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def first_line(*argv: str) -> str:
    """The first line that a program prints about its version."""
    result = subprocess.run(
        argv, capture_output=True, text=True, timeout=START_SECONDS, check=False
    )
    return (result.stdout or result.stderr).strip().partition("\n")[0]
