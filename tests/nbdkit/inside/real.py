"""Real nbdkits: the one of this system (Debian 12 has 1.32) and the one of the Debian 13 tree."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import nbdfleece
from conformance.programs import Programs
from tests.tree import debian_13

PACKAGE = Path(nbdfleece.__file__).parent
START_SECONDS = 120.0
_numbers = itertools.count()


@dataclass
class Running:
    """An nbdkit in the foreground.

    Attributes:
        uri: Of its socket.
        log: What it has said, in a file.
    """

    uri: str
    log: Path
    process: subprocess.Popen[bytes]

    def stop(self, sig: int = signal.SIGTERM) -> str:
        """End it; what it has said."""
        self.process.send_signal(sig)
        self.process.wait(START_SECONDS)
        return self.log.read_text()


@dataclass
class Nbdkit:
    """One installation of nbdkit with its Python plugin.

    Attributes:
        folder: Where files are that it can see too.
        plugin: Our script, as this nbdkit sees it.
    """

    programs: Programs
    folder: Path
    plugin: Path

    def argv(self, *words: str | Path) -> list[str]:
        return self.programs.argv("nbdkit", *map(str, words))

    def fail(self, *words: str | Path) -> str:
        """Run one that must not start; what it says."""
        done = subprocess.run(
            self.argv("-f", "-U", self.folder / "no.sock", *words),
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
        )
        assert done.returncode != 0
        return done.stderr

    def dump(self, script: Path) -> str:
        """What ``--dump-plugin`` prints."""
        return subprocess.check_output(self.argv("--dump-plugin", "python", script), text=True)

    @contextlib.contextmanager
    def running(self, *words: str | Path) -> Iterator[Running]:
        """Serve; killed at the end if it was not stopped."""
        number = next(_numbers)
        path, log = self.folder / f"n{number}.sock", self.folder / f"n{number}.log"
        with log.open("wb") as output:
            argv = self.argv("-f", "-U", path, *words)
            process = subprocess.Popen(argv, stdout=output, stderr=output)
        try:
            _wait_for(path, process, log)
            yield Running(f"nbd+unix:///?socket={path}", log, process)
        finally:
            process.kill()
            process.wait()


def _wait_for(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(path))
            return
        time.sleep(0.01)
    raise AssertionError(f"no socket after {START_SECONDS} s: {log.read_text()}")


def find_nbdkit(name: str, folder: Path) -> Nbdkit:
    """The ``system``'s nbdkit with our source tree, or the ``tree``'s with a copy of the package.

    The tree's Python has numpy and msgspec, and no backports.zstd: as on Debian 13.
    """
    if name == "system":
        programs = Programs(None, folder)
        package = PACKAGE
    else:
        programs = Programs(debian_13(), folder)
        package = folder / "site" / "nbdfleece"
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    if not programs.has("nbdkit"):
        pytest.skip("nbdkit is not installed")
    found = Nbdkit(programs, folder, package / "nbdkit" / "nbdfleece_plugin.py")
    if not _has_python_plugin(found):
        pytest.skip("nbdkit-plugin-python is not installed")
    return found


def _has_python_plugin(nbdkit: Nbdkit) -> bool:
    argv = nbdkit.argv("--dump-plugin", "python")
    return subprocess.run(argv, capture_output=True).returncode == 0
