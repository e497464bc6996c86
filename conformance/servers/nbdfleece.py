"""nbdfleece: the one place that knows its command line."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from conformance import case
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
    """``serve`` with live disks to write to, and a snapshot's export to read from."""

    name = "nbdfleece"

    def version(self) -> str:
        return first_line(program(), "--version")

    def plan(self, configuration: str) -> Plan:
        if configuration in (case.BAD_SECTOR, case.BAD_STATUS):
            raise Unsupported("needs a block node that fails on purpose")
        if configuration in (case.TLS_FORCED, case.TLS_SELECTIVE, case.BLOCK_SIZES):
            raise Unsupported("the command line does not have it")
        if configuration == case.WRITABLE:
            return self._serve("ex")
        if configuration == case.MANY:
            return self._serve("ex", "other", "third")
        return self._snapshot(configuration)

    def _serve(self, *names: str, configuration: str = case.WRITABLE) -> Plan:
        endpoint = self._endpoint(configuration)
        words = ["serve", "--listen", _listen(endpoint), "--control", str(self.place.path(".ctl"))]
        for name in names:
            image = self.place.images.copy("qcow2", self.place.path(".qcow2").name)
            words += ["--disk", f"{name}={image}"]
        exports = (self.known_export(name, writable=True, depth=True) for name in names)
        return Plan([program(), *words], endpoint, tuple(exports))

    def _snapshot(self, configuration: str) -> Plan:
        plan = self._serve("disk", configuration=configuration)
        control = plan.argv[plan.argv.index("--control") :][:2]
        then = (
            [program(), "snapshot", "create", "still", *control],
            [program(), "export", "add", "still", "disk", "--name", "ex", *control],
        )
        export = self.known_export(depth=True)
        return Plan(plan.argv, plan.endpoint, (export,), then=then)

    def _endpoint(self, configuration: str) -> Endpoint:
        if configuration == case.TCP:
            return Endpoint(host="127.0.0.1", port=free_port())
        return Endpoint(path=str(self.place.path(".sock")))


def _listen(endpoint: Endpoint) -> str:
    return str(endpoint) if endpoint.path else f"tcp:{endpoint}"
