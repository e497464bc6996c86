"""One image, served over NBD until it is stopped or its last client has left.

Start
    The listeners are bound already, so that clients that come early wait. The image is opened
    and its bitmaps are found; then clients are let in.

End
    Clients finish what is in flight, bitmaps are stored, files are closed. A start that fails
    ends the same way, as far as it got.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Self

from ..export.contexts import AllocationDepth, BaseAllocation, DirtyBitmap, MetadataContext
from ..export.export import Export, ExportTable
from ..server.limits import Limits
from ..server.listener import Listener
from ..server.server import NbdServer
from ..server.tls import Authorizer, TlsSettings
from .disk import Disk, DiskOptions

GRACE_SECONDS = 10.0
"""How long requests in flight may take at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What to serve, and to whom.

    Attributes:
        disk: The image.
        export: Its name for clients.
        description: For people.
        bitmaps: Dirty bitmaps to show, in the order of LIST.
        allocation_depth: Whether ``qemu:allocation-depth`` is shown.
        clients_max: How many clients there may be at a time, the others wait; None for no
            limit but that of ``limits``.
        is_persistent: Whether to go on when the last client has left.
        limits: What clients may take.
        tls: How to do TLS; None for not at all.
        authorizer: Who may have the export; None for everybody.
    """

    disk: DiskOptions
    export: str = ""
    description: str = ""
    bitmaps: Sequence[str] = ()
    allocation_depth: bool = False
    clients_max: int | None = 1
    is_persistent: bool = False
    limits: Limits = field(default_factory=Limits)
    tls: TlsSettings | None = None
    authorizer: Authorizer | None = None


class ImageServer:
    """A running server, from entering this context to leaving it; inside an event loop.

    Args:
        options: What to serve.
        listeners: Where; this object's from now on.
    """

    def __init__(self, options: ServeOptions, listeners: Sequence[Listener]) -> None:
        self._options = options
        self._listeners = list(listeners)
        self._opened = AsyncExitStack()
        self._stop_requested = asyncio.Event()
        self._server: NbdServer | None = None

    async def __aenter__(self) -> Self:
        """Start.

        Raises:
            NbdfleeceError, OSError: As for :meth:`Disk.open` and :meth:`Disk.bitmap`.
        """
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """End.

        Raises:
            OSError, StateError: The bitmaps could not be stored, or the last writes not flushed.
        """
        await self._stop()

    def request_stop(self) -> None:
        """Have :meth:`wait_end` return."""
        self._stop_requested.set()

    async def wait_end(self) -> None:
        """Wait until it is time to end."""
        assert self._server is not None, "the server has been started"
        waits: list[asyncio.Task[object]] = [asyncio.create_task(self._stop_requested.wait())]
        if not self._options.is_persistent:
            waits.append(asyncio.create_task(self._server.wait_left()))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _start(self) -> None:
        options = self._options
        disk = await Disk.open(options.disk)
        self._opened.push_async_callback(disk.close)
        table = ExportTable([await self._make_export(disk)])
        self._server = NbdServer(
            table, limits=options.limits, tls=options.tls, authorization=options.authorizer
        )
        self._opened.push_async_callback(self._server.shut_down, GRACE_SECONDS)
        while self._listeners:
            self._server.add_listener(self._listeners.pop(0))

    async def _make_export(self, disk: Disk) -> Export:
        options = self._options
        contexts: list[MetadataContext] = [BaseAllocation(disk.node)]
        if options.allocation_depth:
            contexts.append(AllocationDepth(disk.node))
        for name in options.bitmaps:
            contexts.append(DirtyBitmap(name, await disk.bitmap(name)))
        read_only = options.disk.read_only
        return Export(
            name=options.export,
            node=disk.node,
            description=options.description,
            read_only=read_only,
            can_trim=not read_only,
            can_multi_conn=options.clients_max != 1,
            contexts=tuple(contexts),
        )

    async def _stop(self) -> None:
        try:
            await self._opened.aclose()
        finally:
            for listener in self._listeners:
                listener.close()
