"""Types of the module ``nbdkit`` that nbdkit gives to its Python plugins.

As of nbdkit 1.42. What later versions than 1.32 added says so; check with ``hasattr`` where a
script must run under older ones. The functions are C: they take no keyword arguments.
"""

from typing import Final

THREAD_MODEL_SERIALIZE_CONNECTIONS: Final = 0
THREAD_MODEL_SERIALIZE_ALL_REQUESTS: Final = 1
THREAD_MODEL_SERIALIZE_REQUESTS: Final = 2
THREAD_MODEL_PARALLEL: Final = 3

FLAG_MAY_TRIM: Final = 1
FLAG_FUA: Final = 2
FLAG_REQ_ONE: Final = 4
FLAG_FAST_ZERO: Final = 8

FUA_NONE: Final = 0
FUA_EMULATE: Final = 1
FUA_NATIVE: Final = 2

CACHE_NONE: Final = 0
CACHE_EMULATE: Final = 1
CACHE_NATIVE: Final = 2

EXTENT_HOLE: Final = 1
EXTENT_ZERO: Final = 2

def debug(msg: str, /) -> None:
    """Log a message, if nbdkit runs with ``-v``."""

def set_error(err: int, /) -> None:
    """Choose the errno that the client gets for the exception raised next in this thread."""

def shutdown() -> None:
    """Ask the server to end; returns at once."""

def export_name() -> str:
    """What the client asked for, from ``open`` on; it may be any text."""

def parse_size(text: str, /) -> int:
    """Read a size such as ``"10M"``, in bytes; raises ValueError."""

def disconnect(force: bool, /) -> None:
    """End this client's connection, at once if ``force``. Since after 1.32."""

def is_tls() -> bool:
    """Whether this client uses TLS. Since after 1.32."""

def nanosleep(seconds: int, nanoseconds: int, /) -> None:
    """Sleep, but not beyond the connection's end; for data callbacks only. Since after 1.32."""

def parse_delay(what: str, text: str, /) -> tuple[int, int]:
    """Read a time such as ``"10ms"`` as seconds and nanoseconds; raises ValueError.

    ``what`` is the parameter's name, for the message. Since after 1.32.
    """

def parse_probability(what: str, text: str, /) -> float:
    """Read ``"1%"``, ``"0.01"`` or ``"1:100"``; raises ValueError. Since after 1.32."""

def peer_gid() -> int:
    """The client's group, on a Unix socket. Since after 1.32."""

def peer_pid() -> int:
    """The client's process, on a Unix socket. Since after 1.32."""

def peer_uid() -> int:
    """The client's user, on a Unix socket. Since after 1.32."""

def peer_security_context() -> str:
    """The client's SELinux label. Since after 1.32."""

def peer_tls_dn() -> str:
    """The distinguished name in the client's certificate, or "". Since after 1.32."""

def peer_tls_issuer_dn() -> str:
    """The distinguished name of who issued the client's certificate, or "". Since after 1.32."""

def read_password(value: str, /) -> bytes:
    """Read a password as parameters name it: itself, ``-``, ``-FD`` or ``+FILE``.

    Since after 1.32.
    """

def stdio_safe() -> bool:
    """Whether stdin and stdout are the script's to use. Since after 1.32."""
