"""One libnbd connection driven by the running event loop.

libnbd is a state machine: commands are queued in it, and it says which of reading and
writing it waits for. Here the loop watches its socket and turns the machine; each command
has a future, which its completion callback resolves. libnbd reads payloads straight from
the socket into the caller's buffer and writes them straight from it: nothing is copied.

A connection that dies fails all its commands. The callbacks run inside calls of the
machine, in the loop's thread; they raise nothing, for libnbd could not pass it on.

**A server that hangs.** While commands wait for answers, a timer looks whether bytes have moved
since; if none have for the time limit, the connection is dead. So a slow server has all the time
that it needs, and one that hangs has not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NamedTuple

from .errors import ServerError
from .libnbd import command_error, load_libnbd, server_error

_DIRECTION_READ: Final = 1
_DIRECTION_WRITE: Final = 2

_REQUEST_BYTES_MAX: Final = 32 << 20
"""What every server takes that does not say otherwise (proto.md, "Block size constraints")."""

_Issue = Callable[[Callable[[Any], int]], object]
"""Queues a command with the completion callback that it is given."""


TIMEOUT_SECONDS: Final = 300.0
"""Longer than a busy server is silent, shorter than anyone waits for a dead one."""

_CLOSED: Final = -1
"""In place of an errno: there was no answer."""

_POLL_MILLISECONDS: Final = 200
"""How soon a handshake notices that nobody waits for it any more."""


class ConnectOptions(NamedTuple):
    """What to negotiate, and how patiently.

    Attributes:
        contexts: Metadata contexts.
        full_info: Whether to ask for the export's description.
        timeout_seconds: How long the server may be silent while it owes answers; None for ever.
    """

    contexts: tuple[str, ...] = ()
    full_info: bool = False
    timeout_seconds: float | None = TIMEOUT_SECONDS


async def connect(uri: str, options: ConnectOptions) -> Connection:
    """Connect and negotiate, in a thread.

    Raises:
        ServerError: There is no server, it refuses, or it does not answer.
        UsageError: libnbd is missing.
    """
    module = load_libnbd()
    handle = module.NBD()
    handle.set_uri_allow_local_file(True)  # tls-psk-file: the URI is the user's own
    handle.set_full_info(options.full_info)
    for context in options.contexts:
        handle.add_meta_context(context)
    patience = _Patience(uri, options.timeout_seconds)

    def negotiate() -> None:
        handle.aio_connect_uri(uri)
        patience.turn(handle)
        if not handle.aio_is_ready():
            raise ServerError(f"{uri}: the server refuses the connection")

    await patience.run(module, negotiate)
    handle.set_pread_initialize(False)  # a failed read's buffer is never used
    return Connection(uri, handle, module, options.timeout_seconds)


async def offered_contexts(
    uri: str, queries: tuple[str, ...], *, timeout_seconds: float | None = TIMEOUT_SECONDS
) -> list[str]:
    """The metadata contexts that the export offers for some queries, in the server's order.

    Raises:
        ServerError: There is no server, no such export, no way to ask, or no answer.
    """
    module = load_libnbd()
    patience = _Patience(uri, timeout_seconds)
    found: list[str] = []
    errors: list[int] = []

    def ask() -> None:
        handle = module.NBD()
        handle.set_uri_allow_local_file(True)
        handle.set_opt_mode(True)
        handle.aio_connect_uri(uri)
        patience.turn(handle)
        if not handle.aio_is_negotiating() or not handle.get_structured_replies_negotiated():
            return
        for query in queries:
            handle.add_meta_context(query)

        def done(error: Any) -> int:
            errors.append(error.value)
            return 1

        handle.aio_opt_list_meta_context(found.append, done)
        patience.turn(handle)
        handle.aio_opt_abort()

    await patience.run(module, ask)
    if any(errors):
        # libnbd says only "not supported" of a list for an export that does not exist.
        (await connect(uri, ConnectOptions(timeout_seconds=timeout_seconds))).disconnect()
        raise command_error(uri, "listing the metadata contexts", errors[0])
    return found


class _Patience:
    """Runs a handshake in a thread, which ends when the time is up or nobody waits any more."""

    def __init__(self, uri: str, timeout_seconds: float | None) -> None:
        self._uri = uri
        self._timeout = timeout_seconds
        self._is_cancelled = False

    async def run(self, module: Any, handshake: Callable[[], None]) -> None:
        """Run it.

        Raises:
            ServerError: It failed.
        """
        try:
            await asyncio.to_thread(handshake)
        except module.Error as error:
            raise server_error(self._uri, error) from None
        except asyncio.CancelledError:
            self._is_cancelled = True
            raise

    def turn(self, handle: Any) -> None:
        """Turn the machine until it waits for us.

        Raises:
            ServerError: The server hangs.
        """
        begun = time.monotonic()
        while handle.aio_is_connecting() and not self._is_cancelled:
            if self._timeout is not None and time.monotonic() - begun >= self._timeout:
                raise ServerError(f"{self._uri}: {silence('handshake', self._timeout)}")
            handle.poll(_POLL_MILLISECONDS)


def silence(what: str, seconds: float) -> str:
    """How a server that hangs is reported."""
    return f"{what}: the server has been silent for {seconds:g} seconds"


class Connection:
    """A connection in its transmission phase. Made by :func:`connect`."""

    def __init__(self, uri: str, handle: Any, module: Any, timeout_seconds: float | None) -> None:
        self.uri = uri
        self.handle = handle
        self._module = module
        self._loop = asyncio.get_running_loop()
        self._fd: int = handle.aio_get_fd()
        self._watching = 0
        self._pending: set[asyncio.Future[int]] = set()
        self._is_closed = False
        self._timeout = timeout_seconds
        self._moved_at = 0.0
        """When bytes have moved last, or were first waited for, by the loop's clock."""
        self._timer: asyncio.TimerHandle | None = None
        self._has_hung = False

    @property
    def in_flight(self) -> int:
        """Commands that are not yet answered."""
        return len(self._pending)

    @property
    def size(self) -> int:
        """Bytes of the export."""
        return int(self.handle.get_size())

    @property
    def export_name(self) -> str:
        """The export's name, as it was asked for."""
        return str(self.handle.get_export_name())

    @property
    def description(self) -> str:
        """The export's description, "" if the server sent none."""
        try:
            return str(self.handle.get_export_description())
        except self._module.Error:
            return ""

    @property
    def request_bytes_max(self) -> int:
        """The largest read or write that the server takes."""
        said = int(self.handle.get_block_size(self._module.SIZE_MAXIMUM))
        return said or _REQUEST_BYTES_MAX

    def can(self, what: str) -> bool:
        """A property of the export by libnbd's name for it: ``multi_conn``, ``zero``, ``trim``."""
        return bool(getattr(self.handle, f"can_{what}")())

    @property
    def is_read_only(self) -> bool:
        """Whether the export cannot be written."""
        return bool(self.handle.is_read_only())

    def has_context(self, name: str) -> bool:
        """Whether a metadata context was negotiated."""
        return bool(self.handle.can_meta_context(name))

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the export's bytes from ``offset`` on; of any length up to 32 MiB.

        Raises:
            ServerError: The read failed; ``view`` holds anything.
        """
        await self._run(
            f"reading {len(view)} bytes at {offset}",
            lambda done: self.handle.aio_pread(view, offset, done),
        )

    async def write(self, offset: int, data: memoryview) -> None:
        """Write ``data`` at ``offset``; they stay untouched by the caller until the return.

        Raises:
            ServerError: The write failed.
        """
        await self._run(
            f"writing {len(data)} bytes at {offset}",
            lambda done: self.handle.aio_pwrite(data, offset, done),
        )

    async def write_zeroes(self, offset: int, length: int) -> None:
        """Make a range read as zeroes; the server may make a hole of it."""
        await self._run(
            f"zeroing {length} bytes at {offset}",
            lambda done: self.handle.aio_zero(length, offset, done),
        )

    async def flush(self) -> None:
        """Make durable what was written before this call."""
        await self._run("flushing", lambda done: self.handle.aio_flush(done))

    async def block_status(self, offset: int, length: int) -> list[tuple[str, list[int]]]:
        """Ask for the block status of a range, once.

        Returns:
            One entry for each answer to a context: its name, and lengths and status in
            turns, just as the server sent them.
        """
        answers: list[tuple[str, list[int]]] = []
        errors: list[int] = []

        def extent(context: str, _offset: int, entries: list[int], error: Any) -> int:
            answers.append((context, list(entries)))
            if error.value:
                errors.append(error.value)
            return 0

        what = f"asking for the block status of {length} bytes at {offset}"
        await self._run(
            what, lambda done: self.handle.aio_block_status(length, offset, extent, done)
        )
        if errors:
            raise command_error(self.uri, what, errors[0])
        return answers

    async def _run(self, what: str, issue: _Issue) -> None:
        """Queue a command and wait for its answer.

        A caller that is cancelled waits for the answer all the same: its buffer is in use.
        """
        future: asyncio.Future[int] = self._loop.create_future()

        def done(error: Any) -> int:
            if not future.done():
                future.set_result(error.value)
            return 1

        if not self._pending:
            self._moved_at = self._loop.time()
        self._pending.add(future)
        try:
            if self._is_closed:
                raise ServerError(f"{self.uri}: {self._ending(what)}")
            self._start_timer()
            issue(done)
            self._watch()
            errnum = await self._answer(future)
        except self._module.Error as error:
            raise server_error(self.uri, error) from None
        finally:
            self._pending.discard(future)
        if errnum == _CLOSED:
            raise ServerError(f"{self.uri}: {self._ending(what)}")
        if errnum:
            raise command_error(self.uri, what, errnum)

    def _ending(self, what: str) -> str:
        """Why a command has no answer on a connection that is closed."""
        if self._has_hung and self._timeout is not None:
            return silence(what, self._timeout)
        return f"{what}: the connection is closed"

    def _start_timer(self) -> None:
        if self._timeout is not None and self._timer is None:
            self._timer = self._loop.call_at(self._moved_at + self._timeout, self._on_time)

    def _on_time(self) -> None:
        """The server has been silent for the time limit, or has moved since the timer began."""
        self._timer = None
        if self._is_closed or not self._pending or self._timeout is None:
            return
        if self._loop.time() - self._moved_at >= self._timeout:
            self._has_hung = True
            self.close()
        else:
            self._start_timer()

    async def _answer(self, future: asyncio.Future[int]) -> int:
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            self.close()  # nothing will be read into the buffer any more
            raise

    def _turn(self, notify: Callable[[], object]) -> None:
        """Let the machine go on; what was pending on a dead connection fails."""
        try:
            if not self._is_closed:
                notify()
        except self._module.Error:
            self.close()
        else:
            self._watch()

    def _on_readable(self) -> None:
        self._moved_at = self._loop.time()
        self._turn(self.handle.aio_notify_read)

    def _on_writable(self) -> None:
        self._moved_at = self._loop.time()
        self._turn(self.handle.aio_notify_write)

    def _watch(self) -> None:
        """Let the loop watch for what the machine waits for."""
        if self._is_closed:
            return
        wanted = self.handle.aio_get_direction()
        changed = wanted ^ self._watching
        if changed & _DIRECTION_READ:
            if wanted & _DIRECTION_READ:
                self._loop.add_reader(self._fd, self._on_readable)
            else:
                self._loop.remove_reader(self._fd)
        if changed & _DIRECTION_WRITE:
            if wanted & _DIRECTION_WRITE:
                self._loop.add_writer(self._fd, self._on_writable)
            else:
                self._loop.remove_writer(self._fd)
        self._watching = wanted
        if self.handle.aio_is_dead() or self.handle.aio_is_closed():
            self.close()

    def close(self) -> None:
        """Drop the connection; commands that are not answered fail."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        for future in self._pending:
            if not future.done():
                future.set_result(_CLOSED)
        self.handle = None

    def disconnect(self) -> None:
        """Say goodbye, if the server still listens, without waiting for it, and close."""
        if not self._is_closed and not self._pending:
            with suppress(self._module.Error):  # everything that mattered was answered before
                self.handle.aio_disconnect()
        self.close()
