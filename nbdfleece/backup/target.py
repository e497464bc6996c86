"""Where a restore goes: an NBD export, a qcow2 or raw file, a block device.

A target says which parts of it read as zeroes already; a restore leaves those alone where
the disk is zero. A file is made under the name ``FILE.partial`` and gets its own name when
it is whole and durable.
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Final, Literal

import numpy as np

from ..block.file import FileNode
from ..block.node import BlockNode
from ..errors import StateError, UsageError
from ..extents import Extents
from ..nbd.uri import parse_uri
from ..qcow2.create import create_image
from ..qcow2.image import Qcow2Image
from .block_status import ALLOCATION, walk
from .connection import TIMEOUT_SECONDS, Connection, ConnectOptions, connect
from .directory import PARTIAL_SUFFIX
from .errors import ServerError
from .manifest import sync_directory
from .tasks import gather

Format = Literal["raw", "qcow2"]

WRITE_BYTES_MAX: Final = 1 << 20
"""One write to a server: as large as one read."""

_SECTOR: Final = 512


class Target(ABC):
    """Something that a disk is restored to.

    Attributes:
        name: What to call it in messages.
        size: Its bytes; at least the disk's.
    """

    name: str
    size: int

    @abstractmethod
    async def known_zeroes(self) -> Extents:
        """Status 1 where the target reads as zeroes already, 0 where that is not known."""

    @abstractmethod
    async def write(self, offset: int, data: memoryview) -> None:
        """Write ``data`` at ``offset``."""

    @abstractmethod
    async def write_zeroes(self, offset: int, length: int) -> None:
        """Make a range read as zeroes, as a hole where the target can."""

    @abstractmethod
    async def finish(self) -> None:
        """Make everything durable, give a new file its name, and close."""

    @abstractmethod
    async def abort(self) -> None:
        """Close; a new file is removed, what was there before stays half written."""


async def open_target(
    text: str,
    size: int,
    *,
    image_format: Format | None = None,
    overwrite: bool = False,
    connections: int = 4,
    timeout_seconds: float | None = TIMEOUT_SECONDS,
) -> Target:
    """Open what a user names.

    Args:
        text: An NBD URI, the path of a block device, or of a file.
        size: Bytes of the disk.
        image_format: Of a file; None for qcow2 if its name ends so, else raw.
        overwrite: A file that exists may be replaced.
        connections: To a server, at most.
        timeout_seconds: How long a server may be silent while it owes answers; None for ever.

    Raises:
        StateError: The file exists.
        ServerError: The export cannot be written, or is too small.
        UsageError: The device is too small.
        OSError: The file or device cannot be opened.
    """
    if "://" in text or text.startswith("nbd:"):
        parse_uri(text)
        return await ExportTarget.open(text, size, connections, timeout_seconds)
    if _is_device(text):
        return DeviceTarget(text, size)
    if image_format is None:
        image_format = "qcow2" if text.endswith(".qcow2") else "raw"
    return await FileTarget.create(Path(text), size, image_format, overwrite=overwrite)


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _clear_way(path: Path, overwrite: bool) -> Path:
    """The name that a new file has until it is whole, and nothing under that name."""
    if path.exists() and not overwrite:
        raise StateError(f"{path}: exists already; --overwrite replaces it")
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    partial.unlink(missing_ok=True)
    return partial


class FileTarget(Target):
    """A new file. Made by :meth:`create`."""

    def __init__(self, path: Path, partial: Path, node: BlockNode, size: int) -> None:
        self.name = str(path)
        self.size = size
        self._path = path
        self._partial = partial
        self._node = node

    @classmethod
    async def create(
        cls, path: Path, size: int, image_format: Format, *, overwrite: bool = False
    ) -> FileTarget:
        """Make an empty file for a disk.

        Raises:
            StateError: There is a file of this name, and it is not to be overwritten.
            OSError: It cannot be made.
        """
        partial = _clear_way(path, overwrite)
        node: BlockNode
        if image_format == "qcow2":
            await create_image(partial, -(-size // _SECTOR) * _SECTOR)
            node = await Qcow2Image.open(partial, read_only=False)
        else:
            os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))
            os.truncate(partial, size)
            node = FileNode.open(partial, read_only=False)
        return cls(path, partial, node, size)

    async def known_zeroes(self) -> Extents:
        """All of it: the file is new."""
        return Extents.single(self.size, 1)

    async def write(self, offset: int, data: memoryview) -> None:
        """Write into the file."""
        await self._node.write(offset, data)

    async def write_zeroes(self, offset: int, length: int) -> None:
        """Make a hole."""
        await self._node.write_zeroes(offset, length)

    async def finish(self) -> None:
        """Close, and rename durably."""
        await self._node.close()
        self._partial.rename(self._path)
        sync_directory(self._path.parent)

    async def abort(self) -> None:
        """Close and remove."""
        try:
            await self._node.close()
        finally:
            self._partial.unlink(missing_ok=True)


class DeviceTarget(Target):
    """A block device; what is past the disk's end stays."""

    def __init__(self, path: str, size: int) -> None:
        self.name = path
        self._node = FileNode.open(path, read_only=False)
        self.size = self._node.size
        if self.size < size:
            os.close(self._node.fileno())
            raise UsageError(f"{path}: has {self.size} bytes, the disk {size}")

    async def known_zeroes(self) -> Extents:
        """Nothing: a device does not tell."""
        return Extents.single(self.size, 0)

    async def write(self, offset: int, data: memoryview) -> None:
        """Write to the device."""
        await self._node.write(offset, data)

    async def write_zeroes(self, offset: int, length: int) -> None:
        """Zero, discarding where the device can."""
        await self._node.write_zeroes(offset, length)

    async def finish(self) -> None:
        """Flush and close."""
        await self._node.close()

    async def abort(self) -> None:
        """Close."""
        await self._node.close()


class ExportTarget(Target):
    """A writable export. Made by :meth:`open`."""

    def __init__(self, uri: str, connections: list[Connection]) -> None:
        first = connections[0]
        self.name = uri
        self.size = first.size
        self._connections = connections
        self._contexts = (ALLOCATION,) if first.has_context(ALLOCATION) else ()
        self._can_zero = first.can("zero")
        self._can_flush = first.can("flush")
        self._write_bytes_max = min(WRITE_BYTES_MAX, first.request_bytes_max)

    @classmethod
    async def open(
        cls, uri: str, size: int, connections: int, timeout_seconds: float | None
    ) -> ExportTarget:
        """Connect.

        Raises:
            ServerError: There is no server, or the export is read-only or too small.
        """
        first = await connect(uri, ConnectOptions((ALLOCATION,), False, timeout_seconds))
        opened = [first]
        try:
            if first.is_read_only:
                raise ServerError(f"{uri}: the export is read-only")
            if first.size < size:
                raise ServerError(f"{uri}: the export has {first.size} bytes, the disk {size}")
            if first.can("multi_conn"):
                more = ConnectOptions(timeout_seconds=timeout_seconds)
                opened += [await connect(uri, more) for _ in range(connections - 1)]
        except BaseException:
            for connection in opened:
                connection.close()
            raise
        return cls(uri, opened)

    async def known_zeroes(self) -> Extents:
        """Where base:allocation says zero."""
        if not self._contexts:
            return Extents.single(self.size, 0)
        found = await walk(self._connections[0], self.name, self.size, self._contexts)
        allocation = found[ALLOCATION]
        return allocation.with_status(np.right_shift(allocation.status, 1) & np.uint32(1))

    async def write(self, offset: int, data: memoryview) -> None:
        """Write, in several commands side by side if there is much."""
        step = self._write_bytes_max
        await gather(
            self._idlest().write(offset + start, data[start : start + step])
            for start in range(0, len(data), step)
        )

    async def write_zeroes(self, offset: int, length: int) -> None:
        """Zero; with a server that cannot, by writing zeroes."""
        if self._can_zero:
            await self._idlest().write_zeroes(offset, length)
            return
        zeroes = memoryview(bytes(min(length, self._write_bytes_max)))
        for start in range(0, length, len(zeroes)):
            part = zeroes[: min(len(zeroes), length - start)]
            await self._idlest().write(offset + start, part)

    def _idlest(self) -> Connection:
        return min(self._connections, key=lambda connection: connection.in_flight)

    async def finish(self) -> None:
        """Flush (one flush is for all connections, as MULTI_CONN promises) and disconnect."""
        if self._can_flush:
            await self._connections[0].flush()
        for connection in self._connections:
            connection.disconnect()

    async def abort(self) -> None:
        """Disconnect."""
        for connection in self._connections:
            connection.close()
