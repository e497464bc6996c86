"""The real executable, and a server that it runs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SIZE = 16 << 20
SECONDS_MAX = 120.0
PROGRAM = [str(Path(sys.executable).with_name("nbdfleece"))]


def make_image(path: Path, size: int = SIZE) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size)], check=True)
    return path


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "XDG_RUNTIME_DIR": str(folder), "TZ": "UTC"}


@dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    status: int
    output: str
    errors: str

    @property
    def json(self) -> Any:
        assert (self.status, self.errors) == (0, "")
        return json.loads(self.output)

    @property
    def complaint(self) -> str:
        """The one line of an error."""
        lines = self.errors.splitlines()
        assert len(lines) == 1, self.errors
        assert lines[0].startswith("nbdfleece: error: ")
        return lines[0].removeprefix("nbdfleece: error: ")


Run = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the executable to its end."""

    def call(*words: str | Path) -> Outcome:
        done = subprocess.run(
            [*PROGRAM, *map(str, words)],
            capture_output=True,
            text=True,
            timeout=SECONDS_MAX,
            env=environment(tmp_path),
            cwd=tmp_path,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return call


class Server:
    """A running ``nbdfleece serve``; ``ready`` is its first line."""

    def __init__(self, folder: Path, *words: str | Path) -> None:
        self.process = subprocess.Popen(
            [*PROGRAM, "serve", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(folder),
            cwd=folder,
        )
        assert self.process.stdout is not None
        self.ready = self.process.stdout.readline()

    def end(self, number: int = signal.SIGTERM) -> Outcome:
        """Have it end, if it still runs, and collect what it said."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        output, errors = self.process.communicate(timeout=SECONDS_MAX)
        return Outcome(self.process.returncode, self.ready + output, errors)


Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start servers that end with the test at the latest."""
    with contextlib.ExitStack() as stack:

        def call(*words: str | Path) -> Server:
            server = Server(tmp_path, *words)
            stack.callback(server.end)
            return server

        yield call


@pytest.fixture
def server(tmp_path: Path, start: Start) -> Server:
    """A server of two disks at the usual places."""
    for name in ("vda", "vdb"):
        make_image(tmp_path / f"{name}.qcow2")
    return start("--disk", "vda=vda.qcow2", "--disk", "vdb=vdb.qcow2", "--scratch-dir", tmp_path)
