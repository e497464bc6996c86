"""Where servers listen and are found: addresses on the command line, and defaults."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from ..errors import UsageError
from ..nbd.constants import DEFAULT_PORT
from ..nbd.uri import TCP_PORT_MAX, VSOCK_PORT_MAX, NbdUri, parse_uri

CONTROL_VARIABLE: Final = "NBDFLEECE_CONTROL"
NO_CONTROL: Final = "none"

_VSOCK_ANY: Final = (1 << 32) - 1
_TCP: Final = re.compile(r"tcp:(\[[^]]*\]|[^:\[\]]*)(?::(\d{1,10}))?", re.ASCII)
_VSOCK: Final = re.compile(r"vsock:(\d{1,10}|any):(\d{1,10})", re.ASCII)


def runtime_directory() -> Path:
    """Where sockets are unless told otherwise.

    Raises:
        UsageError: There is no such place: the user is not root and has no session.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base:
        return Path(base) / "nbdfleece"
    if os.geteuid() == 0:
        return Path("/run/nbdfleece")
    raise UsageError("XDG_RUNTIME_DIR is not set: say where with --listen and --control")


def default_control() -> Path:
    """The control socket, if none is named.

    Raises:
        UsageError: As :func:`runtime_directory`.
    """
    return runtime_directory() / "control.sock"


def default_listen() -> NbdUri:
    """Where to listen, if nothing is said.

    Raises:
        UsageError: As :func:`runtime_directory`.
    """
    return NbdUri(transport="unix", socket=str(runtime_directory() / "nbd.sock"))


def parse_listen(text: str) -> NbdUri:
    """Read ``unix:PATH``, ``tcp:HOST[:PORT]``, ``vsock:CID:PORT`` or an NBD URI.

    HOST may be empty, and CID be ``any``: all of the machine's.

    Raises:
        UsageError: It is none of these.
    """
    if text.startswith("unix:") and len(text) > len("unix:"):
        return NbdUri(transport="unix", socket=text.removeprefix("unix:"))
    if match := _TCP.fullmatch(text):
        host = match[1].removeprefix("[").removesuffix("]")
        port = _number(text, match[2] or str(DEFAULT_PORT), TCP_PORT_MAX)
        return NbdUri(transport="tcp", host=host, port=port)
    if match := _VSOCK.fullmatch(text):
        cid = _VSOCK_ANY if match[1] == "any" else _number(text, match[1], _VSOCK_ANY)
        return NbdUri(transport="vsock", cid=cid, port=_number(text, match[2], VSOCK_PORT_MAX))
    if text.startswith("nbd"):
        return parse_uri(text)
    raise UsageError(
        f"'{text}' is no address: unix:PATH, tcp:HOST:PORT, vsock:CID:PORT or an NBD URI"
    )


def _number(text: str, digits: str, most: int) -> int:
    if int(digits) > most:
        raise UsageError(f"'{text}': {digits} is more than {most}")
    return int(digits)
