"""Listening sockets: Unix, TCP, vsock, and those that systemd opened for us.

Every function here gives a :class:`Listener` that is bound and listens already:
once it has returned, a client that connects is not refused. Accepting is the
server's part.

A Unix socket's file outlives its server when that one is killed. So a path in
use is tried first: only if nobody answers is the file removed and replaced.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ..errors import UsageError
from ..nbd.constants import DEFAULT_PORT
from ..nbd.uri import NbdUri

BACKLOG: Final = 1024
"""Connections that wait to be accepted; the kernel cuts it to net.core.somaxconn."""

_PORTS_MAX: Final = 10
"""Ports that are tried: what the kernel chooses at one address may be taken at the next."""

SYSTEMD_FIRST_FD: Final = 3
"""SD_LISTEN_FDS_START of sd_listen_fds(3)."""


@dataclass(slots=True)
class Listener:
    """A listening socket.

    Attributes:
        sock: Bound, listening, non-blocking.
        name: What systemd calls it (FileDescriptorName=), or what it is bound to.
        identity: Device and inode of the Unix socket's file that we made, which is ours to
            remove; None if there is none.
    """

    sock: socket.socket
    name: str
    identity: tuple[int, int] | None = None

    def uri(self, export: str = "", *, tls: bool = False) -> NbdUri:
        """How a client names an export here."""
        address = self.sock.getsockname()
        if self.sock.family == socket.AF_UNIX:
            path = address.decode() if isinstance(address, bytes) else address
            return NbdUri(transport="unix", socket=path, export=export, tls=tls)
        if self.sock.family == socket.AF_VSOCK:
            cid, port = address
            return NbdUri(transport="vsock", cid=cid, port=port, export=export, tls=tls)
        host, port = address[:2]
        return NbdUri(transport="tcp", host=host, port=port, export=export, tls=tls)

    def close(self) -> None:
        """Stop listening and remove the socket's file, if it is still the one we made."""
        if self.identity is not None:
            path = self.sock.getsockname()
            if _identity(path) == self.identity:
                os.unlink(path)
        self.sock.close()


def listen_unix(
    path: str,
    *,
    mode: int | None = None,
    uid: int = -1,
    gid: int = -1,
) -> Listener:
    """Listen on a Unix domain socket.

    Args:
        path: Where; a path that begins with NUL is an abstract one.
        mode: Permissions of the file; None leaves them to the umask.
        uid: Its owner; -1 for the process's own.
        gid: Its group; likewise.

    Raises:
        UsageError: A server listens there, the path is taken by something else, or it cannot
            be used; the text says which.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        _bind_unix(sock, path)
        if path.startswith("\0"):
            sock.listen(BACKLOG)
            return Listener(sock, path)
        # Nobody can connect before listen(): the permissions are never wider than asked for.
        if uid != -1 or gid != -1:
            os.chown(path, uid, gid)
        if mode is not None:
            os.chmod(path, mode)
        sock.listen(BACKLOG)
        return Listener(sock, path, _identity(path))
    except OSError as error:
        sock.close()
        raise UsageError(f"cannot listen on '{path}': {error.strerror or error}") from error
    except UsageError:
        sock.close()
        raise


def _bind_unix(sock: socket.socket, path: str) -> None:
    try:
        sock.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        _remove_stale_socket(path)
        sock.bind(path)


def _remove_stale_socket(path: str) -> None:
    """Remove a socket that nobody listens on.

    Raises:
        UsageError: Somebody does, or it is no socket.
    """
    if path.startswith("\0"):
        raise UsageError(f"cannot listen on '{path[1:]}' (abstract): another server listens there")
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise UsageError(f"cannot listen on '{path}': the file exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # its backlog is full: it is alive
    raise UsageError(f"cannot listen on '{path}': another server listens there")


def _identity(path: str) -> tuple[int, int] | None:
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return None
    return info.st_dev, info.st_ino


def listen_tcp(host: str = "", port: int = DEFAULT_PORT) -> list[Listener]:
    """Listen on TCP, on every address that the host name has.

    Args:
        host: Name or address; "" for all addresses of the machine, IPv4 and IPv6.
        port: 0 lets the kernel choose one (the same for all addresses).

    Raises:
        UsageError: No address, or one of them cannot be used.
    """
    for left in reversed(range(_PORTS_MAX if port == 0 else 1)):
        try:
            return _listen_addresses(host, port)
        except OSError as error:
            if left and error.errno == errno.EADDRINUSE:
                continue
            where = f"{host or '*'}:{port}"
            raise UsageError(f"cannot listen on '{where}': {error.strerror or error}") from error
    raise AssertionError("the last attempt returns or raises")


def _listen_addresses(host: str, port: int) -> list[Listener]:
    listeners: list[Listener] = []
    try:
        for family, _, _, _, address in _resolve(host, port):
            if port == 0 and listeners:
                address = (address[0], listeners[0].sock.getsockname()[1], *address[2:])
            listeners.append(_listen_address(family, address))
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _resolve(host: str, port: int) -> list[tuple[int, int, int, str, tuple[str, int]]]:
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    if not host and not _has_ipv6():
        found = [entry for entry in found if entry[0] != socket.AF_INET6]
    return found  # type: ignore[return-value]  # typeshed allows for address families without ports


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def _listen_address(family: int, address: tuple[str, int]) -> Listener:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # A server that restarts must not wait for its old connections to time out.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return Listener(sock, f"{address[0]}:{sock.getsockname()[1]}")


def listen_vsock(cid: int = socket.VMADDR_CID_ANY, port: int = DEFAULT_PORT) -> Listener:
    """Listen on vsock, for the machine's own virtual machines or its host.

    Args:
        cid: Which of the machine's context ids; by default all of them.
        port: 32 bits.

    Raises:
        UsageError: The kernel has no vsock, or the port is taken.
    """
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise UsageError(f"cannot listen on vsock: the kernel has none: {error}") from error
    try:
        sock.bind((cid, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise UsageError(f"cannot listen on vsock port {port}: {error.strerror}") from error
    return Listener(sock, f"vsock:{port}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketFile:
    """Who may connect to a Unix socket: permissions, owner and group of its file.

    Attributes:
        mode: Permissions; None leaves them to the umask.
        uid: The owner; -1 for the process's own.
        gid: The group; likewise.
    """

    mode: int | None = None
    uid: int = -1
    gid: int = -1


def listen_uri(uri: NbdUri, file: SocketFile | None = None) -> list[Listener]:
    """Listen where a URI points to; its export name is of no matter.

    Args:
        uri: Where.
        file: For a Unix socket.

    Raises:
        UsageError: It cannot be listened on.
    """
    if uri.transport == "unix":
        file = file or SocketFile()
        return [listen_unix(uri.socket, mode=file.mode, uid=file.uid, gid=file.gid)]
    if uri.transport == "vsock":
        return [listen_vsock(uri.cid, uri.port)]
    return listen_tcp(uri.host, uri.port)


def listen_systemd(environment: Mapping[str, str] | None = None) -> list[Listener]:
    """Take over the sockets that systemd passes, see sd_listen_fds(3).

    Args:
        environment: Where LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES are.

    Returns:
        The listeners; none if the process was not started so.

    Raises:
        UsageError: What was passed is not a listening stream socket.
    """
    variables = os.environ if environment is None else environment
    if variables.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = variables.get("LISTEN_FDS", "0")
    if not count.isdecimal():
        raise UsageError(f"LISTEN_FDS is '{count}', which is no number")
    names = variables.get("LISTEN_FDNAMES", "").split(":")
    return [
        _adopt(SYSTEMD_FIRST_FD + index, names[index] if index < len(names) else "")
        for index in range(int(count))
    ]


def _adopt(fd: int, name: str) -> Listener:
    try:
        sock = socket.socket(fileno=fd)
        is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise UsageError(f"file descriptor {fd} from systemd is not a socket: {error}") from error
    if not is_listening or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise UsageError(f"file descriptor {fd} from systemd is not a listening stream socket")
    os.set_inheritable(fd, False)
    sock.setblocking(False)
    return Listener(sock, name or f"systemd:{fd}")
