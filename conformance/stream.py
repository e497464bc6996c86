"""A socket with a time limit on everything: the only place where the suite reads and writes."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from dataclasses import dataclass

from conformance.errors import Disconnected, Stalled

TIMEOUT_SECONDS = 30.0
"""Long enough for a machine that does much else, short enough that a server which stalls costs
one case."""


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens: a Unix socket's path, or a host and port."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"{self.host}:{self.port}"


class Stream:
    """Bytes to and from a server; every call ends within ``timeout`` seconds.

    Attributes:
        reset_by_server: The stream ended other than by an orderly end: reset, or over TLS
            without a goodbye.
    """

    def __init__(self, endpoint: Endpoint, timeout: float = TIMEOUT_SECONDS) -> None:
        self.timeout = timeout
        self.reset_by_server = False
        try:
            self.socket = _connected(endpoint, timeout)
        except OSError as error:
            raise Disconnected(f"cannot connect to {endpoint}: {error}") from error

    def send(self, data: bytes) -> None:
        """Send all of ``data``.

        Raises:
            Disconnected: The server closed.
            Stalled: The server did not read it in time.
        """
        self.socket.settimeout(self.timeout)
        try:
            self.socket.sendall(data)
        except TimeoutError as error:
            raise Stalled(f"server read nothing for {self.timeout} s") from error
        except OSError as error:
            raise Disconnected(f"while sending: {error}") from error

    def receive(self, length: int, what: str) -> bytes:
        """Receive exactly ``length`` bytes; ``what`` names them in the evidence."""
        deadline = time.monotonic() + self.timeout
        parts = bytearray()
        while len(parts) < length:
            piece = self._receive_some(min(length - len(parts), 1 << 20), deadline, what)
            if not piece:
                raise Disconnected(f"server closed at {len(parts)} of {length} bytes of {what}")
            parts += piece
        return bytes(parts)

    def _receive_some(self, length: int, deadline: float, what: str) -> bytes:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Stalled(f"no {what} within {self.timeout} s")
        self.socket.settimeout(left)
        try:
            return self.socket.recv(length)
        except TimeoutError as error:
            raise Stalled(f"no {what} within {self.timeout} s") from error
        except OSError as error:
            self.reset_by_server = True
            raise Disconnected(f"while waiting for {what}: {error}") from error

    def closed(self, timeout: float | None = None) -> bool:
        """Whether the server closes within ``timeout`` seconds, without sending more first."""
        return self.remainder(timeout) == b""

    def remainder(self, timeout: float | None = None, limit: int = 1 << 20) -> bytes | None:
        """All that the server still sends before it closes, or None when it does not close."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        parts = bytearray()
        while len(parts) < limit:
            try:
                piece = self._receive_some(65536, deadline, "end of stream")
            except Disconnected:
                return bytes(parts)
            except Stalled:
                return None
            if not piece:
                return bytes(parts)
            parts += piece
        return None

    def silent(self, seconds: float) -> bool:
        """Whether nothing arrives, and the server does not close, for ``seconds``."""
        try:
            self._receive_some(1, time.monotonic() + seconds, "anything")
        except Stalled:
            return True
        except Disconnected:
            return False
        return False

    def start_tls(self, context: ssl.SSLContext, hostname: str = "localhost") -> None:
        """Do the TLS handshake as the client.

        Raises:
            Disconnected: The handshake failed, or the server closed.
            Stalled: It did not end in time.
        """
        self.socket.settimeout(self.timeout)
        try:
            self.socket = context.wrap_socket(
                self.socket, server_hostname=hostname, suppress_ragged_eofs=False
            )
        except TimeoutError as error:
            raise Stalled(f"no TLS handshake within {self.timeout} s") from error
        except OSError as error:
            raise Disconnected(f"TLS handshake: {error}") from error

    def half_close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.close()

    def reset(self) -> None:
        """Close without a goodbye: TCP sends RST; a Unix socket drops what is unread."""
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close()


def _connected(endpoint: Endpoint, timeout: float) -> socket.socket:
    if not endpoint.path:
        made = socket.create_connection((endpoint.host, endpoint.port), timeout)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.settimeout(timeout)
    deadline = time.monotonic() + timeout
    while True:
        try:
            made.connect(endpoint.path)
            return made
        except OSError as error:
            # EAGAIN: the queue of connections is full, and a socket with a time limit is not
            # made to wait for it.
            if not isinstance(error, BlockingIOError) or time.monotonic() > deadline:
                made.close()
                raise
        time.sleep(0.01)
