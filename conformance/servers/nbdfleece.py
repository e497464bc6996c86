"""nbdfleece: the one place that knows its command line."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from conformance import case
from conformance.case import Export
from conformance.servers.base import Adapter, Plan, Unsupported, first_line, free_port
from conformance.stream import Endpoint


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
    """``nbdfleece nbd`` with the flags of qemu-nbd serves one image."""

    name = "nbdfleece"

    def version(self) -> str:
        program()
        return first_line(self.place.programs, program(), "--version")

    def plan(self, configuration: str) -> Plan:
        if configuration in (case.BAD_SECTOR, case.BAD_STATUS):
            raise Unsupported("needs a block node that fails on purpose")
        if configuration == case.MANY:
            return self._serve()
        return self._nbd(configuration)

    def _nbd(self, configuration: str) -> Plan:
        writable = configuration in (case.WRITABLE, case.BLOCK_SIZES)
        image = self.place.images.qcow2
        if writable:
            image = self.place.images.copy("qcow2", self.place.path(".qcow2").name)
        endpoint, listen = self._address(configuration)
        words = ["nbd", "-t", "-e", "0", "-x", "ex", "-f", "qcow2", "-A", *listen]
        words += [] if writable else ["-r"]
        tls = {case.TLS_FORCED: "forced", case.TLS_SELECTIVE: "selective"}.get(configuration, "off")
        if tls != "off":
            words += [f"--tls={tls}", f"--tls-certificates={self.place.certificates}"]
        if configuration == case.BLOCK_SIZES:
            words += ["--minimum-block-size=4096"]
        export = self.qemu_export(writable=writable)
        for name in export.dirty:
            words += ["-B", name]
        return Plan([program(), *words, str(image)], endpoint, (export,), tls=tls)

    def _serve(self) -> Plan:
        path = str(self.place.path(".sock"))
        words, exports = ["serve", "--listen", f"unix:{path}"], []
        for name in ("ex", "other", "third"):
            image = self.place.images.copy("qcow2", self.place.path(".qcow2").name)
            words += ["--disk", f"{name}={image}"]
            exports.append(Export(name, self.place.images.content.size, writable=True))
        return Plan([program(), *words], Endpoint(path=path), tuple(exports))

    def _address(self, configuration: str) -> tuple[Endpoint, list[str]]:
        if configuration == case.TCP:
            port = free_port()
            return Endpoint(host="127.0.0.1", port=port), ["-b", "127.0.0.1", "-p", str(port)]
        path = str(self.place.path(".sock"))
        return Endpoint(path=path), ["-k", path]
