"""The contestants: each server started in its best configuration for a workload.

What "best" is was found by trying; ``docs/performance.md`` says what each peer gets:

* **qemu-nbd**, **qemu-storage-daemon**: ``cache=writeback`` (the page cache, as ours), with
  ``aio=threads`` and ``aio=io_uring`` as contestants of their own; the storage daemon's export
  in an I/O thread of its own from version 10 on; several connections; ``discard=unmap``.
* **nbdkit**: the file plugin with its default of 16 threads per connection. It cannot read
  qcow2 and serves the same disk as raw bytes: shown, but no peer for a qcow2 row.
* **nbdfleece**: ``nbdfleece serve``; where nobody writes with ``--read-only`` and
  ``--processes 2``, one for each processor, but ``nbdfleece nbd -r`` over TLS and for bitmaps.
  Where a snapshot is pulled beside a guest, it is read by two processes, too, to which the
  server yields (``--processes-nice -10``): both are to be fast.
* **the raw limit**: no server, and no peer: what the kernel and the client allow.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from .place import SYSTEM, Place, make_hole
from .processes import START_SECONDS, Process, free_port
from .qmp import Qmp


class Transport(Enum):
    """How clients reach a server."""

    UNIX = "unix"
    TCP = "tcp"
    TLS = "tls"


@dataclass(frozen=True)
class Setup:
    """What a server is to serve.

    Attributes:
        disks: Images by the names of their exports.
        raw: The same disks as raw files, for a server that cannot read qcow2.
        writable: Clients may write. Each server then gets a copy of its own.
        transport: How clients reach it.
        certificates: For TLS.
        checkpoints: Points in time on the chain: recording bitmaps with QEMU.
        snapshots: Frozen views that stand, exported as ``snap0``, ``snap1``, ...
        is_pulled: The snapshots are read while a guest writes.
        bitmaps: Bitmaps of the image that are exported with it.
        bare: The first disk's raw bytes where the raw limit is shown beside the servers.
    """

    disks: dict[str, Path]
    raw: dict[str, Path] = field(default_factory=dict)
    writable: bool = False
    transport: Transport = Transport.UNIX
    certificates: Path | None = None
    checkpoints: int = 0
    snapshots: int = 0
    is_pulled: bool = False
    bitmaps: tuple[str, ...] = ()
    bare: Path | None = None


class Running:
    """A server that serves a setup."""

    def __init__(self, process: Process, address: Path | int, setup: Setup) -> None:
        self.process = process
        self.setup = setup
        self.address = address
        self.control: Qmp | None = None

    @property
    def qmp(self) -> Qmp:
        """Its control socket."""
        assert self.control is not None
        return self.control

    def uri(self, export: str = "vda") -> str:
        """The URI of an export."""
        if isinstance(self.address, Path):
            return f"nbd+unix:///{export}?socket={self.address}"
        if self.setup.transport is Transport.TLS:
            certificates = self.setup.certificates
            return f"nbds://127.0.0.1:{self.address}/{export}?tls-certificates={certificates}"
        return f"nbd://127.0.0.1:{self.address}/{export}"


class Server(ABC):
    """One kind of server in one configuration.

    Attributes:
        label: Its name in tables.
        is_ours: Not a peer.
        counts: Whether it is a peer of the qcow2 rows, or only shown beside them.
        is_limit: Not a server at all, but what none can do better than.
    """

    is_ours = False
    counts = True
    is_limit = False

    def __init__(self, place: Place, label: str) -> None:
        self.place = place
        self.label = label

    @abstractmethod
    def can(self, setup: Setup) -> bool:
        """Whether it can serve that at all."""

    @abstractmethod
    def _enter(self, setup: Setup, address: Path | int, stack: ExitStack) -> Running:
        """Start it, and set up what the setup asks for."""

    @contextmanager
    def serve(self, setup: Setup) -> Iterator[Running]:
        """A running server, on a socket that no other server has had."""
        is_unix = setup.transport is Transport.UNIX
        address = self.place.path(".s") if is_unix else free_port()
        with ExitStack() as stack:
            if setup.writable:
                setup = self._with_copies(setup, stack)
            yield self._enter(setup, address, stack)

    def _with_copies(self, setup: Setup, stack: ExitStack) -> Setup:
        """The setup with copies of its images, which are given back when the server has gone."""
        copies = {
            name: stack.enter_context(self.place.copies.of(path, self.place))
            for name, path in setup.disks.items()
        }
        return replace(setup, disks=copies)

    def _start(
        self, argv: list[str], address: Path | int, setup: Setup, stack: ExitStack
    ) -> Running:
        log = self.place.path(".log")
        stack.callback(log.unlink, missing_ok=True)
        return Running(stack.enter_context(Process(argv, address, log)), address, setup)

    def _scratch(self, stack: ExitStack, size: int) -> Path:
        """An empty sparse file that goes when the server has gone."""
        path = self.place.path(".tmp")
        stack.callback(path.unlink, missing_ok=True)
        make_hole(path, size)
        return path


PROCESSES = 2
"""Ours for read-only images: one for each processor."""

PULL_NICE = -10
"""Of those that read a snapshot beside a guest, whom the server would let have all it can take."""


class Nbdfleece(Server):
    """Ours, from the checkout."""

    is_ours = True

    def __init__(self, place: Place) -> None:
        super().__init__(place, "nbdfleece")

    def can(self, setup: Setup) -> bool:
        return True

    def _enter(self, setup: Setup, address: Path | int, stack: ExitStack) -> Running:
        if setup.bitmaps or setup.transport is Transport.TLS:
            words = _nbd_words(setup, address)
            return self._start([*_nbdfleece(), "nbd", *words], address, setup, stack)
        control = self.place.path(".c")
        listen = f"unix:{address}" if isinstance(address, Path) else f"tcp:127.0.0.1:{address}"
        argv = [*_nbdfleece(), "serve", "--listen", listen, "--control", str(control)]
        argv += ["--scratch-dir", str(self.place.memory)]
        for name, path in setup.disks.items():
            argv += ["--disk" if setup.writable else "--read-only", f"{name}={path}"]
            argv += [word for bitmap in setup.bitmaps for word in ("--bitmap", f"{name}={bitmap}")]
        if setup.is_pulled or not setup.writable:
            argv += ["--processes", str(PROCESSES)]
        if setup.is_pulled:
            argv += ["--processes-nice", str(PULL_NICE)]
        running = self._start(argv, address, setup, stack)
        running.control = stack.enter_context(Qmp(control))
        for number in range(setup.checkpoints):
            running.qmp.execute("checkpoint-create", name=f"c{number}")
        for number in range(setup.snapshots):
            add_snapshot(running, number)
        return running


def add_snapshot(running: Running, number: int) -> None:
    """Freeze our first disk and export the view as ``snapN``."""
    name = f"snap{number}"
    running.qmp.execute("snapshot-create", name=name)
    disk = next(iter(running.setup.disks))
    running.qmp.execute("snapshot-export-add", snapshot=name, disk=disk, name=name)


def _nbdfleece() -> list[str]:
    return [sys.executable, "-c", "from nbdfleece.cli.main import main; main()"]


def _nbd_words(setup: Setup, address: Path | int) -> list[str]:
    """The arguments that qemu-nbd and ``nbdfleece nbd`` share."""
    ((name, path),) = setup.disks.items()
    words = ["-t", "-e", "64", "-x", name, "-f", "qcow2", "--cache=writeback"]
    if isinstance(address, Path):
        words += ["-k", str(address)]
    else:
        words += ["-b", "127.0.0.1", "-p", str(address)]
    if setup.transport is Transport.TLS:
        creds = f"tls-creds-x509,id=tls0,endpoint=server,dir={setup.certificates},verify-peer=no"
        words += ["--object", creds, "--tls-creds", "tls0"]
    if setup.writable:
        words.append("--discard=unmap")
    else:
        words.append("-r")
    for bitmap in setup.bitmaps:
        words += ["-B", bitmap]
    return [*words, str(path)]


class QemuNbd(Server):
    """qemu-nbd: one disk per process."""

    def __init__(self, place: Place, system: str, aio: str) -> None:
        super().__init__(place, f"qemu-nbd {version(place, system)} {aio}")
        self._system = system
        self._aio = aio

    def can(self, setup: Setup) -> bool:
        return len(setup.disks) == 1 and not setup.checkpoints and not setup.snapshots

    def _enter(self, setup: Setup, address: Path | int, stack: ExitStack) -> Running:
        words = [f"--aio={self._aio}", *_nbd_words(setup, address)]
        argv = self.place.argv(self._system, "qemu-nbd", *words)
        return self._start(argv, address, setup, stack)


class QemuStorageDaemon(Server):
    """qemu-storage-daemon: checkpoints are recording bitmaps, snapshots are filters."""

    def __init__(self, place: Place, system: str, aio: str) -> None:
        super().__init__(place, f"qsd {version(place, system)} {aio}")
        self._system = system
        self._aio = aio
        # 7.2 crashes when a client leaves an export that is in an I/O thread.
        self.has_iothreads = not version(place, system).startswith("7.")

    def can(self, setup: Setup) -> bool:
        return True

    def _enter(self, setup: Setup, address: Path | int, stack: ExitStack) -> Running:
        control = self.place.path(".c")
        words = ["--chardev", f"socket,id=mon,path={control},server=on,wait=off"]
        words += ["--monitor", "chardev=mon"]
        words += [*_nbd_server_words(setup, address)]
        for name, path in setup.disks.items():
            if self.has_iothreads:
                words += ["--object", f"iothread,id=io-{name}"]
            words += ["--blockdev", self._blockdev(name, path, read_only=not setup.writable)]
        argv = self.place.argv(self._system, "qemu-storage-daemon", *words)
        running = self._start(argv, address, setup, stack)
        running.control = stack.enter_context(Qmp(control))
        for name, path in setup.disks.items():
            self._export(running, name, path, stack)
        return running

    def _blockdev(self, name: str, path: Path, *, read_only: bool) -> str:
        file = f"file.driver=file,file.filename={path},file.aio={self._aio}"
        more = "read-only=on" if read_only else "discard=unmap"
        return f"driver=qcow2,node-name=d-{name},{file},{more}"

    def _export(self, running: Running, name: str, path: Path, stack: ExitStack) -> None:
        """Put bitmaps on a disk and filters over it, and export what comes out."""
        setup = running.setup
        for number in range(setup.checkpoints):
            running.qmp.execute(
                "block-dirty-bitmap-add",
                node=f"d-{name}",
                name=f"c{number}",
                granularity=65536,
                persistent=True,
            )
        top = f"d-{name}"
        for number in range(setup.snapshots):
            top = self.add_filter(running, top, number, stack)
        more = {"bitmaps": list(setup.bitmaps)} if setup.bitmaps else {}
        self.export(running, name, top, name, writable=setup.writable, **more)

    def add_filter(self, running: Running, below: str, number: int, stack: ExitStack) -> str:
        """Put one copy-before-write over a node and export its snapshot; returns its name."""
        size = _virtual_size(running, below)
        target = self._scratch(stack, size)
        file = {"driver": "file", "filename": str(target), "aio": self._aio, "discard": "unmap"}
        running.qmp.execute(
            "blockdev-add",
            driver="copy-before-write",
            node_name=f"cbw{number}",
            file=below,
            target={"driver": "raw", "discard": "unmap", "file": file},
        )
        running.qmp.execute(
            "blockdev-add",
            driver="snapshot-access",
            node_name=f"access{number}",
            file=f"cbw{number}",
        )
        disk = next(iter(running.setup.disks))
        self.export(running, f"snap{number}", f"access{number}", disk)
        return f"cbw{number}"

    def export(
        self,
        running: Running,
        name: str,
        node: str,
        disk: str,
        *,
        writable: bool = False,
        **more: Any,
    ) -> None:
        """Export a node over a disk, in the disk's I/O thread."""
        if self.has_iothreads:
            more["iothread"] = f"io-{disk}"
        running.qmp.execute(
            "block-export-add",
            type="nbd",
            id=f"e-{name}",
            node_name=node,
            name=name,
            writable=writable,
            **more,
        )

    def unexport(self, running: Running, name: str) -> None:
        """End an export; it goes in its own time."""
        running.qmp.execute("block-export-del", id=f"e-{name}", mode="hard")
        deadline = time.monotonic() + START_SECONDS
        while any(it["id"] == f"e-{name}" for it in running.qmp.execute("query-block-exports")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"export {name} does not go")
            time.sleep(0.001)


def _virtual_size(running: Running, node: str) -> int:
    for found in running.qmp.execute("query-named-block-nodes", flat=True):
        if found["node-name"] == node:
            return int(found["image"]["virtual-size"])
    raise KeyError(node)


def _nbd_server_words(setup: Setup, address: Path | int) -> list[str]:
    if isinstance(address, Path):
        server = f"addr.type=unix,addr.path={address}"
    else:
        server = f"addr.type=inet,addr.host=127.0.0.1,addr.port={address}"
    if setup.transport is not Transport.TLS:
        return ["--nbd-server", f"{server},max-connections=0"]
    creds = f"tls-creds-x509,id=tls0,endpoint=server,dir={setup.certificates},verify-peer=no"
    return ["--object", creds, "--nbd-server", f"{server},max-connections=0,tls-creds=tls0"]


class Nbdkit(Server):
    """nbdkit's file plugin over the same disk as raw bytes."""

    counts = False

    def __init__(self, place: Place, system: str) -> None:
        super().__init__(place, f"nbdkit {version(place, system, 'nbdkit')} raw")
        self._system = system

    def can(self, setup: Setup) -> bool:
        return len(setup.raw) == 1 and not setup.writable

    def _enter(self, setup: Setup, address: Path | int, stack: ExitStack) -> Running:
        ((name, path),) = setup.raw.items()
        words = ["-f", "-r", "-e", name]
        if isinstance(address, Path):
            words += ["-U", str(address)]
        else:
            words += ["-i", "127.0.0.1", "-p", str(address)]
        if setup.transport is Transport.TLS:
            words += ["--tls=require", f"--tls-certificates={setup.certificates}"]
        argv = self.place.argv(self._system, "nbdkit", *words, "file", str(path))
        return self._start(argv, address, setup, stack)


class RawLimit(Server):
    """A bare sendfile loop over the first disk's raw bytes: see :mod:`.raw_limit`.

    Where the others write and freeze views it only overwrites the raw file that it sends from,
    which no server may do (rule 1): all its exports are that file. There it is shown a second
    time, ``copying``: what it sends was read into memory first.
    """

    counts = False
    is_limit = True

    def __init__(self, place: Place, *, copying: bool = False) -> None:
        super().__init__(place, f"raw limit: {'copies' if copying else 'sendfile'}")
        self._copying = copying

    def can(self, setup: Setup) -> bool:
        return setup.bare is not None and (setup.writable or not self._copying)

    def _with_copies(self, setup: Setup, stack: ExitStack) -> Setup:
        assert setup.bare is not None
        return replace(
            setup, bare=stack.enter_context(self.place.copies.of(setup.bare, self.place))
        )

    def _enter(self, setup: Setup, address: Path | int, stack: ExitStack) -> Running:
        program = str(Path(__file__).with_name("raw_limit.py"))
        argv = [sys.executable, program, str(address), str(setup.bare)]
        argv += ["writable"] * setup.writable + ["copying"] * self._copying
        return self._start(argv, address, setup, stack)


def version(place: Place, system: str, program: str = "qemu-nbd") -> str:
    """A program's version number."""
    argv = place.argv(system, program, "--version")
    text = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=120).stdout
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found.group() if found else "?"


def all_servers(place: Place) -> list[Server]:
    """Ours first, then every peer that is installed, in every configuration."""
    servers: list[Server] = [Nbdfleece(place)]
    for system in (SYSTEM, "tree"):
        for aio in ("threads", "io_uring"):
            if place.has(system, "qemu-nbd"):
                servers.append(QemuNbd(place, system, aio))
            if place.has(system, "qemu-storage-daemon"):
                servers.append(QemuStorageDaemon(place, system, aio))
        if place.has(system, "nbdkit"):
            servers.append(Nbdkit(place, system))
    return [*servers, RawLimit(place), RawLimit(place, copying=True)]
