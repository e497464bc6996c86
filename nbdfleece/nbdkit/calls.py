"""Which client a callback is for, and the error that it has set.

Both belong to one call of a script. They are kept in a context variable, so that coroutines
and threads that a callback starts with its context see them too.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final


@dataclass(slots=True)
class Client:
    """What scripts may know of a client.

    Attributes:
        disconnect: Ends the connection: at once, or (False) by refusing what is asked from
            now on. May be called in any thread.
        pid, uid, gid: Of a client on a Unix socket; None elsewhere.
        security_context: What the kernel knows of it, such as a SELinux label.
        is_tls: Whether TLS is in use.
        tls_dn, tls_issuer_dn: Of the certificate that it has shown; "" for none.
        export_name: What it has asked for; None before ``open``.
        left: Set when the connection is over.
    """

    disconnect: Callable[[bool], None]
    pid: int | None = None
    uid: int | None = None
    gid: int | None = None
    security_context: str | None = None
    is_tls: bool = False
    tls_dn: str = ""
    tls_issuer_dn: str = ""
    export_name: str | None = None
    left: threading.Event = field(default_factory=threading.Event)

    def look_at(self, fd: int) -> None:
        """Ask the kernel who is at the other end of a socket."""
        try:
            sock = socket.socket(fileno=os.dup(fd))
        except OSError:  # two pipes
            return
        with sock:
            if sock.family != socket.AF_UNIX:
                return
            packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            self.pid, self.uid, self.gid = struct.unpack("3i", packed)
            try:
                label = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERSEC, 4096)
            except OSError:  # the kernel has no such thing
                return
            self.security_context = os.fsdecode(label.rstrip(b"\0"))


@dataclass(slots=True)
class Call:
    """One call of a script.

    Attributes:
        client: For whom; None while the server starts or ends.
        error: The errno of ``set_error``; 0 for none.
    """

    client: Client | None = None
    error: int = 0


current: Final[ContextVar[Call | None]] = ContextVar("nbdkit_call", default=None)
"""The call that is going on."""
