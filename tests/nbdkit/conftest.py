"""The hosts that run scripts: nbdkit of Debian 12 and of Debian 13, and ours."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from conformance.programs import Programs
from tests.listening import is_listening
from tests.tree import debian_13

from .in_process import Inside

SECONDS_MAX = 120.0
SCRIPTS = Path(__file__).with_name("scripts")
PROGRAM = str(Path(sys.executable).with_name("nbdfleece"))


@dataclass
class Running:
    """A server of a script."""

    process: subprocess.Popen[bytes]
    socket: Path
    log: Path

    def stop(self) -> int:
        """End it in good order; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(SECONDS_MAX)

    @property
    def errors(self) -> str:
        return self.log.read_text()


@dataclass(frozen=True)
class Host:
    """A program that serves scripts; ``debian`` is None for ours."""

    name: str
    debian: int | None = None

    def argv(self, folder: Path, *words: str) -> list[str]:
        """The command line for flags, a script and its parameters."""
        if self.debian is None:
            return [PROGRAM, "plugin", *words]
        tree = debian_13() if self.debian == 13 else None
        flags = [word for word in words if word.startswith("-")]
        rest = [word for word in words if not word.startswith("-")]
        return Programs(tree, folder).argv("nbdkit", "-f", *flags, "python", *rest)

    @contextmanager
    def serve(self, folder: Path, *words: str) -> Iterator[Running]:
        """Run a server on a Unix socket in ``folder``."""
        socket, log = folder / "socket", folder / "errors"
        socket.unlink(missing_ok=True)
        with log.open("wb") as errors:
            process = subprocess.Popen(
                self.argv(folder, f"--unix={socket}", *words),
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                cwd=folder,
            )
        running = Running(process, socket, log)
        try:
            wait_for_socket(running)
            yield running
        finally:
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(SECONDS_MAX)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(SECONDS_MAX)
                raise


def wait_for(condition: Callable[[], bool]) -> None:
    """Look again and again until it is so; of what another process does nobody is told."""
    deadline = time.monotonic() + SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline, f"not so after {SECONDS_MAX} s"
        time.sleep(0.005)


def wait_for_socket(running: Running) -> None:
    def is_there() -> bool:
        assert running.process.poll() is None, f"the server has ended: {running.errors}"
        return is_listening(running.socket)

    wait_for(is_there)


OURS = Host("nbdfleece")
NBDKITS = {"nbdkit-1.32": Host("nbdkit-1.32", 12), "nbdkit-1.42": Host("nbdkit-1.42", 13)}


def need(host: Host, folder: Path) -> None:
    """Skip if the nbdkit that is there has no Python."""
    if host.debian == 13:
        tree = debian_13()
        if not list(tree.glob("usr/lib/*/nbdkit/plugins/nbdkit-python-plugin.so")):
            pytest.skip("the Debian 13 tree has no nbdkit-plugin-python: make it anew")
    elif shutil.which("nbdkit") is None:
        pytest.skip("nbdkit is not installed")
    else:
        probe = [*host.argv(folder, "--dump-plugin")]
        if subprocess.run(probe, capture_output=True).returncode:
            pytest.skip("nbdkit-plugin-python is not installed")


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inside:
    """Serves scripts in this process."""
    return Inside(tmp_path, monkeypatch)
