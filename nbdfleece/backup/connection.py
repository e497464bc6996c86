"""One libnbd connection driven by the running event loop.

libnbd is a state machine: commands are queued in it, and it says which of reading and
writing it waits for. Here the loop watches its socket and turns the machine; each command
has a future, which its completion callback resolves. libnbd reads payloads straight from
the socket into the caller's buffer and writes them straight from it: nothing is copied.

A connection that dies fails all its commands. The callbacks run inside calls of the
machine, in the loop's thread; they raise nothing, for libnbd could not pass it on.
"""

from __future__ import annotations

import asyncio
import errno
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


class ConnectOptions(NamedTuple):
    """What to negotiate: metadata contexts, and whether to ask for the export's description."""

    contexts: tuple[str, ...] = ()
    full_info: bool = False


async def connect(uri: str, options: ConnectOptions) -> Connection:
    """Connect and negotiate, in a thread.

    Raises:
        ServerError: There is no server, or it refuses.
        UsageError: libnbd is missing.
    """
    module = load_libnbd()
    handle = module.NBD()
    handle.set_uri_allow_local_file(True)  # tls-psk-file: the URI is the user's own
    handle.set_full_info(options.full_info)
    for context in options.contexts:
        handle.add_meta_context(context)
    try:
        await asyncio.to_thread(handle.connect_uri, uri)
    except module.Error as error:
        raise server_error(uri, error) from None
    handle.set_pread_initialize(False)  # a failed read's buffer is never used
    return Connection(uri, handle, module)


async def offered_contexts(uri: str, queries: tuple[str, ...]) -> list[str]:
    """The metadata contexts that the export offers for some queries, in the server's order.

    Raises:
        ServerError: There is no server, no such export, or no way to ask.
    """
    module = load_libnbd()

    def ask() -> list[str]:
        handle = module.NBD()
        handle.set_uri_allow_local_file(True)
        handle.set_opt_mode(True)
        handle.connect_uri(uri)
        found: list[str] = []
        if not handle.aio_is_negotiating() or not handle.get_structured_replies_negotiated():
            return found
        for query in queries:
            handle.add_meta_context(query)
        handle.opt_list_meta_context(found.append)
        handle.opt_abort()
        return found

    try:
        return await asyncio.to_thread(ask)
    except module.Error as error:
        raise server_error(uri, error) from None


class Connection:
    """A connection in its transmission phase. Made by :func:`connect`."""

    def __init__(self, uri: str, handle: Any, module: Any) -> None:
        self.uri = uri
        self.handle = handle
        self._module = module
        self._loop = asyncio.get_running_loop()
        self._fd: int = handle.aio_get_fd()
        self._watching = 0
        self._pending: set[asyncio.Future[int]] = set()
        self._is_closed = False

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
        buffer = self._module.Buffer.from_buffer(view)
        await self._run(
            f"reading {len(view)} bytes at {offset}",
            lambda done: self.handle.aio_pread(buffer, offset, done),
        )

    async def write(self, offset: int, data: memoryview) -> None:
        """Write ``data`` at ``offset``; they stay untouched by the caller until the return.

        Raises:
            ServerError: The write failed.
        """
        buffer = self._module.Buffer.from_buffer(data)
        await self._run(
            f"writing {len(data)} bytes at {offset}",
            lambda done: self.handle.aio_pwrite(buffer, offset, done),
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

        self._pending.add(future)
        try:
            if self._is_closed:
                raise ServerError(f"{self.uri}: {what}: the connection is closed")
            issue(done)
            self._watch()
            errnum = await self._answer(future)
        except self._module.Error as error:
            raise server_error(self.uri, error) from None
        finally:
            self._pending.discard(future)
        if errnum:
            raise command_error(self.uri, what, errnum)

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
        self._turn(self.handle.aio_notify_read)

    def _on_writable(self) -> None:
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
        """Drop the connection; commands that are not answered fail with ENOTCONN."""
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        for future in self._pending:
            if not future.done():
                future.set_result(errno.ENOTCONN)
        self.handle = None

    def disconnect(self) -> None:
        """Say goodbye, if the server still listens, without waiting for it, and close."""
        if not self._is_closed and not self._pending:
            with suppress(self._module.Error):  # everything that mattered was answered before
                self.handle.aio_disconnect()
        self.close()
