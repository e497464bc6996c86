"""The real qemu-nbd and what stands in for it, run alike."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.listening import is_listening

SECONDS_MAX = 120.0
MIB = 1 << 20
ENTRY = "import sys; from nbdfleece.cli.qemu_nbd import main; sys.exit(main())"
OURS = [sys.executable, "-c", ENTRY]
NBDSH = [sys.executable, "-m", "nbd"]
"""libnbd's shell; the program nbdsh takes whatever python3 is on the PATH."""
ROOT = Path(__file__).parents[2]


def need(*programs: str) -> pytest.MarkDecorator:
    """Skip where a foreign program is missing; in CI that is a failure."""
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(
        bool(missing) and "CI" not in os.environ, reason=f"not installed: {', '.join(missing)}"
    )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def call(*words: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        env=environment(),
        **more,
    )


def checked(*words: str | Path, **more: Any) -> str:
    done = call(*words, **more)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def uri(socket: Path, export: str = "") -> str:
    return f"nbd+unix:///{export}?socket={socket}"


def wait_gone(pid: int) -> None:
    """Wait until a process that is not our child has ended; one that does not is killed."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not select.select([fd], [], [], SECONDS_MAX)[0]:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"process {pid} did not end")
    finally:
        os.close(fd)


def end_by(pid_file: Path) -> None:
    """End the server that wrote its process id there, if it did."""
    if not pid_file.exists():
        return
    pid = int(pid_file.read_text())
    pid_file.unlink()
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    wait_gone(pid)


@dataclass
class Twin:
    """One of the two programs."""

    command: list[str]
    folder: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def socket(self) -> Path:
        return self.folder / "s"

    def fails(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        done = call(*self.command, *words)
        assert done.returncode == 1, done
        return done

    @contextlib.contextmanager
    def serving(self, *words: str | Path, export: str = "") -> Iterator[str]:
        """Serve in the background as scripts do; gives the URI, and ends the server."""
        pid_file = self.folder / "pid"
        done = call(
            *self.command, "-k", self.socket, "--fork", f"--pid-file={pid_file}", "-t", *words
        )
        try:
            assert done.returncode == 0 or "guessed raw" in done.stderr, done.stderr
            yield uri(self.socket, export)
        finally:
            end_by(pid_file)

    def info(self, *words: str | Path, export: str = "") -> Any:
        """What nbdinfo says of an image that is served with these flags, and of its maps."""
        with self.serving(*words, export=export) as where:
            found = json.loads(checked("nbdinfo", "--json", where))
            contexts = found["exports"][0]["contexts"]
            maps = {
                context: json.loads(checked("nbdinfo", "--json", f"--map={context}", where))
                for context in contexts
            }
        return found, maps


@pytest.fixture
def ours(tmp_path: Path) -> Twin:
    return Twin(OURS, _folder(tmp_path, "ours"))


@pytest.fixture
def theirs(tmp_path: Path) -> Twin:
    return Twin(["qemu-nbd"], _folder(tmp_path, "theirs"))


def _folder(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    return folder


def without_place(found: Any) -> Any:
    """The same without the sockets' names."""
    return json.loads(re.sub(r"(ours|theirs)/s", "s", json.dumps(found)))


def wait_until(path: Path) -> None:
    """Wait until a server listens on a socket; its file is there a moment before that."""
    deadline = time.monotonic() + SECONDS_MAX
    while not is_listening(path):
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.01)
