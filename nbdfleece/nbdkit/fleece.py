"""A script as a disk of the engine: one handle, opened by the server itself.

Snapshots and checkpoints need to see every write, so all clients share the handle, and clients
are told what the engine offers: where the script has no ``flush`` or ``trim``, there is nothing
to do for them.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Any, Self, TypeVar

from ..block.threads import finished
from .calls import Client
from .errors import CallbackError, ScriptError
from .gate import Gate, Threads
from .handle import Handle
from .host import CLOSING_SECONDS, DEFAULT_THREADS, clean_up
from .lifecycle import Plugin
from .module import PARALLEL, log
from .node import PluginNode

T = TypeVar("T")


class DiskNode(PluginNode):
    """A handle that every client writes through.

    Who is cancelled waits for the end of its call all the same: a snapshot that begins must know
    of every write that may still reach the disk (rules 1 and 2).

    Args:
        handle: Open.
        gate: Where its calls run.
        client: What the script knows as its client.
        closing_seconds: How long ``close`` may take.
    """

    reads_as_asked = False

    def __init__(self, handle: Handle, gate: Gate, client: Client, closing_seconds: float):
        super().__init__(handle, gate, client)
        self._closing_seconds = closing_seconds
        self._calls: set[asyncio.Future[Any]] = set()
        self._is_given_up = False
        self._is_closed = False

    async def _call(self, job: Callable[[], T]) -> T:
        if self._is_given_up:
            raise _ending()
        call = self._gate.begin(self._client, job)
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return await finished(call)

    def give_up(self) -> None:
        """Let the calls that have not returned fail: the server ends."""
        self._is_given_up = True
        for call in list(self._calls):
            if not call.done():
                call.set_exception(_ending())

    async def flush(self) -> None:
        """Call ``flush``, if there is one."""
        if self._handle.facts.can_flush:
            await super().flush()

    async def trim(self, offset: int, length: int) -> None:
        """Call ``trim``, if there is one: it is a hint."""
        if self._handle.facts.can_trim:
            await super().trim(offset, length)

    async def close(self) -> None:
        """Close the handle, the first time; a callback that does not return is left behind."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            async with asyncio.timeout(self._closing_seconds):
                await self._gate.run(self._client, self._handle.close)
        except TimeoutError:
            log.error("close: error: it does not return, or another callback does not")


def _ending() -> CallbackError:
    return CallbackError("a callback", errno.ESHUTDOWN, "the server ends")


class ScriptDisk:
    """A script's disk, from entering this context to leaving it; inside an event loop.

    Args:
        plugin: The script; ``after_fork`` was called.
        export_name: What ``nbdkit.export_name()`` is.
        threads: Callbacks at a time, if the script's thread model is PARALLEL.
        closing_seconds: How long ``close`` may take.
    """

    def __init__(
        self,
        plugin: Plugin,
        export_name: str = "",
        threads: int = DEFAULT_THREADS,
        closing_seconds: float = CLOSING_SECONDS,
    ) -> None:
        self._plugin = plugin
        self._closing_seconds = closing_seconds
        self._threads = Threads()
        width = threads if plugin.thread_model == PARALLEL else 1
        self._gate = Gate(self._threads, width)
        self._client = Client(disconnect=lambda force: None, export_name=export_name)

    async def __aenter__(self) -> Self:
        """Start."""
        return self

    async def open(self) -> DiskNode:
        """Open the handle; closed by closing the node.

        Raises:
            ScriptError: The script refuses, or cannot be written.
        """
        script = self._plugin.script
        try:
            handle = await self._gate.run(self._client, lambda: Handle(script, read_only=False))
        except CallbackError as error:
            raise ScriptError(f"{script.path}: {error}") from error
        node = DiskNode(handle, self._gate, self._client, self._closing_seconds)
        if node.read_only:
            await node.close()
            raise ScriptError(f"{script.path}: --fleece needs a script that can be written")
        return node

    async def __aexit__(self, *_: object) -> None:
        """Call ``cleanup``."""
        self._plugin.server.is_ending.set()
        await clean_up(self._plugin.script, self._threads)
