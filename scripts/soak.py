"""Backup rounds under writers at full speed, with every byte accounted for.

Two writers (one over TCP, one over a Unix socket) share the clusters of a disk. Each round
takes a backup; what its snapshot shows must be an instant that the writers' own records
allow, and what is restored from the backup must be what the snapshot showed to nbdcopy.
Now and then a checkpoint is deleted from the middle, a backup is aborted, or the server is
killed or restarted; what was flushed must still be there, and the next backup must still be
incremental. Any difference ends the run with a message and exit status 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from soak_stamps import BLOCK, Model, view_of
from soak_writer import write

from nbdfleece.control.client import ControlClient

DISK_BYTES = 16 << 20
BLOCKS = DISK_BYTES // BLOCK
WRITERS = 2
POINTS_MAX = 6
SECONDS_MAX = 240.0
"""For any command."""
PROCESSES = 2
"""That read the snapshots, of every other server."""

NBDFLEECE = str(Path(sys.executable).with_name("nbdfleece"))


class CommandError(Exception):
    """A command failed."""


def run(*words: str | Path) -> str:
    """What a command says.

    Raises:
        CommandError: It failed.
    """
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=SECONDS_MAX
    )
    if done.returncode:
        text = f"exit status {done.returncode}: {' '.join(map(str, words))}\n{done.stderr}"
        raise CommandError(text)
    return done.stdout


class Server:
    """``nbdfleece serve`` over one disk.

    Args:
        folder: Where its image, its sockets and its scratch are.
        processes: So many processes of their own read its snapshots.
    """

    def __init__(self, folder: Path, processes: int) -> None:
        self.control = folder / "control"
        listen = ["--listen", f"unix:{folder}/nbd", "--listen", "tcp:127.0.0.1:0"]
        words = ["serve", "--disk", f"vda={folder}/vda.qcow2", *listen, "--json"]
        words += ["--control", str(self.control), "--scratch-dir", str(folder)]
        words += ["--processes", str(processes)]
        self.process = subprocess.Popen([NBDFLEECE, *words], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        ready = self.process.stdout.readline()
        assert ready, "the server did not start"
        self.uris: list[str] = json.loads(ready)["exports"][0]["uris"]

    def execute(self, command: str, **arguments: Any) -> Any:
        """Have the engine do something."""
        with ControlClient(self.control) as client:
            return client.execute(command, arguments)

    def end(self, *, kill: bool) -> None:
        """End it by a signal."""
        if self.process.poll() is None:
            self.process.kill() if kill else self.process.terminate()
        status = self.process.wait(SECONDS_MAX)
        assert kill or status == 0, f"the server ended with status {status}"
        assert self.process.stdout is not None
        self.process.stdout.close()


class Writers:
    """The processes that write, and the model of what they have written."""

    def __init__(self, seed: int) -> None:
        self.model = Model(BLOCKS, WRITERS)
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for index in range(WRITERS):
            ours, theirs = context.Pipe()
            process = context.Process(target=write, args=(theirs, index, WRITERS, BLOCKS, seed))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self.operations = 0

    def _tell(self, *message: str) -> None:
        for pipe in self._pipes:
            pipe.send(message)

    def _receive(self, pipe: Connection) -> Any:
        assert pipe.poll(SECONDS_MAX), "a writer does not answer"
        return pipe.recv()

    def go(self, server: Server) -> None:
        """Connect each by another transport."""
        for pipe, uri in zip(self._pipes, server.uris, strict=True):
            pipe.send(("go", uri))
            assert self._receive(pipe) == "connected"

    def collect(self) -> None:
        """Take the reports that the writers send, asked or because the server went away."""
        for pipe in self._pipes:
            report = self._receive(pipe)
            self.operations += len(report)
            self.model.add(report)

    def report(self) -> None:
        """Have the model know everything up to now."""
        self._tell("report")
        self.collect()

    def pause(self) -> None:
        """Flush everything and hang up."""
        self._tell("pause")
        self.collect()

    def end(self) -> None:
        """End the processes, which write nothing now or have no server any more."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                process.kill()
            process.join(SECONDS_MAX)
            pipe.close()


class Soak:
    """The rounds.

    Args:
        folder: For everything.
        seed: For what is random here and in the writers.
    """

    def __init__(self, folder: Path, seed: int, stack: ExitStack) -> None:
        self.folder = folder
        self.backup = folder / "backup"
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.points: dict[str, str] = {}
        """The digest of what each restore point's snapshot showed, oldest first."""
        self._instant = (0.0, 0.0)
        """Between which times the last snapshot's instant was."""
        run("qemu-img", "create", "-q", "-f", "qcow2", folder / "vda.qcow2", str(DISK_BYTES))
        self.processes = PROCESSES
        self.server = Server(folder, self.processes)
        stack.callback(lambda: self.server.end(kill=True))
        self.writers = Writers(seed)
        stack.callback(self.writers.end)
        self.writers.go(self.server)

    def __str__(self) -> str:
        counts = {**self.counts, "operations": self.writers.operations}
        return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))

    def round(self, number: int) -> None:
        """One backup, and what else chance brings."""
        if self._chance(0.15):
            self.abort(f"a{number}")
        if self._chance(0.1):
            self.restart(kill=False)
        if self._chance(0.2):
            self.interrupt(f"k{number}")
        self.complete(f"p{number}", full=self._chance(0.05))
        if len(self.points) > POINTS_MAX:
            self.delete(self.random.choice(list(self.points)[1:-1]))
        if number % 10 == 9:
            self.check_all()

    def _chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.raw"

    # -- a backup -----------------------------------------------------------------

    def begin(self, name: str, *, full: bool = False) -> tuple[str, str | None]:
        """Begin a backup.

        Returns:
            A URI of its export, and the restore point that it builds on if any.
        """
        parent = None if full or not self.points else next(reversed(self.points))
        since = {} if parent is None else {"since": parent}
        before = time.monotonic()
        begun = self.server.execute("backup-begin", name=name, checkpoint=name, **since)
        after = time.monotonic()
        (disk,) = begun["disks"]
        assert disk.get("reason") is None, f"not incremental: {disk['reason']}"
        self._instant = before, after
        return self.random.choice(disk["uris"]), parent

    def look(self, name: str, uri: str) -> str:
        """Check a snapshot against the writers' records; the digest of what it shows."""
        path = self._path(name)
        run("nbdcopy", uri, path)
        self.writers.report()
        content = path.read_bytes()
        path.unlink()
        self.writers.model.check_instant(view_of(content), *self._instant)
        self.writers.model.settle()
        return hashlib.sha256(content).hexdigest()

    def pull_words(self, name: str, uri: str, parent: str | None) -> list[str]:
        """The command that pulls an export into the backup."""
        mode = ["--full"] if parent is None else ["--since", parent]
        options = ["--to", str(self.backup), "--point", name, "--checkpoint", name]
        return [NBDFLEECE, "pull", f"vda={uri}", *options, *mode]

    def complete(self, name: str, *, full: bool) -> None:
        """A whole backup and its restore."""
        uri, parent = self.begin(name, full=full)
        if self._chance(0.5):
            digest = self.look(name, uri)
            run(*self.pull_words(name, uri, parent))
        else:
            run(*self.pull_words(name, uri, parent))
            digest = self.look(name, uri)
        self.server.execute("backup-commit", name=name)
        self.points[name] = digest
        self.check_point(name)
        self.counts["full backups" if parent is None else "incremental backups"] += 1

    def check_point(self, name: str) -> None:
        """Restore a point; it is what its snapshot showed."""
        path = self._path(f"restored-{name}")
        run(NBDFLEECE, "restore", f"{self.backup}@{name}", "--to", path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        path.unlink()
        assert digest == self.points[name], f"{name} is restored with other bytes"
        self.counts["restores"] += 1

    def check_all(self) -> None:
        """Every restore point that is left."""
        for name in self.points:
            self.check_point(name)

    # -- what comes in between ----------------------------------------------------

    def abort(self, name: str) -> None:
        """A backup that is given up after it was read."""
        uri, _ = self.begin(name)
        self.look(name, uri)
        self.server.execute("backup-abort", name=name)
        self.counts["aborts"] += 1

    def delete(self, name: str) -> None:
        """Delete a checkpoint and its restore point."""
        self.server.execute("checkpoint-delete", name=name)
        self._remove_point(name)
        del self.points[name]
        self.counts["deletions"] += 1

    def interrupt(self, name: str) -> None:
        """Kill the server while a backup is pulled; the backup has not been."""
        uri, parent = self.begin(name)
        words = self.pull_words(name, uri, parent)
        pull = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            pull.wait(self.random.uniform(0, 1.5))
        except subprocess.TimeoutExpired:
            self.counts["cut pulls"] += 1
        self.restart(kill=True)
        status = pull.wait(SECONDS_MAX)
        names = [each["name"] for each in self.server.execute("query-checkpoints")]
        assert name not in names, "a pending checkpoint survived"
        if status == 0:
            self._remove_point(name)

    def _remove_point(self, name: str) -> None:
        """Remove a restore point, and the backup with it if there is no other."""
        if self.points:
            run(NBDFLEECE, "prune", self.backup, "--point", name)
        else:
            shutil.rmtree(self.backup)

    def restart(self, *, kill: bool) -> None:
        """End the server under the writers, and start it; what was flushed is there."""
        self.server.end(kill=kill)
        self.writers.collect()
        image = self.folder / "vda.qcow2"
        if kill:
            self._check_image(image)
        self.processes = PROCESSES - self.processes
        self.server = Server(self.folder, self.processes)
        path = self._path("survivors")
        run("nbdcopy", self.server.uris[0], path)
        self.writers.model.check_survivors(view_of(path.read_bytes()))
        path.unlink()
        self.writers.go(self.server)
        self.counts["kills" if kill else "restarts"] += 1

    def _check_image(self, image: Path) -> None:
        """QEMU finds leaked clusters at most (rule 4)."""
        done = subprocess.run(["qemu-img", "check", "-q", image], capture_output=True, text=True)
        assert done.returncode in (0, 3), done.stdout + done.stderr

    def finish(self) -> None:
        """A clean end; everything that was written is on the disk."""
        self.writers.pause()
        self.server.end(kill=False)
        image, path = self.folder / "vda.qcow2", self._path("end")
        self._check_image(image)
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, path)
        now = time.monotonic()
        self.writers.model.check_instant(view_of(path.read_bytes()), now, now)
        run(NBDFLEECE, "verify", self.backup)
        self.check_all()


def soak(options: argparse.Namespace, stack: ExitStack) -> Soak:
    """All rounds.

    Raises:
        AssertionError, CommandError: Something is not as it must be; in which round is added.
    """
    directory = os.environ.get("TMPDIR", "/var/tmp")
    folder = tempfile.TemporaryDirectory(prefix="soak-", dir=directory)
    rounds = Soak(Path(stack.enter_context(folder)), options.seed, stack)
    for number in range(options.rounds):
        try:
            rounds.round(number)
        except (AssertionError, CommandError) as error:
            error.add_note(f"in round {number} with seed {options.seed}")
            raise
        if number % 10 == 9:
            print(f"soak: {number + 1} rounds: {rounds}", flush=True)
    rounds.finish()
    return rounds


def main() -> None:
    """All rounds, and a line about what they were."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    options = parser.parse_args()
    begun = time.monotonic()
    with ExitStack() as stack:
        try:
            rounds = soak(options, stack)
        except (AssertionError, CommandError) as error:
            sys.exit(
                f"soak: FAILED {' '.join(getattr(error, '__notes__', ['at the end']))}: {error}"
            )
        seconds = time.monotonic() - begun
        print(f"soak: {rounds}; every byte accounted for, in {seconds:.0f} s")


if __name__ == "__main__":
    main()
