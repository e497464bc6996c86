"""A server in a thread, on a Unix socket, for a test that is a plain function or a coroutine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack, ExitStack
from typing import Self

from ..bitmaps.bitmap import Bitmap
from ..block.node import BlockNode
from ..export.contexts import AllocationDepth, BaseAllocation, DirtyBitmap, MetadataContext
from ..export.export import Export, ExportTable
from ..server.listener import listen_unix
from ..server.loop_thread import LoopThread
from ..standalone.disk import Disk, DiskOptions
from .faults import AnyFault, FaultList
from .faulty_server import FaultyServer, Seen
from .memory_node import MemoryNode

GRANULARITY = 4096
"""Bytes per bit of bitmaps that are made for a test."""


class LiveServer:
    """Serves from entering this context, or :meth:`start`, to leaving it, or :meth:`stop`.

    Args:
        disk: What is served: bytes in memory, so many zeroes, a raw or qcow2 file by its path,
            or any block node.
        export: Its name.
        format: Of a file; None for what it looks like.
        read_only: Clients must not write.
        bitmaps: Dirty bitmaps of a qcow2 file to show.
        dirty: Bitmaps to show beside them: for each name what it marks, as offset and length
            in bytes, rounded to 4096.
        faults: What goes wrong from the beginning.

    Attributes:
        node: What is served; a :class:`MemoryNode` has its bytes in ``content``.
        socket: Path of the socket.
    """

    node: BlockNode

    def __init__(
        self,
        disk: bytes | bytearray | int | os.PathLike[str] | BlockNode,
        *,
        export: str = "",
        format: str | None = None,
        read_only: bool = False,
        bitmaps: Iterable[str] = (),
        dirty: Mapping[str, Iterable[tuple[int, int]]] | None = None,
        faults: Iterable[AnyFault] = (),
    ) -> None:
        self._disk = disk
        self._export = export
        self._format = format
        self._read_only = read_only
        self._bitmaps = tuple(bitmaps)
        self._dirty = {name: list(ranges) for name, ranges in (dirty or {}).items()}
        self._faults = FaultList()
        self._faults.add(*faults)
        self._opened = AsyncExitStack()
        self._outer = ExitStack()
        self._loop = LoopThread()
        self._server: FaultyServer | None = None
        self.socket = ""

    @property
    def uri(self) -> str:
        """What a client is to be given."""
        return f"nbd+unix:///{self._export}?socket={self.socket}"

    @property
    def seen(self) -> list[Seen]:
        """The requests so far, of all clients."""
        return [] if self._server is None else list(self._server.seen)

    def inject(self, *faults: AnyFault) -> None:
        """Add faults, for connected clients too."""
        self._faults.add(*faults)

    def heal(self) -> None:
        """Take all faults away."""
        self._faults.clear()

    def start(self) -> Self:
        """Begin to serve; on return clients can connect.

        Raises:
            NbdfleeceError, OSError: The disk cannot be opened, or has no such bitmap.
        """
        with ExitStack() as begun:
            # Short: the path of a Unix socket has 107 bytes at most.
            folder = begun.enter_context(tempfile.TemporaryDirectory(prefix="nbd-"))
            self.socket = os.path.join(folder, "socket")
            begun.enter_context(self._loop)
            begun.callback(lambda: self._loop.run(self._opened.aclose()))
            self._loop.run(self._start())
            self._outer = begun.pop_all()
        return self

    def stop(self) -> None:
        """Close connections and disk.

        Raises:
            OSError, StateError: The bitmaps of a file could not be stored.
        """
        self._outer.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _start(self) -> None:
        contexts = await self._open()
        export = Export(
            name=self._export,
            node=self.node,
            read_only=self._read_only,
            can_trim=not self._read_only,
            contexts=(BaseAllocation(self.node), AllocationDepth(self.node), *contexts),
        )
        self._server = FaultyServer(ExportTable([export]), self._faults)
        self._opened.push_async_callback(self._server.shut_down, 0)
        self._server.add_listener(listen_unix(self.socket))

    async def _open(self) -> list[MetadataContext]:
        """Open the disk; the bitmaps that are to be shown."""
        found: list[MetadataContext] = []
        if isinstance(self._disk, os.PathLike):
            disk = await Disk.open(self._options(self._disk))
            self._opened.push_async_callback(disk.close)
            self.node = disk.node
            found += [DirtyBitmap(name, await disk.bitmap(name)) for name in self._bitmaps]
        else:
            given = self._disk
            self.node = given if isinstance(given, BlockNode) else MemoryNode.sparse(given)
            self._opened.push_async_callback(self.node.close)
        for name, ranges in self._dirty.items():
            bitmap = Bitmap(self.node.size, GRANULARITY)
            for offset, length in ranges:
                bitmap.set_range(offset, length)
            found.append(DirtyBitmap(name, bitmap))
        return found

    def _options(self, path: os.PathLike[str]) -> DiskOptions:
        return DiskOptions(
            name=os.path.abspath(path),
            format=self._format,
            read_only=self._read_only,
            discard=True,
        )
