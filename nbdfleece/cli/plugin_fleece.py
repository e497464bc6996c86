"""``nbdfleece plugin --fleece``: the engine over a script's disk."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Self

from ..daemon import Daemon, DaemonOptions
from ..engine.disk import ScratchOptions
from ..nbdkit.fleece import DiskNode, ScriptDisk
from ..nbdkit.host import HostOptions
from ..nbdkit.lifecycle import Plugin
from ..qcow2.create import create_image
from ..server.listener import Listener


class FleeceServer:
    """A running server, from entering this context to leaving it; inside an event loop.

    Args:
        plugin: The script; ``after_fork`` was called.
        options: How to serve it.
        listeners: Where; this object's from now on.
        values: The command's options ``fleece``, ``disk``, ``control``, ``scratch_dir`` and
            ``exportname``.
    """

    def __init__(
        self,
        plugin: Plugin,
        options: HostOptions,
        listeners: Sequence[Listener],
        values: dict[str, Any],
    ) -> None:
        self._plugin = plugin
        self._options = options
        self._listeners = list(listeners)
        self._values = values
        self._opened = AsyncExitStack()
        self._node: DiskNode | None = None
        self._ending = asyncio.Event()

    async def __aenter__(self) -> Self:
        """Open the script's disk and let clients in."""
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """End: bitmaps are stored, the handle is closed."""
        await self._stop()

    async def _start(self) -> None:
        values, options = self._values, self._options
        disk = ScriptDisk(
            self._plugin, values["exportname"], options.threads, options.closing_seconds
        )
        await self._opened.enter_async_context(disk)
        self._node = node = await disk.open()
        self._opened.push_async_callback(node.close)  # in case that the engine never has it
        await make_side_file(values["fleece"], node)
        daemon = Daemon(
            DaemonOptions(
                disks={values["disk"]: values["fleece"]},
                nodes={values["disk"]: node},
                control=values["control"],
                limits=options.limits,
                tls=options.tls,
                authorization=options.authorizer,
                scratch=ScratchOptions(directory=values["scratch_dir"]),
                grace_seconds=options.grace_seconds,
            )
        )
        await self._opened.enter_async_context(daemon)
        while self._listeners:
            daemon.server.add_listener(self._listeners.pop(0))
        loop = asyncio.get_running_loop()

        def end() -> None:
            loop.call_soon_threadsafe(self.request_stop)

        self._plugin.server.on_end = end
        if self._plugin.server.is_ending.is_set():
            self.request_stop()
        self._watcher = asyncio.create_task(self._watch(daemon))

    async def _watch(self, daemon: Daemon) -> None:
        """``quit`` on the control socket ends us too."""
        await daemon.wait_stop_requested()
        self.request_stop()

    async def _stop(self) -> None:
        give_up = None
        if self._node is not None:
            loop, seconds = asyncio.get_running_loop(), self._options.grace_seconds
            give_up = loop.call_later(seconds, self._node.give_up)
        try:
            await self._opened.aclose()
        finally:
            if give_up is not None:
                give_up.cancel()
            for listener in self._listeners:
                listener.close()

    def request_stop(self) -> None:
        """Have :meth:`wait_end` return."""
        self._ending.set()

    async def wait_end(self) -> None:
        """Wait until it is time to end."""
        await self._ending.wait()


async def make_side_file(path: Path, node: DiskNode) -> None:
    """Make the image for bitmaps, if it is not there.

    Raises:
        OSError: It cannot be made.
    """
    with suppress(FileExistsError):
        await create_image(path, node.size)
