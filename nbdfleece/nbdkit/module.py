"""The module ``nbdkit`` that scripts import: nbdkit 1.42's functions and constants."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Final, TypeVar

from .calls import Client, current
from .parse import parse_delay, parse_probability, parse_size, read_password

T = TypeVar("T")

log = logging.getLogger("nbdfleece.plugin")

THREAD_MODELS: Final = (
    "serialize_connections",
    "serialize_all_requests",
    "serialize_requests",
    "parallel",
)
"""By their numbers."""

SERIALIZE_CONNECTIONS, SERIALIZE_ALL_REQUESTS, SERIALIZE_REQUESTS, PARALLEL = range(4)
FLAG_MAY_TRIM, FLAG_FUA, FLAG_REQ_ONE, FLAG_FAST_ZERO = 1, 2, 4, 8
FUA_NONE, FUA_EMULATE, FUA_NATIVE = range(3)
CACHE_NONE, CACHE_EMULATE, CACHE_NATIVE = range(3)
EXTENT_HOLE, EXTENT_ZERO = 1, 2

_CONSTANTS: Final = {
    **{f"THREAD_MODEL_{name.upper()}": number for number, name in enumerate(THREAD_MODELS)},
    "FLAG_MAY_TRIM": FLAG_MAY_TRIM,
    "FLAG_FUA": FLAG_FUA,
    "FLAG_REQ_ONE": FLAG_REQ_ONE,
    "FLAG_FAST_ZERO": FLAG_FAST_ZERO,
    "FUA_NONE": FUA_NONE,
    "FUA_EMULATE": FUA_EMULATE,
    "FUA_NATIVE": FUA_NATIVE,
    "CACHE_NONE": CACHE_NONE,
    "CACHE_EMULATE": CACHE_EMULATE,
    "CACHE_NATIVE": CACHE_NATIVE,
    "EXTENT_HOLE": EXTENT_HOLE,
    "EXTENT_ZERO": EXTENT_ZERO,
}
_ERRNO_END: Final = 1 << 31
_SLEEP_STEP_SECONDS: Final = 0.1
"""How soon a sleep notices that its client has left."""


class Server:
    """What the module's functions do to the server.

    Attributes:
        is_configured: Whether clients may come: stdin is no longer for questions.
        uses_stdin: Whether stdin is a client's.
        is_ending: Set when the server is to end; read in any thread.
        on_end: Called once, in any thread, when a script asks for the end.
    """

    def __init__(self, *, uses_stdin: bool = False) -> None:
        self.is_configured = False
        self.uses_stdin = uses_stdin
        self.is_ending = threading.Event()
        self.on_end: Callable[[], None] = lambda: None

    def shutdown(self) -> None:
        """End in good order; the caller goes on."""
        self.is_ending.set()
        self.on_end()

    def stdio_safe(self) -> bool:
        """Whether stdin may be read now."""
        return not self.uses_stdin and not self.is_configured


def make_module(server: Server) -> ModuleType:
    """The module, for scripts in this process."""
    module = ModuleType("nbdkit", "Module used to access nbdkit server API")
    functions = (
        debug,
        disconnect,
        export_name,
        is_tls,
        peer_gid,
        peer_pid,
        peer_security_context,
        peer_tls_dn,
        peer_tls_issuer_dn,
        peer_uid,
        set_error,
        _with_logged_reason(parse_delay),
        _with_logged_reason(parse_probability),
        _with_logged_reason(parse_size),
    )
    for function in functions:
        setattr(module, function.__name__, function)
    _add_server_functions(module, server)
    vars(module).update(_CONSTANTS)
    return module


def install(module: ModuleType) -> None:
    """Let ``import nbdkit`` find the module."""
    sys.modules["nbdkit"] = module


def _add_server_functions(module: ModuleType, server: Server) -> None:
    def shutdown() -> None:
        """Request asynchronous shutdown."""
        server.shutdown()

    def stdio_safe() -> bool:
        """Return true if it is safe to interact with stdin and stdout."""
        return server.stdio_safe()

    def nanosleep(seconds: int, nanoseconds: int) -> None:
        """Sleep; ends early when the server ends or the client leaves."""
        _sleep(server, seconds + nanoseconds / 1e9)

    def read_password_value(value: str) -> bytes:
        """Read a password from a config value."""
        return read_password(_text(value), stdin_is_free=server.stdio_safe())

    read_password_value.__name__ = "read_password"
    for function in (shutdown, stdio_safe, nanosleep, _with_logged_reason(read_password_value)):
        setattr(module, function.__name__, function)


def _with_logged_reason(function: Callable[..., T]) -> Callable[..., T]:
    """nbdkit logs why a value cannot be read, and raises a plain ValueError."""

    def call(*args: str) -> T:
        try:
            return function(*map(_text, args))
        except ValueError as error:
            log.error("%s", error)
            raise

    call.__name__ = function.__name__
    call.__doc__ = function.__doc__
    return call


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"argument must be str, not {type(value).__name__}")
    return value


def _sleep(server: Server, seconds: float) -> None:
    if not 0 <= seconds < 1 << 31:
        log.error("sleep request is too long")
        return
    call = current.get()
    client = call.client if call is not None else None
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if server.is_ending.wait(min(left, _SLEEP_STEP_SECONDS)):
            log.error("aborting sleep because of server shut down")
            return
        if client is not None and client.left.is_set():
            log.error("aborting sleep because of connection close or error")
            return


def debug(message: str) -> None:
    """Print a debug message; seen with -vv."""
    log.debug("%s", _text(message))


def set_error(number: int) -> None:
    """Set the errno that the client is told if this callback fails."""
    if not -_ERRNO_END <= number < _ERRNO_END:
        raise OverflowError("the error number is too large")
    call = current.get()
    if call is not None:
        call.error = number


def disconnect(force: object) -> None:
    """End this client's connection: at once if ``force``, else by refusing further requests."""
    _client().disconnect(bool(force))


def export_name() -> str:
    """The export name that the client asked for; from ``open`` on."""
    name = _client().export_name
    if name is None:
        raise RuntimeError("nbdkit.export_name failed: no export was asked for yet")
    return name


def is_tls() -> bool:
    """Whether the client uses TLS."""
    return _client().is_tls


def peer_pid() -> int:
    """The process id of a client on a Unix socket."""
    return _known("pid", _client().pid)


def peer_uid() -> int:
    """The user id of a client on a Unix socket."""
    return _known("uid", _client().uid)


def peer_gid() -> int:
    """The group id of a client on a Unix socket."""
    return _known("gid", _client().gid)


def peer_security_context() -> str:
    """The security context of the client, such as a SELinux label."""
    return _known("security context", _client().security_context)


def peer_tls_dn() -> str:
    """The distinguished name in the client's certificate; empty if it has shown none."""
    return _client().tls_dn


def peer_tls_issuer_dn() -> str:
    """Who has signed the client's certificate; empty if it has shown none."""
    return _client().tls_issuer_dn


def _known(what: str, value: T | None) -> T:
    if value is None:
        raise ValueError(f"Unable to get client {what}")
    return value


def _client() -> Client:
    call = current.get()
    if call is None or call.client is None:
        raise RuntimeError("nbdkit: no connection in this thread")
    return call.client
