"""A control socket, QEMU's or ours: the same protocol."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any, Self

from .processes import START_SECONDS


class QmpError(Exception):
    """A command was refused; the text is the server's."""


class Qmp:
    """A session, from entering this context to leaving it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Self:
        deadline = time.monotonic() + START_SECONDS
        while not self._path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(60)
        self._sock.connect(str(self._path))
        self._file = self._sock.makefile("rw", encoding="utf-8")
        self._file.readline()
        self.execute("qmp_capabilities")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._sock.close()

    def execute(self, command: str, **arguments: Any) -> Any:
        """Have a command carried out; underscores in arguments' names stand for hyphens.

        Raises:
            QmpError: It was refused.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._file.write(json.dumps({"execute": command, "arguments": named}) + "\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise QmpError(f"{command}: {answer['error']['desc']}")
