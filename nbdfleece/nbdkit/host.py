"""A script, served over NBD until it is stopped.

End
    Clients finish what is in flight, within a time of grace; handles are closed; ``cleanup`` is
    called. A callback that does not return holds none of this up for longer than the grace.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from ..export.export import ExportTable
from ..server.channel import Channel
from ..server.limits import Limits
from ..server.listener import Listener
from ..server.server import NbdServer
from ..server.tls import Authorization, Authorizer, TlsSettings
from .errors import CallbackError
from .gate import Gate, Threads
from .lifecycle import Plugin
from .module import PARALLEL, SERIALIZE_ALL_REQUESTS, SERIALIZE_CONNECTIONS, log
from .script import Script
from .session import PluginSession

GRACE_SECONDS: Final = 10.0
"""How long requests in flight may take at the end."""

CLOSING_SECONDS: Final = 5.0
"""How long ``close`` of all handles and ``cleanup`` may take after that, each."""

DEFAULT_THREADS: Final = 16
"""Requests of one connection at a time, of a script that allows it; nbdkit's number."""

_PRECONNECTS_MAX: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class HostOptions:
    """How to serve a script.

    Attributes:
        read_only: ``open`` is told so, and nobody may write.
        threads: Requests of one connection at a time, if the script's thread model is PARALLEL.
        limits: What clients may take.
        tls: How to do TLS; None for not at all.
        authorizer: Who may have which export; None for everybody all.
        grace_seconds: How long requests in flight may take at the end.
        closing_seconds: How long ``close`` of all handles may take after that.
    """

    read_only: bool = False
    threads: int = DEFAULT_THREADS
    limits: Limits = field(default_factory=Limits)
    tls: TlsSettings | None = None
    authorizer: Authorizer | None = None
    grace_seconds: float = GRACE_SECONDS
    closing_seconds: float = CLOSING_SECONDS


class PluginServer:
    """A running server, from entering this context to leaving it; inside an event loop.

    Args:
        plugin: The script; ``after_fork`` was called.
        options: How to serve it.
        listeners: Where; this object's from now on.
        channel: One client that is connected already, whose end is the server's.

    Attributes:
        alone: Held by the only connection, with SERIALIZE_CONNECTIONS.
    """

    def __init__(
        self,
        plugin: Plugin,
        options: HostOptions,
        listeners: Sequence[Listener] = (),
        channel: Channel | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.script = plugin.script
        self.thread_model = plugin.thread_model
        self.read_only = options.read_only
        self.limits = options.limits
        self.authorizer = options.authorizer or Authorization()
        self.alone = asyncio.Lock()
        self._plugin = plugin
        self._options = options
        self._listeners = list(listeners)
        self._channel = channel
        self._threads = Threads()
        self._shared_gate = Gate(self._threads, 1)
        self.preconnect_gate = Gate(self._threads, _PRECONNECTS_MAX)
        self._ends: set[asyncio.Task[None]] = set()
        self._stop_requested = asyncio.Event()
        self._server = NbdServer(
            ExportTable(),
            limits=options.limits,
            tls=options.tls,
            authorization=self.authorizer,
            sessions=lambda connection: PluginSession(self, connection),
        )

    async def __aenter__(self) -> Self:
        """Let clients in."""
        self._plugin.server.on_end = self._request_stop_in_any_thread
        if self._plugin.server.is_ending.is_set():
            self.request_stop()
        while self._listeners:
            self._server.add_listener(self._listeners.pop(0))
        if self._channel is not None:
            self._server.add_channel(self._channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        """End."""
        self._plugin.server.on_end = lambda: None
        self._plugin.server.is_ending.set()
        await self._server.shut_down(self._options.grace_seconds)
        if self._ends:
            await asyncio.wait(self._ends, timeout=self._options.closing_seconds)
        for end in self._ends:
            end.cancel()
        await clean_up(self.script, self._threads)

    def request_stop(self) -> None:
        """Have :meth:`wait_end` return."""
        self._stop_requested.set()

    def _request_stop_in_any_thread(self) -> None:
        self.loop.call_soon_threadsafe(self.request_stop)

    async def wait_end(self) -> None:
        """Wait until it is time to end."""
        ends: list[asyncio.Task[object]] = [asyncio.create_task(self._stop_requested.wait())]
        if self._channel is not None:
            ends.append(asyncio.create_task(self._server.wait_idle()))
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()

    # For sessions.

    @property
    def allows_many(self) -> bool:
        """Whether clients may have several connections at a time."""
        return self.thread_model > SERIALIZE_CONNECTIONS

    def new_gate(self) -> Gate:
        """Where the calls of one connection run, as the thread model allows."""
        if self.thread_model <= SERIALIZE_ALL_REQUESTS:
            return self._shared_gate
        is_parallel = self.thread_model == PARALLEL
        return Gate(self._threads, self._options.threads if is_parallel else 1)

    def keep(self, end: Coroutine[Any, Any, None]) -> None:
        """Run the end of a session."""
        task = self.loop.create_task(end)
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)


async def clean_up(script: Script, threads: Threads) -> None:
    """Call ``cleanup``; an error is only logged."""
    if not script.has("cleanup"):
        return
    gate = Gate(threads, 1)
    with contextlib.suppress(CallbackError):  # it was logged
        try:
            async with asyncio.timeout(CLOSING_SECONDS):
                await gate.run(None, lambda: script.call("cleanup"))
        except TimeoutError:
            log.error("%s: cleanup: error: it does not return", script.path)
