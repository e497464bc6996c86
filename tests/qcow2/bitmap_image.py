"""A minimal qcow2 driver under the bitmap store, on a disk in memory that remembers its writes.

It knows refcounts and nothing of guest data, and was written without a look at the
real driver, so that a mistake of one does not hide one of the other.
"""

from __future__ import annotations

import json
import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nbd

from nbdfleece.block.file import FileNode
from nbdfleece.qcow2.header import Header, unpack_header
from nbdfleece.qcow2.tables import MetadataMap

SECTOR = 512


class RecordingFile(FileNode):
    """A file in memory; what was written, and when it became durable, is in ``log``."""

    def __init__(self, content: bytes, path: str = "memory.qcow2") -> None:
        self.content = bytearray(content)
        self.path = path
        self.log: list[tuple[int, bytes] | None] = []
        """``(offset, bytes)`` of each write; None for a flush."""
        self.fail_at: int | None = None
        """The write or flush of this number fails, and all that follow until it is None."""

    @property
    def size(self) -> int:  # type: ignore[override]  # an attribute that is always up to date
        return len(self.content)

    async def read_into(self, offset: int, view: memoryview) -> None:
        view[:] = bytes(self.content[offset : offset + len(view)]).ljust(len(view), b"\0")

    async def write(self, offset: int, data: memoryview) -> None:
        self._check()
        self.log.append((offset, bytes(data)))
        apply_write(self.content, offset, bytes(data))

    async def flush(self) -> None:
        self._check()
        self.log.append(None)

    def _check(self) -> None:
        if self.fail_at is not None and len(self.log) >= self.fail_at:
            raise OSError(5, "Input/output error", self.path)


class SimpleImage:
    """The least that :class:`~nbdfleece.qcow2.directory_switch.BitmapImage` asks for."""

    def __init__(self, file: RecordingFile, header: Header) -> None:
        self.file = file
        self.header = header
        self.path = file.path
        self.size = header.size
        self.cluster_size = header.cluster_size
        self.read_only = False
        self.metadata = MetadataMap(header.cluster_bits)
        self.quarantined: list[int] = []
        self.free: list[int] = []

    @classmethod
    def from_bytes(cls, content: bytes) -> SimpleImage:
        """Open an image in memory; autoclear bits are left as they are."""
        header = unpack_header(content[: 1 << 21], "memory.qcow2", len(content))
        return cls(RecordingFile(content), header)

    async def allocate_clusters(self, count: int) -> int:
        """The lowest free run, as QEMU does: reuse is what finds mistakes."""
        for first in sorted(self.free):
            run = [first + index * self.cluster_size for index in range(count)]
            if all(offset in self.free for offset in run):
                self.free = [offset for offset in self.free if offset not in run]
                break
        else:
            first = -(-self.file.size // self.cluster_size) * self.cluster_size
            end = first + count * self.cluster_size
            await self.file.write(end - 1, memoryview(b"\0"))
            run = list(range(first, end, self.cluster_size))
        for offset in run:
            await self._set_refcount(offset, 1)
        return first

    def free_clusters(self, offset: int, count: int) -> None:
        self.quarantined += [offset + index * self.cluster_size for index in range(count)]

    async def flush(self) -> None:
        freed, self.quarantined = self.quarantined, []
        await self.file.flush()
        for offset in freed:
            await self._set_refcount(offset, 0)
        self.free += freed

    async def _set_refcount(self, offset: int, count: int) -> None:
        index = offset // self.cluster_size
        table_index, block_index = divmod(index, self.cluster_size // 2)
        entry_offset = self.header.refcount_table_offset + 8 * table_index
        (block,) = struct.unpack(">Q", await self.file.read(entry_offset, 8))
        if not block:
            block = -(-self.file.size // self.cluster_size) * self.cluster_size
            await self.file.write(block, memoryview(bytes(self.cluster_size)))
            await self.file.flush()
            await self.file.write(entry_offset, memoryview(struct.pack(">Q", block)))
            await self._set_refcount(block, 1)
        await self.file.write(block + 2 * block_index, memoryview(struct.pack(">H", count)))


def apply_write(content: bytearray, offset: int, data: bytes) -> None:
    """Write into a buffer that grows as a file does."""
    if offset + len(data) > len(content):
        content.extend(bytes(offset + len(data) - len(content)))
    content[offset : offset + len(data)] = data


def durable_content(start: bytes, log: list[tuple[int, bytes] | None]) -> bytes:
    """What is certain to be there after a power cut at the log's end."""
    content = bytearray(start)
    for item in log[: len(log) - log[::-1].index(None)]:
        if item is not None:
            apply_write(content, *item)
    return bytes(content)


def crash_states(start: bytes, log: list[tuple[int, bytes] | None], seed: int) -> Iterator[bytes]:
    """What a power cut may leave: every prefix, and sectors in any order between two flushes."""
    choose = random.Random(seed)
    durable = bytearray(start)
    pending: list[tuple[int, bytes]] = []
    for item in [*log, None]:
        if item is not None:
            pending += _sectors(*item)
            prefix = bytearray(durable)
            for write in pending:
                apply_write(prefix, *write)
            yield bytes(prefix)
            continue
        for _ in range(3 if len(pending) > 1 else 0):
            torn = bytearray(durable)
            for write in choose.sample(pending, choose.randrange(len(pending))):
                apply_write(torn, *write)
            yield bytes(torn)
        for write in pending:
            apply_write(durable, *write)
        pending = []
    yield bytes(durable)


def _sectors(offset: int, data: bytes) -> list[tuple[int, bytes]]:
    """A write cut at sector boundaries: each part happens whole or not at all."""
    parts = []
    while data:
        length = SECTOR - offset % SECTOR
        parts.append((offset, data[:length]))
        offset, data = offset + length, data[length:]
    return parts


def qemu_img(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run qemu-img."""
    return subprocess.run(
        ["qemu-img", *map(str, arguments)], check=check, capture_output=True, text=True, timeout=120
    )


def create(path: Path, size: int = 10 << 20, **options: object) -> Path:
    """Make an image with qemu-img."""
    pairs = [f"{key}={value}" for key, value in options.items()]
    extra = ["-o", ",".join(pairs)] if pairs else []
    qemu_img("create", "-q", "-f", "qcow2", *extra, path, str(size))
    return path


def check_image(path: Path) -> None:
    """``qemu-img check`` finds nothing, or nothing worse than leaks."""
    result = qemu_img("check", "--output=json", path, check=False)
    assert result.returncode in (0, 3), result.stdout + result.stderr


def listed_bitmaps(path: Path) -> dict[str, tuple[int, set[str]]]:
    """Granularity and flags of the bitmaps that QEMU sees."""
    info = json.loads(qemu_img("info", "--output=json", path).stdout)
    bitmaps = info["format-specific"]["data"].get("bitmaps", [])
    return {item["name"]: (item["granularity"], set(item["flags"])) for item in bitmaps}


def qemu_dirty_ranges(path: Path, name: str) -> list[tuple[int, int]]:
    """What qemu-nbd reports as dirty in a bitmap, as ``(offset, length)``."""
    connection = nbd.NBD()
    context = f"qemu:dirty-bitmap:{name}"
    connection.add_meta_context(context)
    server = ["qemu-nbd", "-r", "-f", "qcow2", "-B", name, str(path)]
    connection.connect_systemd_socket_activation(server)
    ranges = _dirty_ranges(connection, context)
    connection.shutdown()
    return ranges


def _dirty_ranges(connection: nbd.NBD, context: str) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    offset, size = 0, connection.get_size()

    def note(_name: str, start: int, entries: list[int], _error: object) -> int:
        nonlocal offset
        offset = start
        for length, flags in zip(entries[::2], entries[1::2], strict=True):
            if flags and ranges and sum(ranges[-1]) == offset:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + length)
            elif flags:
                ranges.append((offset, length))
            offset += length
        return 0

    while offset < size:
        connection.block_status(min(size - offset, 1 << 31), offset, note)
    return ranges
