"""The journal of a pull: what it is about, and which blocks are done and durable.

A pull writes to files that are named ``.partial``. Every few seconds it flushes them, and
only then appends the blocks that were done before the flush to the journal. A pull that is
cut at any moment therefore finds, when it goes on, for every block in the journal its data
in the file; whatever else the file contains is written again.

A line is a checksum, a space, and JSON: first the head, then one line for each block. A
last line that is torn is dropped, with nothing lost but that block.

**When a cut pull may go on.** The bytes that are left must come from the same frozen view
as those that were pulled. NBD has no name for a view, so this is decided by what is known:

1. Size, bitmap, parent and kind of every disk are the same, and the server tells exactly
   the same extents. If not, the pull cannot go on, and says which of these differs.
2. The view has an *identity* that is the same as before (our own server's snapshots have
   one); or the user, who alone can know, says so (``--resume``).
3. A sample of blocks that are done is read again and has the same checksums.
"""

from __future__ import annotations

import os
import zlib
from datetime import datetime
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from .errors import BackupError
from .manifest import Compression, Kind, write_atomically

_FORMAT: Final = "nbdfleece-pull-journal"
_VERSION: Final = 1

_Record = TypeVar("_Record", bound=msgspec.Struct)


class DiskHead(msgspec.Struct, kw_only=True):
    """What a disk's pull is about; it goes on only where all of this is the same.

    Attributes:
        name: The disk's name.
        size: Bytes of the disk.
        kind: Full or incremental.
        parent: The restore point below.
        bitmap: The context that tells what changed.
        extents_blake2b: Checksum of what the server says is to be pulled.
        identity: The frozen view's identity, if it has one.
        compression: How clusters are compressed.
    """

    name: str
    size: int
    kind: Kind
    parent: str | None
    bitmap: str | None
    extents_blake2b: str
    identity: str | None
    compression: Compression | None = None


class Head(msgspec.Struct, kw_only=True):
    """The first line."""

    format: str = _FORMAT
    version: int = _VERSION
    point: str
    checkpoint: str | None
    checkpoint_created: float | None
    started: datetime
    disks: list[DiskHead]


class DoneBlock(msgspec.Struct, array_like=True):
    """A block that is pulled and durable.

    Attributes:
        disk: The disk's number in the head.
        number: The block's number.
        checksum: Of its data; None if it has none.
        extents: Lengths and status of the whole block.
        read_bytes: What was read for it.
    """

    disk: int
    number: int
    checksum: str | None
    extents: list[tuple[int, int]]
    read_bytes: int


class Journal:
    """The journal of one pull. Made by :meth:`create` or :meth:`open`."""

    def __init__(self, path: Path, head: Head, done: list[DoneBlock], size: int) -> None:
        self.path = path
        self.head = head
        self.done = done
        self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        os.ftruncate(self._fd, size)
        os.lseek(self._fd, 0, os.SEEK_END)

    @classmethod
    def create(cls, path: Path, head: Head) -> Journal:
        """Begin a journal; it is durable on return.

        Raises:
            OSError: It cannot be written.
        """
        line = pack_line(head)
        write_atomically(path, line)
        return cls(path, head, [], len(line))

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Go on with the journal of a cut pull.

        Raises:
            BackupError: It is damaged, or another version wrote it.
            OSError: It cannot be read.
        """
        lines = path.read_bytes().splitlines(keepends=True)
        head = unpack_line(lines[0], Head) if lines else None
        if head is None or head.format != _FORMAT or head.version != _VERSION:
            raise BackupError(f"{path}: this is no journal that this version can read")
        size = len(lines[0])
        done: list[DoneBlock] = []
        for line in lines[1:]:
            block = unpack_line(line, DoneBlock)
            if block is None or not 0 <= block.disk < len(head.disks):
                break
            done.append(block)
            size += len(line)
        return cls(path, head, done, size)

    def append(self, blocks: list[DoneBlock]) -> None:
        """Note blocks whose data are durable already; the note is durable on return.

        Raises:
            OSError: It cannot be written; what was torn off is dropped at the next opening.
        """
        data = memoryview(b"".join(map(pack_line, blocks)))
        while data:
            data = data[os.write(self._fd, data) :]
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file; it stays."""
        os.close(self._fd)


def pack_line(record: msgspec.Struct) -> bytes:
    """A record as a line with its checksum."""
    body = msgspec.json.encode(record)
    return b"%08x %s\n" % (zlib.crc32(body), body)


def unpack_line(line: bytes, kind: type[_Record]) -> _Record | None:
    """The record of a line; None if the line is torn or damaged."""
    mark, _, body = line.partition(b" ")
    if not body.endswith(b"\n") or mark != b"%08x" % zlib.crc32(body[:-1]):
        return None
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
