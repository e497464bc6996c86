"""qemu-nbd and qemu-storage-daemon."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from conformance import case, content
from conformance.case import Export
from conformance.servers.base import Adapter, Plan, Unsupported, first_line, free_port
from conformance.stream import Endpoint

_BITMAPS = (content.FIRST_BITMAP.name, content.SECOND_BITMAP.name)
_SELECTIVE = "QEMU has no SELECTIVETLS: with credentials TLS is forced"


def _qcow2(path: Path) -> str:
    return f"driver=qcow2,file.driver=file,file.filename={path}"


def _blkdebug(path: Path, *options: str) -> str:
    image = f"image.driver=qcow2,image.file.driver=file,image.file.filename={path}"
    return ",".join(["driver=blkdebug", image, *options])


def _aligned(adapter: Adapter) -> str:
    """An empty disk whose sectors are 4096 bytes."""
    path = adapter.place.path(".raw")
    with path.open("wb") as file:
        file.truncate(content.SMALL_DISK_BYTES)
    image = f"image.driver=raw,image.file.driver=file,image.file.filename={path}"
    return f"driver=blkdebug,{image},align=4096"


def _bad_read() -> str:
    return (
        "inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.errno=5,"
        f"inject-error.0.sector={content.BAD_SECTOR // 512},inject-error.0.once=off"
    )


def _bad_status() -> str:
    return (
        "inject-error.0.event=none,inject-error.0.iotype=block-status,inject-error.0.errno=5,"
        "inject-error.0.once=off"
    )


class QemuNbd(Adapter):
    """One export per process."""

    name = "qemu-nbd"
    _common = ("-t", "-e", "0", "-x", "ex", "-D", "the disk of the suite")

    def version(self) -> str:
        return first_line(*self.place.programs.argv("qemu-nbd", "--version"))

    def plan(self, configuration: str) -> Plan:
        if configuration == case.TLS_SELECTIVE:
            raise Unsupported(_SELECTIVE)
        if configuration == case.MANY:
            raise Unsupported("qemu-nbd has one export")
        make = {
            case.READ_ONLY: self._read_only,
            case.WRITABLE: self._writable,
            case.TCP: self._tcp,
            case.TLS_FORCED: self._tls,
            case.BAD_SECTOR: lambda: self._filtered(_bad_read()),
            case.BAD_STATUS: lambda: self._filtered(_bad_status()),
            case.BLOCK_SIZES: self._block_sizes,
        }[configuration]
        return make()

    def _plan(self, words: list[str], export: Export, **more: str) -> Plan:
        path = self.place.path(".sock")
        argv = self.place.programs.argv("qemu-nbd", *self._common, "-k", str(path), *words)
        return Plan(argv, Endpoint(path=str(path)), (export,), **more)  # type: ignore[arg-type] # tls only

    def _read_only(self) -> Plan:
        words = ["-r", "-f", "qcow2", "-A", *(w for name in _BITMAPS for w in ("-B", name))]
        export = self.qemu_export(description="the disk of the suite")
        return self._plan([*words, str(self.place.images.qcow2)], export)

    def _writable(self) -> Plan:
        path = self.place.images.copy("qcow2", self.place.path(".qcow2").name)
        words = ["-f", "qcow2", "--discard=unmap", "-A", str(path)]
        plan = self._plan(words, self.qemu_export(writable=True))
        # After a SIGKILL QEMU calls the bitmaps inconsistent and refuses to export them.
        return replace(plan, argv=[*plan.argv, "-B", _BITMAPS[0]], restart_argv=plan.argv)

    def _tcp(self) -> Plan:
        port = free_port()
        words = ["-r", "-f", "qcow2", "-b", "127.0.0.1", "-p", str(port)]
        argv = self.place.programs.argv(
            "qemu-nbd", *self._common, *words, str(self.place.images.qcow2)
        )
        return Plan(argv, Endpoint(host="127.0.0.1", port=port), (self.qemu_export(),))

    def _tls(self) -> Plan:
        creds = f"tls-creds-x509,id=tls0,endpoint=server,dir={self.place.certificates}"
        words = ["-r", "-f", "qcow2", "--object", creds, "--tls-creds", "tls0", "-B", _BITMAPS[0]]
        return self._plan([*words, str(self.place.images.qcow2)], self.qemu_export(), tls="forced")

    def _filtered(self, *options: str) -> Plan:
        path = self.place.images.qcow2
        words = ["-r", "-A", "--image-opts", _blkdebug(path, *options)]
        return self._plan(words, self.known_export())

    def _block_sizes(self) -> Plan:
        return self._plan(["--image-opts", _aligned(self)], Export("ex", writable=True))


class QemuStorageDaemon(Adapter):
    """Any number of exports, bitmaps of choice per export."""

    name = "qemu-storage-daemon"

    def version(self) -> str:
        return first_line(*self.place.programs.argv("qemu-storage-daemon", "--version"))

    def plan(self, configuration: str) -> Plan:
        if configuration == case.TLS_SELECTIVE:
            raise Unsupported(_SELECTIVE)
        images = self.place.images
        if configuration == case.BAD_SECTOR:
            return self._plan(_blkdebug(images.qcow2, _bad_read()), (self.known_export(),))
        if configuration == case.BAD_STATUS:
            return self._plan(_blkdebug(images.qcow2, _bad_status()), (self.known_export(),))
        if configuration == case.BLOCK_SIZES:
            return self._plan(_aligned(self), (Export("ex", writable=True),))
        if configuration == case.WRITABLE:
            return self._writable()
        exports: tuple[Export, ...] = (self.qemu_export(),)
        if configuration == case.MANY:
            exports += (self.known_export("other"), self.known_export("third"))
        return self._plan(f"{_qcow2(images.qcow2)},read-only=on", exports, configuration)

    def _writable(self) -> Plan:
        path = self.place.images.copy("qcow2", self.place.path(".qcow2").name)
        node = f"{_qcow2(path)},discard=unmap"
        bare = self._plan(node, (self.known_export(writable=True),))
        full = self._plan(node, (self.qemu_export(writable=True),), endpoint=bare.endpoint)
        return replace(full, restart_argv=bare.argv)

    def _plan(
        self,
        node: str,
        exports: tuple[Export, ...],
        configuration: str = case.READ_ONLY,
        endpoint: Endpoint | None = None,
    ) -> Plan:
        endpoint = endpoint or self._endpoint(configuration)
        tls = configuration == case.TLS_FORCED
        words = ["--blockdev", f"{node},node-name=n0", "--nbd-server"]
        words.append(_address(endpoint) + (",tls-creds=tls0" if tls else ""))
        if tls:
            creds = f"tls-creds-x509,id=tls0,endpoint=server,dir={self.place.certificates}"
            words[:0] = ["--object", creds]
        for number, export in enumerate(exports):
            words += ["--export", _export_option(number, export)]
        argv = self.place.programs.argv("qemu-storage-daemon", *words)
        return Plan(argv, endpoint, exports, tls="forced" if tls else "off")

    def _endpoint(self, configuration: str) -> Endpoint:
        if configuration == case.TCP:
            return Endpoint(host="127.0.0.1", port=free_port())
        return Endpoint(path=str(self.place.path(".sock")))


def _address(endpoint: Endpoint) -> str:
    if endpoint.path:
        return f"addr.type=unix,addr.path={endpoint.path}"
    return f"addr.type=inet,addr.host={endpoint.host},addr.port={endpoint.port}"


def _export_option(number: int, export: Export) -> str:
    words = [f"nbd,id=e{number},node-name=n0,name={export.name}"]
    words += ["writable=on"] * export.writable + ["allocation-depth=on"] * export.depth
    words += [f"bitmaps.{index}={name}" for index, name in enumerate(export.dirty)]
    return ",".join(words)
