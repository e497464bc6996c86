"""QMP without I/O: bytes in, requests and answers out.

States: *negotiating* until the client has sent ``qmp_capabilities``, then *command mode*, in
which events may be sent. :meth:`QmpProtocol.next_message` performs the only transition. It is
called again only after the message before it has been dealt with, so that answers keep the
order of the commands and the state is the one after the last answer.

Spec: QEMU docs/interop/qmp-spec.rst.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from .. import __version__
from .errors import ErrorClass, QmpError
from .texts import TextSplitter

QEMU_VERSION: Final = {"major": 10, "minor": 0, "micro": 0}
"""The release of QEMU whose argument names and shapes the commands follow."""

CAPABILITIES_COMMAND: Final = "qmp_capabilities"

_NO_ID: Final = object()
_MEMBERS: Final = frozenset({"execute", "arguments", "id"})


class Request(NamedTuple):
    """A command that is to be carried out.

    Attributes:
        name: Of the command.
        arguments: As they were sent.
        id: What the answer has to repeat.
    """

    name: str
    arguments: dict[str, Any]
    id: Any


class Answer(NamedTuple):
    """Bytes that are to be sent as they are: the protocol itself knew the answer."""

    data: bytes


class QmpProtocol:
    """One session, as the server sees it.

    Attributes:
        in_command_mode: Whether events may be sent.
    """

    def __init__(self) -> None:
        self.in_command_mode = False
        self._texts = TextSplitter()

    def greeting(self) -> bytes:
        """What the server sends first."""
        return _pack({"QMP": {"version": version(), "capabilities": []}})

    def receive_data(self, data: bytes) -> None:
        """Take what the client sent."""
        self._texts.receive(data)

    def next_message(self) -> Request | Answer | None:
        """The next thing to do; None if more bytes are needed.

        Raises:
            SessionError: The stream cannot be gone on with.
        """
        text = self._texts.next_text()
        if text is None:
            return None
        identity: Any = _NO_ID
        try:
            message = _decode(text)
            identity = message.get("id", _NO_ID)
            name, arguments = _check_message(message)
            if self._check_mode(name, arguments):
                return Answer(pack_return({}, identity))
        except QmpError as error:
            return Answer(pack_error(str(error), error.error_class, identity))
        return Request(name, arguments, identity)

    def _check_mode(self, name: str, arguments: Mapping[str, Any]) -> bool:
        """Whether this is the end of the negotiation.

        Raises:
            QmpError: The command does not belong to this state.
        """
        if self.in_command_mode:
            if name == CAPABILITIES_COMMAND:
                raise QmpError(
                    "Capabilities negotiation is already complete, command ignored",
                    "CommandNotFound",
                )
            return False
        if name != CAPABILITIES_COMMAND:
            raise QmpError(
                "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
            )
        _check_capabilities(arguments)
        self.in_command_mode = True
        return True


def version() -> dict[str, Any]:
    """QEMU's VersionInfo."""
    return {"qemu": QEMU_VERSION, "package": f"nbdfleece {__version__}"}


def pack_return(value: Any, identity: Any = _NO_ID) -> bytes:
    """The answer to a command that succeeded."""
    return _pack({"return": value}, identity)


def pack_error(
    description: str, error_class: ErrorClass = "GenericError", identity: Any = _NO_ID
) -> bytes:
    """The answer to a command that failed."""
    return _pack({"error": {"class": error_class, "desc": description}}, identity)


def pack_event(name: str, data: Mapping[str, Any], time_ns: int | None = None) -> bytes:
    """An event.

    Args:
        name: In capitals.
        data: What it is about; left out if empty, as in QEMU.
        time_ns: Nanoseconds since the epoch; None for now.
    """
    now = time.time_ns() if time_ns is None else time_ns
    seconds, nanoseconds = divmod(now, 1_000_000_000)
    message: dict[str, Any] = {"event": name}
    if data:
        message["data"] = data
    message["timestamp"] = {"seconds": seconds, "microseconds": nanoseconds // 1000}
    return _pack(message)


def _pack(message: dict[str, Any], identity: Any = _NO_ID) -> bytes:
    if identity is not _NO_ID:
        message["id"] = identity
    return msgspec.json.encode(message) + b"\r\n"


def _decode(text: bytes) -> dict[str, Any]:
    try:
        message = msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise QmpError(f"JSON parse error, {error}") from None
    if not isinstance(message, dict):
        raise QmpError("QMP input must be a JSON object")
    return message


def _check_message(message: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The command's name and arguments; errors as QEMU words them."""
    for member in message:
        if member not in _MEMBERS:
            raise QmpError(f"QMP input member '{member}' is unexpected")
    if "execute" not in message:
        raise QmpError("QMP input lacks member 'execute'")
    name, arguments = message["execute"], message.get("arguments", {})
    if not isinstance(name, str):
        raise QmpError("QMP input member 'execute' must be a string")
    if not isinstance(arguments, dict):
        raise QmpError("QMP input member 'arguments' must be an object")
    return name, arguments


def _check_capabilities(arguments: Mapping[str, Any]) -> None:
    for argument in arguments:
        if argument != "enable":
            raise QmpError(f"Parameter '{argument}' is unexpected")
    enable = arguments.get("enable", [])
    if not isinstance(enable, list):
        raise QmpError("Invalid parameter type for 'enable', expected: array")
    for capability in enable:
        raise QmpError(f"Capability {msgspec.json.encode(capability).decode()} not available")
