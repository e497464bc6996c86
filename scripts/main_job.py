"""The main job on a real disk image with real clients, shown step by step.

A disk with an ext4 file system is served, backed up in full, changed through its
live export by foreign clients, backed up incrementally while it is being written
to, restored through a write-enabled export, and compared with what it was.
Any difference ends the run with a message and exit status 1.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DISK_BYTES = 2 << 30
FILES_BYTES_MAX = 200 << 20
BLOCK_BYTES = 64 << 10
CHUNK_BYTES = 4 << 20
SECONDS_MAX = 240
NBDFLEECE = str(Path(sys.executable).with_name("nbdfleece"))


def step(text: str) -> None:
    """Say what comes next."""
    print(f"\n\033[1m== {text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def fail(text: str) -> None:
    """End the run: something is not as it must be."""
    sys.exit(f"quickstart: FAILED: {text}")


def run(*command: str | Path, quiet: bool = False) -> str:
    """Run a command, showing it; its failure ends the run."""
    words = [str(word) for word in command]
    if not quiet:
        print(f"$ {shlex.join([Path(words[0]).name, *words[1:]])}", flush=True)
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        fail(f"exit status {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def show(*command: str | Path) -> str:
    """Run a command, showing it and what it says."""
    output = run(*command)
    print(output.rstrip())
    return output


def in_json(*command: str | Path) -> Any:
    """Run a command that answers in JSON."""
    return json.loads(run(*command))


class Job:
    """The files, sockets and commands of one run, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk = folder / "vda.qcow2"
        self.restored = folder / "restored.qcow2"
        self.nbd = folder / "nbd.sock"
        self.control = folder / "control.sock"
        self.backups = folder / "backups"
        self.monday = folder / "monday.raw"
        self.tuesday = folder / "tuesday.raw"

    def uri(self, export: str) -> str:
        """The NBD URI of an export."""
        return f"nbd+unix:///{export}?socket={self.nbd}"

    def control_command(self, *words: str) -> str:
        """Drive the running server, showing what it says."""
        return show(NBDFLEECE, *words, "--control", self.control)


def make_file_system(job: Job) -> None:
    """An ext4 file system of 2 GiB with files of this machine's /usr/share."""
    staged = job.folder / "files"
    staged.mkdir()
    budget = FILES_BYTES_MAX
    for entry in sorted(Path("/usr/share").iterdir()):
        size = int(run("du", "-sb", entry, quiet=True).split()[0])
        if size < budget // 2:
            run("cp", "-a", entry, staged, quiet=True)
            budget -= size
    run("mke2fs", "-q", "-t", "ext4", "-d", staged, job.monday, str(DISK_BYTES >> 10) + "k")
    shutil.rmtree(staged)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", job.monday, job.disk)


def make_second_state(job: Job) -> None:
    """A copy of the file system with files removed and added by debugfs."""
    run("cp", "--sparse=always", job.monday, job.tuesday)
    new = job.folder / "new-file"
    new.write_bytes(os.urandom(8 << 20))
    script = job.folder / "changes"
    removed = run("debugfs", "-R", "ls -p /", job.monday, quiet=True).splitlines()
    names = [line.split("/")[5] for line in removed if line.count("/") > 5]
    folder = next(name for name in names if name not in {".", "..", "lost+found", ""})
    script.write_text(f"mkdir /changed\nwrite {new} /changed/new-file\nmkdir /{folder}/more\n")
    run("debugfs", "-w", "-f", script, job.tuesday)
    run("e2fsck", "-fn", job.tuesday)


def differing_ranges(first: Path, second: Path) -> Iterator[tuple[int, int]]:
    """``(offset, length)`` of the runs of blocks in which two files differ."""
    begin = None
    with first.open("rb") as one, second.open("rb") as other:
        for offset in range(0, DISK_BYTES + CHUNK_BYTES, CHUNK_BYTES):
            chunk, changed = one.read(CHUNK_BYTES), other.read(CHUNK_BYTES)
            for within in range(0, CHUNK_BYTES, CHUNK_BYTES if chunk == changed else BLOCK_BYTES):
                end = within + BLOCK_BYTES
                differs = chunk != changed and chunk[within:end] != changed[within:end]
                if differs and begin is None:
                    begin = offset + within
                elif not differs and begin is not None:
                    yield begin, offset + within - begin
                    begin = None


def write_differences(job: Job) -> int:
    """Bring the live disk from the first to the second state with qemu-io; bytes written."""
    commands, total = [], 0
    part = job.folder / "part"
    with job.tuesday.open("rb") as source:
        for number, (offset, length) in enumerate(differing_ranges(job.monday, job.tuesday)):
            source.seek(offset)
            piece = part.with_suffix(f".{number}")
            piece.write_bytes(source.read(length))
            commands += ["-c", f"write -q -s {piece} {offset} {length}"]
            total += length
    print(f"$ qemu-io -f raw {job.uri('vda')} -c 'write ...'   # {len(commands) // 2} writes")
    run("qemu-io", "-f", "raw", *commands, "-c", "flush", job.uri("vda"), quiet=True)
    return total


@contextmanager
def serving(job: Job, *disks: str) -> Iterator[subprocess.Popen[str]]:
    """A server in the background, until the block ends; its clean end is checked."""
    listeners = ["--listen", f"unix:{job.nbd}", "--listen", "tcp:127.0.0.1:0"]
    words = [NBDFLEECE, "serve", *disks, *listeners, "--control", str(job.control)]
    print(f"$ {shlex.join(['nbdfleece', *words[1:]])} &")
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        ready = server.stdout.readline()
        if not ready:
            fail("the server did not start")
        print(ready.rstrip())
        yield server
        server.send_signal(signal.SIGTERM)
        if server.wait(SECONDS_MAX):
            fail(f"the server ended with status {server.returncode}")
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


@contextmanager
def writing_on(job: Job) -> Iterator[list[int]]:
    """A foreign writer on the live disk in the background; yields the number of its rounds.

    It has begun by then: however busy the machine is, something is written meanwhile.
    """
    rounds, begun, stop = [0], threading.Event(), threading.Event()

    def write() -> None:
        while not stop.is_set():
            offset = (rounds[0] * 37 % 32000) * BLOCK_BYTES
            word = f"write -q -P {rounds[0] % 255 + 1} {offset} {BLOCK_BYTES}"
            run("qemu-io", "-f", "raw", "-c", word, job.uri("vda"), quiet=True)
            rounds[0] += 1
            begun.set()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        if not begun.wait(SECONDS_MAX):
            fail("the writer has written nothing")
        yield rounds
    finally:
        stop.set()
        writer.join(SECONDS_MAX)


def pull(job: Job, backup: str, point: str, *options: str) -> dict[str, Any]:
    """Pull a backup's export into the backup directory."""
    uri = "vda=" + job.uri(f"{backup}/vda")
    words = ("pull", uri, "--to", job.backups, "--point", point, "--checkpoint", point)
    report = in_json(NBDFLEECE, *words, *options, "--json")
    return dict(report)


def back_up_in_full(job: Job) -> dict[str, Any]:
    """Checkpoint monday: begin, pull everything, commit."""
    job.control_command("backup", "begin", "full", "--checkpoint", "monday")
    report = pull(job, "full", "monday", "--full")
    job.control_command("backup", "commit", "full")
    return report


def back_up_what_changed(job: Job) -> tuple[dict[str, Any], int]:
    """Checkpoint tuesday: begin, pull what changed while the disk is written to, commit."""
    job.control_command(
        "backup", "begin", "incremental", "--checkpoint", "tuesday", "--since", "monday"
    )
    with writing_on(job) as rounds:
        uri = job.uri("incremental/vda")
        show("nbdinfo", "--map=qemu:dirty-bitmap:monday", "--totals", uri)
        report = pull(job, "incremental", "tuesday", "--since", "monday")
    job.control_command("backup", "commit", "incremental")
    return report, rounds[0]


def compare_with_tuesday(job: Job) -> None:
    """The backup and the restored disk are what the disk was at the instant of tuesday."""
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", job.tuesday, job.restored)
    run("qemu-img", "check", job.restored)
    raw = job.folder / "restored.raw"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", job.restored, raw)
    if subprocess.run(["cmp", job.tuesday, raw], check=False).returncode:
        fail("the restored disk is not what the disk was")
    show("e2fsck", "-fn", raw)
    raw.unlink()


def restore(job: Job) -> None:
    """Write the newest restore point to a new disk through its write-enabled export."""
    run("qemu-img", "create", "-f", "qcow2", job.restored, str(DISK_BYTES))
    with serving(job, "--disk", f"new={job.restored}"):
        run(NBDFLEECE, "restore", job.backups, "--to", job.uri("new"))


def check_stopped_disk(job: Job) -> None:
    """QEMU finds the image sound, lists its bitmaps, and serves them."""
    show("qemu-img", "check", job.disk)
    info = in_json("qemu-img", "info", "--output=json", job.disk)
    bitmaps = info["format-specific"]["data"]["bitmaps"]
    flags = {bitmap["name"]: bitmap["flags"] for bitmap in bitmaps}
    print(f"bitmaps: {flags}")
    if flags != {"monday": [], "tuesday": ["auto"]}:
        fail(f"qemu-img lists other bitmaps: {flags}")
    serve = ["qemu-nbd", "-r", "-f", "qcow2", "-B", "monday", str(job.disk)]
    show("nbdinfo", "--map=qemu:dirty-bitmap:monday", "--totals", "--", "[", *serve, "]")


def tell(full: dict[str, Any], increment: dict[str, Any], rounds: int) -> None:
    """A short table of what was moved."""

    def mib(count: int) -> str:
        return f"{count / 2**20:8.1f} MiB"

    rows = [("full, monday", full), ("incremental, tuesday", increment)]
    print(f"\n{'backup':22} {'pulled':>12} {'of':>12}")
    for name, report in rows:
        disk = report["disks"][0]
        print(f"{name:22} {mib(disk['data-bytes']):>12} {mib(disk['size']):>12}")
    print(
        f"\nWritten to the disk {rounds} times while the snapshot stood; restored disk identical."
    )


def main() -> None:
    """Run the whole job in a temporary folder."""
    with tempfile.TemporaryDirectory(
        prefix="nbdfleece-", dir=os.environ.get("TMPDIR", "/var/tmp")
    ) as name:
        job = Job(Path(name))
        step("A disk with a real file system")
        make_file_system(job)
        make_second_state(job)
        with serving(job, "--disk", f"vda={job.disk}", "--scratch-dir", name):
            show("nbdinfo", job.uri("vda"))
            step("Monday: a full backup")
            full = back_up_in_full(job)
            step("The guest changes its disk")
            print(f"{write_differences(job)} bytes written")
            step("Tuesday: only what changed, while the guest writes on")
            increment, rounds = back_up_what_changed(job)
            job.control_command("checkpoint", "list")
        step("The stopped disk, in QEMU's eyes")
        check_stopped_disk(job)
        step("Restore to a new disk, through a write-enabled export")
        show(NBDFLEECE, "list", job.backups)
        run(NBDFLEECE, "verify", job.backups)
        restore(job)
        compare_with_tuesday(job)
        tell(full, increment, rounds)


if __name__ == "__main__":
    main()
