"""A client of the control socket that waits for its answers; needs no event loop."""

from __future__ import annotations

import os
import socket
from collections import deque
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from ..errors import NbdfleeceError, TemporaryError
from .errors import ErrorClass, QmpError

GREETING_SECONDS: Final = 10.0
"""A server that does not even greet in that time is no server that one could wait for; commands
may take as long as they take."""

_RECEIVE_BYTES: Final = 1 << 16


class ConnectError(NbdfleeceError):
    """No server can be reached."""


class ServerGoneError(TemporaryError):
    """The server hung up: it is ending, or has as many clients as it may; try again later."""


class ControlClient:
    """A session with a server, from entering this context to leaving it.

    Args:
        path: The control socket.
        keeps_events: Events that come while a command is carried out are kept for
            :meth:`next_event`; otherwise they are dropped.
    """

    def __init__(self, path: str | os.PathLike[str], *, keeps_events: bool = False) -> None:
        self._path = Path(path)
        self._keeps_events = keeps_events
        self._events: deque[dict[str, Any]] = deque()
        self._sock = socket.socket(socket.AF_UNIX)
        self._received = bytearray()

    def __enter__(self) -> Self:
        """Connect and negotiate.

        Raises:
            ConnectError: There is no server, or it is none of ours to speak to.
            ServerGoneError: It hung up.
        """
        try:
            self._sock.connect(os.fspath(self._path))
        except OSError as error:
            self._sock.close()
            reason = error.strerror or error
            raise ConnectError(
                f"cannot reach a server at '{self._path}': {reason}; is it running?"
            ) from error
        try:
            self._sock.settimeout(GREETING_SECONDS)
            self._check_greeting(self._receive())
            self.execute("qmp_capabilities")
            self._sock.settimeout(None)
        except BaseException:
            self._sock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Have a command carried out.

        Args:
            command: Its name.
            arguments: Those that are None are left out.

        Returns:
            What the server returned, as JSON's types.

        Raises:
            QmpError: The command failed.
            ServerGoneError: The server hung up; whether the command was carried out is not known.
        """
        given = {key: value for key, value in (arguments or {}).items() if value is not None}
        try:
            self._sock.sendall(
                msgspec.json.encode({"execute": command, "arguments": given}) + b"\n"
            )
        except OSError as error:
            raise self._gone() from error
        while "event" in (message := self._receive()):
            if self._keeps_events:
                self._events.append(message)
        if "error" in message:
            raise _failure(message["error"])
        return message["return"]

    def next_event(self) -> dict[str, Any]:
        """Wait for an event: ``event`` is its name, ``data`` what it tells.

        Raises:
            ServerGoneError: The server hung up.
        """
        return self._events.popleft() if self._events else self._receive()

    def _receive(self) -> dict[str, Any]:
        while (end := self._received.find(b"\n")) < 0:
            try:
                data = self._sock.recv(_RECEIVE_BYTES)
            except OSError as error:
                raise self._gone() from error
            if not data:
                raise self._gone()
            self._received += data
            if not self._received.startswith(b"{"):
                raise ConnectError(f"'{self._path}' is no control socket")
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        try:
            return msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise ConnectError(f"'{self._path}' is no control socket: {error}") from error

    def _check_greeting(self, greeting: dict[str, Any]) -> None:
        try:
            package = greeting["QMP"]["version"]["package"]
        except (KeyError, TypeError):
            package = None
        if not str(package).startswith("nbdfleece "):
            raise ConnectError(f"'{self._path}' is not the control socket of an nbdfleece server")

    def _gone(self) -> ServerGoneError:
        return ServerGoneError(f"the server at '{self._path}' hung up; try again later")


def _failure(error: dict[str, Any]) -> QmpError:
    error_class: ErrorClass = error["class"]
    return QmpError(error["desc"], error_class)
