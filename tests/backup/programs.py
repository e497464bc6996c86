"""Foreign programs for these tests: disks, servers, QMP."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conformance.programs import Programs

_numbers = itertools.count()


def run(*argv: str | Path) -> str:
    """Run a program to its end; it must succeed."""
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


def qemu_io(target: str | Path, *commands: str, image_format: str = "qcow2") -> None:
    """Carry out qemu-io commands on an image, or on an NBD URI (format ``raw``)."""
    words = [word for command in commands for word in ("-c", command)]
    out = run("qemu-io", "-f", image_format, *words, str(target))
    assert "failed" not in out, out


def content_of(image: Path, image_format: str = "qcow2") -> bytes:
    """What an image reads as, by qemu-img."""
    raw = image.with_name(f"{image.name}.{next(_numbers)}.raw")
    run("qemu-img", "convert", "-U", "-f", image_format, "-O", "raw", image, raw)
    try:
        return raw.read_bytes()
    finally:
        raw.unlink()


def _end(pid: int) -> None:
    """End a daemon and wait until it has; whoever adopted it may reap it later.

    It is told again and again: qemu-nbd may sleep through a signal that comes just when a client
    has left.
    """
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        for _ in range(60):
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                if state == "Z":
                    return
                time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def qemu_nbd(
    image: Path, *options: str, image_format: str = "qcow2", tree: Path | None = None
) -> Iterator[str]:
    """Serve an image, with the program of a Debian tree if one is given; the value is the URI."""
    path = image.parent / f"q{next(_numbers)}.sock"
    pid_file = path.with_suffix(".pid")
    program = Programs(tree, image.parent).argv("qemu-nbd")
    run(
        *program, "-t", "-e", "16", "-f", image_format, "-k", path, "--fork",
        "--pid-file", pid_file, *options, image,
    )  # fmt: skip
    try:
        yield f"nbd+unix:///?socket={path}"
    finally:
        _end(int(pid_file.read_text()))


@contextlib.contextmanager
def nbdkit(folder: Path, *plugin: str) -> Iterator[str]:
    """Serve a plugin; the value is the URI."""
    path = folder / f"k{next(_numbers)}.sock"
    pid_file = path.with_suffix(".pid")
    run("nbdkit", "-U", path, "-P", pid_file, *plugin)
    try:
        yield f"nbd+unix:///?socket={path}"
    finally:
        _end(int(pid_file.read_text()))


class Qmp:
    """A QMP session, one command after another."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(120)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rwb")
        self._file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        message = {"execute": command, "arguments": given}
        self._file.write(json.dumps(message).encode() + b"\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "error" in answer:
                raise AssertionError(f"{command}: {answer['error']}")
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class StorageDaemon:
    """qemu-storage-daemon with one disk, exported live, and what a backup needs over QMP."""

    def __init__(self, qmp: Qmp, socket_path: Path, folder: Path) -> None:
        self.qmp = qmp
        self._socket = socket_path
        self._folder = folder
        self.live = self.uri("live")

    def uri(self, export: str) -> str:
        return f"nbd+unix:///{export}?socket={self._socket}"

    def add_bitmap(self, name: str) -> None:
        """A bitmap that records from now on."""
        self.qmp("block-dirty-bitmap-add", node="disk", name=name, granularity=65536)

    def begin(self, since: str | None, checkpoint: str) -> str:
        """Freeze a view, with what changed since a bitmap began, and begin a new bitmap.

        Nothing writes meanwhile; from then on the live export writes through the filter.

        Returns:
            The URI of the frozen view.
        """
        scratch = self._folder / "scratch.raw"
        scratch.touch()
        os.truncate(scratch, self._size())
        self.qmp("blockdev-add", driver="file", node_name="temp", filename=str(scratch))
        self._remove_export("live")
        self.qmp(
            "blockdev-add", driver="copy-before-write", node_name="cbw", file="disk", target="temp"
        )
        self.qmp("blockdev-add", driver="snapshot-access", node_name="access", file="cbw")
        bitmaps: dict[str, Any] = {}
        if since is not None:
            self.qmp("block-dirty-bitmap-disable", node="disk", name=since)
            bitmaps = {"bitmaps": [{"node": "disk", "name": since}]}
        self.add_bitmap(checkpoint)
        self.add_export("live", "cbw", writable=True)
        self.add_export("snapshot", "access", **bitmaps)
        return self.uri("snapshot")

    def _size(self) -> int:
        nodes = self.qmp("query-named-block-nodes", flat=True)
        found = (node["image"]["virtual-size"] for node in nodes if node["node-name"] == "disk")
        return int(next(found))

    def add_export(self, name: str, node: str, **options: Any) -> None:
        self.qmp("block-export-add", type="nbd", id=name, name=name, node_name=node, **options)

    def _remove_export(self, name: str) -> None:
        self.qmp("block-export-del", id=name, mode="hard")
        while any(export["id"] == name for export in self.qmp("query-block-exports")):
            time.sleep(0.005)  # QEMU removes it when its clients are gone

    def resize(self, size: int) -> None:
        """Give the disk another size; its live export is made anew."""
        self._remove_export("live")
        self.qmp("block_resize", node_name="disk", size=size)
        self.add_export("live", "disk", writable=True)

    def end(self) -> None:
        """End the frozen view."""
        for name in ("snapshot", "live"):
            self._remove_export(name)
        for node in ("access", "cbw", "temp"):
            self.qmp("blockdev-del", node_name=node)
        self.add_export("live", "disk", writable=True)


@contextlib.contextmanager
def storage_daemon(image: Path, tree: Path | None = None) -> Iterator[StorageDaemon]:
    """Serve an image, writable, under the name ``live``; with the program of a Debian tree."""
    folder = image.parent
    control = folder / f"s{next(_numbers)}.qmp"
    nbd = control.with_suffix(".sock")
    pid_file = control.with_suffix(".pid")
    program = Programs(tree, folder).argv("qemu-storage-daemon")
    run(
        *program, "--daemonize", "--pidfile", pid_file,
        "--blockdev", f"driver=file,node-name=file,filename={image}",
        "--blockdev", "driver=qcow2,node-name=disk,file=file",
        "--nbd-server", f"addr.type=unix,addr.path={nbd},max-connections=32",
        "--chardev", f"socket,id=qmp,path={control},server=on,wait=off",
        "--monitor", "chardev=qmp",
    )  # fmt: skip
    qmp = Qmp(control)
    try:
        daemon = StorageDaemon(qmp, nbd, folder)
        daemon.add_export("live", "disk", writable=True)
        yield daemon
    finally:
        qmp.close()
        _end(int(pid_file.read_text()))
