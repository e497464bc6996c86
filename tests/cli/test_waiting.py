"""``--wait`` and ``wait``: what became of a backup or a snapshot, by the exit status."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from .conftest import PROGRAM, SECONDS_MAX, Outcome, Run, Server, Start, environment
from .test_commands import write


class Waiting:
    """A command that waits; what it has said first is ``said``."""

    def __init__(self, folder: Path, *words: str, lines: int = 0) -> None:
        self.process = subprocess.Popen(
            [*PROGRAM, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(folder),
            cwd=folder,
        )
        assert self.process.stdout is not None
        self.said = [self.process.stdout.readline() for _ in range(lines)]

    def end(self) -> Outcome:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        with self.process.stdout, self.process.stderr:
            output, errors = self.process.stdout.read(), self.process.stderr.read()
        status = self.process.wait(SECONDS_MAX)
        return Outcome(status, "".join(self.said) + output, errors)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def begin(stack: ExitStack, folder: Path, *words: str) -> Waiting:
    """A command that begins something, has said so, and waits."""
    waiting = Waiting(folder, *words, lines=2)
    stack.callback(waiting.stop)
    assert waiting.process.poll() is None
    return waiting


@pytest.mark.parametrize(
    ("command", "status", "complaint"),
    [("commit", 0, ""), ("abort", 1, "nbdfleece: error: backup 'b' was aborted\n")],
)
def test_begin_waits_for_the_end_of_its_backup(
    run: Run,
    server: Server,
    tmp_path: Path,
    stack: ExitStack,
    command: str,
    status: int,
    complaint: str,
) -> None:
    waiting = begin(stack, tmp_path, "backup", "begin", "b", "--disk", "vda", "--wait")
    assert run("backup", "begin", "other", "--disk", "vdb").status == 0
    assert run("backup", "commit", "other").status == 0
    assert waiting.process.poll() is None, "another backup's end is of no matter"
    assert run("backup", command, "b").status == 0
    outcome = waiting.end()
    assert (outcome.status, outcome.errors) == (status, complaint)


def test_wait_of_a_full_backup_tells_that_it_was_full(
    run: Run, server: Server, tmp_path: Path, stack: ExitStack
) -> None:
    assert run("checkpoint", "create", "monday", "--disk", "vda").status == 0
    words = ["backup", "begin", "b", "--since", "monday", "--wait"]
    waiting = begin(stack, tmp_path, *words)
    assert run("backup", "commit", "b").status == 0
    assert waiting.end().status == 4


def test_broken_snapshot_ends_the_wait_with_status_5(
    run: Run, start: Start, server: Server, tmp_path: Path, stack: ExitStack
) -> None:
    server.end()
    start("--disk", "vda=vda.qcow2", "--scratch-quota", "64k", "--scratch-dir", str(tmp_path))
    write(tmp_path, "vda", 0, 1 << 20)
    waiting = begin(stack, tmp_path, "backup", "begin", "b", "--wait")
    write(tmp_path, "vda", 0, 1 << 20)
    outcome = waiting.end()
    assert outcome.status == 5
    assert outcome.complaint.startswith("snapshot 'b' of disk 'vda': its old data could not be")
    late = run("backup", "wait", "b")
    assert late.status == 5
    assert late.complaint.startswith("backup 'b': disk 'vda': its old data")


def test_snapshot_waits_for_its_deletion(
    run: Run, server: Server, tmp_path: Path, stack: ExitStack
) -> None:
    waiting = begin(stack, tmp_path, "snapshot", "create", "s", "--json", "--wait")
    assert run("snapshot", "delete", "s").status == 0
    assert waiting.end().json["name"] == "s"


@pytest.mark.parametrize("kind", ["backup", "snapshot"])
def test_wait_for_what_is_not_there_is_refused(run: Run, server: Server, kind: str) -> None:
    outcome = run(kind, "wait", "x")
    assert (outcome.status, outcome.complaint) == (1, f"there is no {kind} 'x'")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_server_that_ends_meanwhile_is_status_75(
    server: Server, tmp_path: Path, stack: ExitStack, number: int
) -> None:
    waiting = begin(stack, tmp_path, "snapshot", "create", "s", "--json", "--wait")
    server.end(number)
    assert waiting.end().status == 75
