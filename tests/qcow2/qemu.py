"""QEMU's programs on images: this system's, or those of a Debian tree."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbd

from conformance.programs import Programs
from nbdfleece.extents import Extents

PIECE = 8 << 20
SECONDS_MAX = 180

_RESULT = re.compile(r"^(?P<done>wrote|discard|read) .*bytes at offset|^.* failed: ", re.MULTILINE)

Rows = list[tuple[int, int]]
"""``(length, value)``, adjacent values differing."""


@dataclass
class View:
    """What QEMU shows of a disk."""

    content: bytes
    depths: Rows
    """Allocation depths."""
    bitmaps: dict[str, Rows]
    """1 where dirty."""


class Qemu:
    """Runs QEMU's programs.

    Args:
        folder: Where the images are; with a tree it must lie under ``/tmp``.
        tree: Root of a Debian tree; None for this system's programs.
    """

    def __init__(self, folder: Path, tree: Path | None = None) -> None:
        self.folder = folder
        self._programs = Programs(tree, folder)

    def run(
        self, program: str, *arguments: object, statuses: Sequence[int] = (0,)
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, which must be one of ``statuses``."""
        argv = self._programs.argv(program, *map(str, arguments))
        done = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS_MAX)
        assert done.returncode in statuses, f"{argv}: {done.stdout}{done.stderr}"
        return done

    def img(self, *arguments: object) -> str:
        """Run qemu-img and return what it prints."""
        return self.run("qemu-img", *arguments).stdout

    def io(self, path: Path, commands: Sequence[str], **options: str) -> list[bool]:
        """Run qemu-io commands; return which of them succeeded.

        Args:
            path: A qcow2 image.
            commands: Each prints one result.
            options: Of the qcow2 node, with ``_`` for ``-``.
        """
        node = f"driver=qcow2,file.driver=file,file.filename={path}"
        node += "".join(f",{key.replace('_', '-')}={value}" for key, value in options.items())
        words = [word for command in commands for word in ("-c", command)]
        done = self.run("qemu-io", "--image-opts", *words, node, statuses=(0, 1))
        found = [bool(match["done"]) for match in _RESULT.finditer(done.stdout)]
        assert len(found) == len(commands), done.stdout + done.stderr
        return found

    def check(self, path: Path) -> dict[str, Any]:
        """The findings of ``qemu-img check``."""
        done = self.run(
            "qemu-img", "check", "--output=json", "-f", "qcow2", path, statuses=(0, 2, 3)
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return {name: value for name, value in found.items() if name not in ("filename", "format")}

    def view(self, path: Path, bitmaps: Sequence[str] = ()) -> View:
        """Read a disk through qemu-nbd."""
        options = [word for name in bitmaps for word in ("-B", name)]
        with self.nbd(path, "-A", *options) as socket:
            client = connect(socket, _contexts(bitmaps))
            size = client.get_size()
            pieces = [
                bytes(client.pread(min(PIECE, size - at), at)) for at in range(0, size, PIECE)
            ]
            depths, *marks = [_rows(client, context) for context in _contexts(bitmaps)]
            client.shutdown()
        return View(b"".join(pieces), depths, dict(zip(bitmaps, marks, strict=True)))

    @contextlib.contextmanager
    def nbd(self, path: Path, *options: str, read_only: bool = True) -> Iterator[Path]:
        """Serve a disk; the value is the path of a socket, which will come."""
        socket = self.folder / "qemu-nbd.sock"
        words = ["-t", "-f", "qcow2", "-k", str(socket), *["-r"] * read_only, *options]
        server = subprocess.Popen(self._programs.argv("qemu-nbd", *words, str(path)))
        try:
            yield socket
        finally:
            server.kill()  # now and then it sleeps through SIGTERM, just when a client has left
            server.wait()
            socket.unlink(missing_ok=True)


def _contexts(bitmaps: Sequence[str]) -> list[str]:
    return ["qemu:allocation-depth", *(f"qemu:dirty-bitmap:{name}" for name in bitmaps)]


def connect(socket: Path, contexts: Sequence[str] = ()) -> nbd.NBD:
    """A client, as soon as there is somebody who listens."""
    deadline = time.monotonic() + SECONDS_MAX
    while True:
        client = nbd.NBD()
        for context in contexts:
            client.add_meta_context(context)
        try:
            client.connect_unix(str(socket))
        except nbd.Error as error:
            is_early = error.errnum in (errno.ENOENT, errno.ECONNREFUSED)
            if not is_early or time.monotonic() > deadline:
                raise
            time.sleep(0.002)
        else:
            return client


def _rows(client: nbd.NBD, context: str) -> Rows:
    """The whole disk's statuses in a context."""
    size = client.get_size()
    rows: Rows = []
    offset = 0

    def note(name: str, _offset: int, words: list[int], _error: object) -> int:
        if name == context:
            rows.extend(zip(words[::2], words[1::2], strict=True))
        return 0

    while offset < size:
        client.block_status(size - offset, offset, note)
        offset = sum(length for length, _ in rows)
    return Extents.from_pairs(rows).pairs()
