"""nbdfleece: the one place that knows its command line."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from conformance import case, content
from conformance.case import Export
from conformance.servers.base import Adapter, Plan, first_line, free_port
from conformance.stream import Endpoint

_FIRST, _SECOND = content.FIRST_BITMAP, content.SECOND_BITMAP
_SINCE = {
    _FIRST.name: (*_FIRST.writes, (4 * content.MIB, 4 * content.MIB + content.BLOCK)),
    _SECOND.name: ((4 * content.MIB, 4 * content.MIB + content.BLOCK),),
}
"""What the bitmaps of the snapshot say: those of checkpoints have the clusters' granularity."""


def program() -> str:
    """The ``nbdfleece`` beside this Python, or on the path.

    Raises:
        FileNotFoundError: It is not installed.
    """
    beside = Path(sys.executable).with_name("nbdfleece")
    found = str(beside) if beside.exists() else shutil.which("nbdfleece")
    if found is None:
        raise FileNotFoundError("nbdfleece is not installed")
    return found


class Nbdfleece(Adapter):
    """``serve`` with live disks to write to, and a snapshot's export to read from.

    Disks that fail are damaged qcow2 images, served by ``nbdfleece nbd``.
    """

    name = "nbdfleece"

    def version(self) -> str:
        return first_line(program(), "--version")

    def plan(self, configuration: str) -> Plan:
        make = {
            case.READ_ONLY: self._snapshot_with_bitmaps,
            case.WRITABLE: lambda: self._serve("ex"),
            case.TCP: lambda: self._snapshot(case.TCP),
            case.MANY: lambda: self._serve("ex", "other", "third"),
            case.TLS_FORCED: self._tls_forced,
            case.TLS_SELECTIVE: self._tls_selective,
            case.BAD_SECTOR: lambda: self._damaged(_damage_sector),
            case.BAD_STATUS: lambda: self._damaged(_damage_table),
            case.BLOCK_SIZES: self._block_sizes,
        }[configuration]
        return make()

    def private_plan(self, configuration: str) -> Plan:
        """A snapshot that is quickly made: each command on the way is a process."""
        if configuration == case.READ_ONLY:
            return self._snapshot(case.READ_ONLY)
        return self.plan(configuration)

    def _serve(self, *names: str, configuration: str = case.WRITABLE) -> Plan:
        disks = {
            name: self.place.images.copy("qcow2", self.place.path(".qcow2").name) for name in names
        }
        exports = (self.known_export(name, writable=True, depth=True) for name in names)
        return self._serve_disks(disks, tuple(exports), configuration)

    def _serve_disks(
        self, disks: dict[str, Path], exports: tuple[Export, ...], configuration: str
    ) -> Plan:
        endpoint = self._endpoint(configuration)
        words = ["serve", "--listen", _listen(endpoint), "--control", str(self.place.path(".ctl"))]
        words += [word for name, path in disks.items() for word in ("--disk", f"{name}={path}")]
        return Plan([program(), *words], endpoint, exports)

    def _snapshot(self, configuration: str) -> Plan:
        plan = self._serve("disk", configuration=configuration)
        export = self.known_export(depth=True, description="disk disk as of snapshot still")
        return replace(plan, exports=(export,), then=self._commands(plan))

    def _snapshot_with_bitmaps(self) -> Plan:
        """A checkpoint, the writes of its bitmap, the next checkpoint, its writes, the snapshot."""
        plan = self._snapshot(case.READ_ONLY)
        control = _control(plan)
        then: list[list[str]] = []
        for bitmap in (_FIRST, _SECOND):
            then.append([program(), "checkpoint", "create", f"before {bitmap.name}", *control])
            then += [self._rewrite(plan.endpoint, *written) for written in bitmap.writes]
        since = [word for name in _SINCE for word in ("--since", f"before {name}={name}")]
        (export,) = plan.exports
        return replace(
            plan,
            exports=(replace(export, dirty=_SINCE),),
            then=(*then, *self._commands(plan, *since)),
        )

    def _commands(self, plan: Plan, *words: str) -> tuple[list[str], ...]:
        control = _control(plan)
        return (
            [program(), "snapshot", "create", "still", *control],
            [program(), "export", "add", "still", "disk", "--name", "ex", *words, *control],
        )

    def _rewrite(self, endpoint: Endpoint, start: int, end: int) -> list[str]:
        """Write what is there already."""
        data = self.place.path(".data")
        data.write_bytes(self.place.images.content.read(start, end - start))
        uri = f"nbd+unix:///disk?socket={endpoint.path}"
        return ["qemu-io", "-f", "raw", "-c", f"write -s {data} {start} {end - start}", uri]

    def _tls_forced(self) -> Plan:
        plan = self._snapshot(case.TLS_FORCED)
        words = ["--tls", "require", "--tls-certificates", str(self.place.certificates)]
        return replace(plan, argv=[*plan.argv, *words], tls="forced")

    def _tls_selective(self) -> Plan:
        plan = self._serve("ex", "secret")
        words = ["--tls", "on", "--tls-certificates", str(self.place.certificates)]
        exports = (plan.exports[0], replace(plan.exports[1], tls_only=True))
        argv = [*plan.argv, *words, "--export", "secret:tls-only=on"]
        return replace(plan, argv=argv, exports=exports, tls="selective")

    def _block_sizes(self) -> Plan:
        path = self.place.path(".qcow2")
        words = ["create", "-q", "-f", "qcow2", str(path), str(content.SMALL_DISK_BYTES)]
        subprocess.run(["qemu-img", *words], check=True)
        exports = (Export("ex", size=content.SMALL_DISK_BYTES, writable=True),)
        plan = self._serve_disks({"ex": path}, exports, case.BLOCK_SIZES)
        rule = "ex:minimum-block-size=4k,require-block-size=on"
        return replace(plan, argv=[*plan.argv, "--export", rule])

    def _damaged(self, damage: Callable[[Path], None]) -> Plan:
        image = self.place.images.copy("qcow2", self.place.path(".qcow2").name)
        damage(image)
        path = str(self.place.path(".sock"))
        words = ["nbd", "-t", "-e", "0", "-r", "-x", "ex", "-A", "-k", path, "-f", "qcow2"]
        export = self.known_export(depth=True)
        return Plan([program(), *words, str(image)], Endpoint(path=path), (export,))

    def _endpoint(self, configuration: str) -> Endpoint:
        if configuration == case.TCP:
            return Endpoint(host="127.0.0.1", port=free_port())
        return Endpoint(path=str(self.place.path(".sock")))


def _listen(endpoint: Endpoint) -> str:
    return str(endpoint) if endpoint.path else f"tcp:{endpoint}"


def _control(plan: Plan) -> list[str]:
    return plan.argv[plan.argv.index("--control") :][:2]


def _damage_sector(image: Path) -> None:
    """Compress the cluster of the bad sector, and spoil it: it cannot be decompressed."""
    write = f"write -c -P 5 {content.BAD_SECTOR} {content.BLOCK}"
    discard = f"discard {content.BAD_SECTOR} {content.BLOCK}"
    words = ["qemu-io", "-d", "unmap", "-f", "qcow2", "-c", discard, "-c", write]
    subprocess.run([*words, image], check=True, capture_output=True)
    with image.open("r+b") as file:
        table = _entry(file, _field(file, 40), 0) & 0x00FFFFFFFFFFFE00
        compressed = _entry(file, table, content.BAD_SECTOR // content.BLOCK)
        file.seek(compressed & (1 << 54) - 1)
        file.write(b"\xff" * 64)


def _damage_table(image: Path) -> None:
    """Let the first L2 table lie where none can: what it maps can neither be read nor told."""
    with image.open("r+b") as file:
        place = _field(file, 40)
        entry = _entry(file, place, 0)
        file.seek(place)
        file.write(struct.pack(">Q", entry | 512))


def _field(file: BinaryIO, offset: int) -> int:
    file.seek(offset)
    (value,) = struct.unpack(">Q", file.read(8))
    return int(value)


def _entry(file: BinaryIO, table: int, index: int) -> int:
    return _field(file, table + 8 * index)
