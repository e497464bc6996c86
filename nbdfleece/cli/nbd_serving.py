"""Running a server for one image: the background, the process id, signals, the end.

What is heavy is imported after the fork: numpy's libraries start threads, which do not
survive one.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..errors import UsageError
from ..server.listener import Listener, listen_systemd, listen_tcp, listen_unix
from .nbd_flags import Given

if TYPE_CHECKING:
    from ..server.loop import LoopChoice


_READY: Final = b"ready"
_SELINUX: Final = "/proc/thread-self/attr/sockcreate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """What ``nbdfleece nbd`` and the one that stands in for qemu-nbd do differently.

    Attributes:
        policy: Which files images may name: a value of ``BackingPolicy``.
        loop: The event loop.
        keeps_pid_file: Leave the file there at the end, as QEMU does.
        prints_uri: Print the export's URIs once clients can come.
    """

    policy: str
    loop: LoopChoice = "auto"
    keeps_pid_file: bool = False
    prints_uri: bool = False


def run_nbd(given: Given, style: Style) -> None:
    """Serve an image until it is time to end, or list what another server has.

    Raises:
        NbdfleeceError, OSError: It could not be done; what was said on stderr.
        SystemExit: This is the process that ``--fork`` leaves behind.
    """
    for flag in ("connect", "disconnect"):
        if given.has(flag):
            raise UsageError(
                f"--{flag} is not supported: kernel devices are bound by nbd-client, on a socket"
            )
    if given.has("list"):
        if os.environ.get("LISTEN_PID") == str(os.getpid()):
            raise UsageError("List mode is incompatible with socket activation")
        from .nbd_options import print_list

        print_list(given)
        return
    listeners = _activated(given)
    tell_ready = go_to_background(given.has("verbose")) if given.has("fork") else None
    _serve(given, style, listeners, tell_ready)


def _serve(
    given: Given, style: Style, listeners: Sequence[Listener], tell_ready: Callable[[], None] | None
) -> None:
    from ..qcow2.backing import BackingPolicy
    from ..server.loop import run, settle
    from ..standalone.image_server import ImageServer
    from .nbd_options import build_options

    options = build_options(given, BackingPolicy(style.policy))
    listeners = listeners or _listen(given)
    uris = [str(each.uri(options.export, tls=options.tls is not None)) for each in listeners]

    async def main() -> None:
        async with ImageServer(options, listeners) as server:
            handle_signals(server.request_stop)
            settle()
            with pid_file(given.last("pid-file"), keep=style.keeps_pid_file):
                if style.prints_uri:
                    print("\n".join(uris), flush=True)
                if tell_ready is not None:
                    tell_ready()
                await server.wait_end()

    run(main(), style.loop)


def _activated(given: Given) -> list[Listener]:
    """The socket that systemd, or a client that started us, has opened."""
    listeners = listen_systemd()
    if not listeners:
        return []
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    for flag in ("socket", "bind", "port", "selinux-label"):
        if given.has(flag):
            raise UsageError(f"--{flag} can't be set when using socket activation")
    if len(listeners) > 1:
        raise UsageError("socket activation with LISTEN_FDS > 1 is not supported")
    return listeners


def _listen(given: Given) -> list[Listener]:
    from .nbd_options import address

    where = address(given)
    label = given.last("selinux-label")
    if isinstance(where, tuple):
        if label is not None:
            raise UsageError("--selinux-label is not permitted without --socket")
        return listen_tcp(*where)
    path = os.path.abspath(where) if given.has("fork") else where
    with _selinux_label(label):
        return [listen_unix(path)]


@contextmanager
def _selinux_label(label: str | None) -> Iterator[None]:
    """Have sockets made with this context.

    Raises:
        UsageError: The kernel does not take it, or has no SELinux.
    """
    if label is None:
        yield
        return
    try:
        _write(_SELINUX, label)
    except OSError as error:
        raise UsageError(
            f"Cannot set SELinux socket create context to {label}: {error.strerror}"
        ) from error
    try:
        yield
    finally:
        _write(_SELINUX, "")


def _write(path: str, text: str) -> None:
    with open(path, "w") as stream:
        stream.write(text)


def handle_signals(request_stop: Callable[[], None]) -> None:
    """End in good order at the first signal, at once at the second."""
    received: list[int] = []

    def handle(number: int) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(number)
        request_stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, handle, number)


@contextmanager
def pid_file(path: str | None, *, keep: bool) -> Iterator[None]:
    """Hold a locked file with our process id, as QEMU does.

    Raises:
        UsageError: It cannot be written, or another process holds it.
    """
    if path is None:
        yield
        return
    path = os.path.abspath(path)
    try:
        fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(f"Could not create '{path}': {error.strerror}") from error
    try:
        _write_pid(fd, path)
        try:
            yield
        finally:
            if not keep:
                os.unlink(path)
    finally:
        os.close(fd)


def _write_pid(fd: int, path: str) -> None:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UsageError(f"Cannot lock pid file '{path}': another process holds it") from error
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())


def go_to_background(is_verbose: bool) -> Callable[[], None]:
    """Go on in a new process; the old one ends when that one is ready, or has failed.

    Args:
        is_verbose: Keep stderr when clients can come; otherwise whoever reads it sees its end.

    Returns:
        What the new process calls when clients can come.

    Raises:
        SystemExit: This is the old process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        os.waitpid(pid, 0)
        with open(reader, "rb") as stream:
            raise SystemExit(0 if stream.read() == _READY else 1)
    os.close(reader)
    os.setsid()
    if os.fork():
        os._exit(0)
    _redirect(sys.stdin.fileno(), sys.stdout.fileno())

    def tell_ready() -> None:
        os.chdir("/")
        if not is_verbose:
            _redirect(sys.stderr.fileno())
        os.write(writer, _READY)
        os.close(writer)

    return tell_ready


def _redirect(*fds: int) -> None:
    """Let these descriptors lead to /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in fds:
        os.dup2(null, fd)
    os.close(null)
