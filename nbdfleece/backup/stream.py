"""Restore points as a stream: for a pipe to another machine, a tape, an object store.

A stream is lines, each with its checksum, and after most of them bytes::

    CRC32 SP {"type": "head", "format": "nbdfleece-stream", "version": 1, "point": ...} LF
    CRC32 SP {"type": "block", "disk": 0, "number": 7, ..., "length": 65536} LF
    65536 bytes
    ...
    CRC32 SP {"type": "end", "blocks": 1234, "blake2b": ...} LF

The CRC32 is that of the JSON, in 8 hexadecimal digits. A block is a range of
:data:`~nbdfleece.backup.manifest.BLOCK_BYTES` of one disk, as in a manifest: its extents
(all of the range: 0 as in the parent, or zeroes of a full one; 1 data; 3 zeroes) and the
BLAKE2b of its data. The bytes are its data extents' one after another, compressed as
``encoding`` says. Blocks come in any order, each at most once; one that is left out says
nothing but 0. ``blake2b`` of the end is that of every byte of the stream before its line:
a stream without an end was cut. Streams may follow one another.

It is a format of our own because the ones there are (tar, QEMU's images, virtnbdbackup's
sparse stream) want to know a size before the bytes that come, or have no checksums.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import zlib
from datetime import datetime
from typing import Any, BinaryIO, Final, Literal

import msgspec

from .blocks import ABSENT, DATA, ZEROES
from .errors import BackupError
from .journal import pack_line, unpack_line
from .manifest import BLOCK_BYTES, HASH_BYTES, Compression, Kind, checksum

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FORMAT: Final = "nbdfleece-stream"
VERSION: Final = 1

_LINE_BYTES_MAX: Final = 4 << 20
"""A block's extents are sectors at least: 8192 of them have far shorter a line."""

_DISKS_MAX: Final = 1024


class StreamDisk(msgspec.Struct, kw_only=True):
    """A disk of a stream; the attributes are those of a manifest's entry.

    Attributes:
        name: The disk's name.
        size: Bytes of the disk.
        kind: Whether everything or only what changed since ``parent`` is there.
        parent: The name of the restore point below, or of the checkpoint it was made with.
        parent_size: Bytes that the disk had then, if known.
        parent_created: When the server made that checkpoint, in seconds since the epoch, if
            known: another one may have got its name.
        reason: Why it is full although an increment was asked for.
        uri: Where it was pulled from.
        bitmap: The metadata context that told what changed.
    """

    name: str
    size: int
    kind: Kind
    parent: str | None
    parent_size: int | None
    parent_created: float | None
    reason: str | None
    uri: str
    bitmap: str | None


class StreamHead(msgspec.Struct, kw_only=True, tag="head"):
    """How a stream begins; the attributes are those of a manifest's point."""

    format: str = FORMAT
    version: int = VERSION
    point: str
    checkpoint: str | None
    checkpoint_created: float | None
    started: datetime
    tool: str
    disks: list[StreamDisk]


class StreamBlock(msgspec.Struct, kw_only=True, tag="block"):
    """What is in a block of a disk.

    Attributes:
        disk: The disk's number in the head.
        number: The block's number.
        checksum: Of its data; None if it has none.
        extents: Lengths and status of the whole block.
        read_bytes: What was read for it.
        encoding: How the bytes that follow are compressed.
        length: How many there are.
    """

    disk: int
    number: int
    checksum: str | None
    extents: list[tuple[int, int]]
    read_bytes: int
    encoding: Compression | None
    length: int

    @property
    def data_bytes(self) -> int:
        """Bytes of its data."""
        return sum(length for length, status in self.extents if status == DATA)


class StreamEnd(msgspec.Struct, kw_only=True, tag="end"):
    """How a stream ends: how many blocks there were, and the checksum of all that was before."""

    blocks: int
    blake2b: str


class StreamWriter:
    """Writes a stream.

    Args:
        file: Where to.
        head: What it is.
    """

    def __init__(self, file: BinaryIO, head: StreamHead) -> None:
        self._file = file
        self._head = head
        self._blocks = 0
        self._digest = hashlib.blake2b(digest_size=HASH_BYTES)
        self._order = asyncio.Lock()

    async def begin(self) -> None:
        """Write the head.

        Raises:
            OSError: It cannot be written.
        """
        await asyncio.to_thread(self._write, [pack_line(self._head)])

    async def write(self, block: StreamBlock, payload: list[memoryview]) -> None:
        """Write a block, one after another.

        Raises:
            OSError: It cannot be written.
        """
        async with self._order:
            await asyncio.to_thread(self._write, [pack_line(block), *payload])
            self._blocks += 1

    async def finish(self) -> None:
        """Write the end.

        Raises:
            OSError: It cannot be written.
        """
        end = StreamEnd(blocks=self._blocks, blake2b=self._digest.hexdigest())
        await asyncio.to_thread(self._write, [pack_line(end)])

    def _write(self, parts: list[bytes | memoryview]) -> None:
        for part in parts:
            self._digest.update(part)
            left = memoryview(part)
            while left:
                left = left[self._file.write(left) :]
        self._file.flush()


class StreamReader:
    """Reads streams that follow one another, and believes nothing that was not checked.

    Args:
        file: Where from.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._head: StreamHead | None = None
        self._seen: set[tuple[int, int]] = set()
        self._digest = hashlib.blake2b(digest_size=HASH_BYTES)

    def head(self) -> StreamHead | None:
        """The head of the next stream; None if there is none. Blocks, as all methods here.

        Raises:
            BackupError: It is none that this version can read.
            OSError: It cannot be read.
        """
        self._seen.clear()
        self._digest = hashlib.blake2b(digest_size=HASH_BYTES)
        line = self._file.readline(_LINE_BYTES_MAX)
        if not line:
            return None
        head = unpack_line(line, StreamHead)
        if head is None or head.format != FORMAT:
            raise BackupError("the input is no stream of restore points, or damaged in its head")
        if head.version != VERSION:
            raise BackupError(f"version {head.version} of the stream is not known, only {VERSION}")
        if not 0 < len(head.disks) <= _DISKS_MAX:
            raise BackupError("the stream's head cannot be meant: how many disks there are")
        self._digest.update(line)
        self._head = head
        return head

    def block(self) -> tuple[StreamBlock, bytes] | None:
        """The next block with its bytes as they are in the stream; None at the stream's end.

        Raises:
            BackupError: The stream is cut or damaged.
            OSError: It cannot be read.
        """
        line = self._file.readline(_LINE_BYTES_MAX)
        if not line:
            raise BackupError("the stream was cut: it has no end")
        record = unpack_line(line, StreamBlock)
        if record is None:
            self._check_end(unpack_line(line, StreamEnd))
            return None
        self._check(record)
        payload = self._file.read(record.length)
        if len(payload) < record.length:
            raise BackupError(f"the stream was cut in block {record.number}")
        self._digest.update(line)
        self._digest.update(payload)
        return record, payload

    def _check_end(self, end: StreamEnd | None) -> None:
        """Whether the stream ends here, and is what was written.

        Raises:
            BackupError: It does not, or is not.
        """
        if end is None:
            raise BackupError(f"the stream is cut or damaged after {len(self._seen)} blocks")
        if (end.blocks, end.blake2b) != (len(self._seen), self._digest.hexdigest()):
            raise BackupError("the stream is damaged: its checksum does not fit")

    def _check(self, block: StreamBlock) -> None:
        """Whether a block can be meant.

        Raises:
            BackupError: It cannot.
        """
        assert self._head is not None, "the head is read first"
        key = (block.disk, block.number)
        disks = self._head.disks
        size = disks[block.disk].size if 0 <= block.disk < len(disks) else 0
        begin = block.number * BLOCK_BYTES
        if not 0 <= begin < size or key in self._seen:
            raise BackupError(f"the stream cannot be meant: block {key}")
        lengths = [length for length, _ in block.extents]
        is_whole = sum(lengths) == min(BLOCK_BYTES, size - begin) and min(lengths) > 0
        statuses = {status for _, status in block.extents}
        if not is_whole or not statuses <= {ABSENT, DATA, ZEROES}:
            raise BackupError(f"the stream cannot be meant: extents of block {key}")
        if not 0 <= block.length <= block.data_bytes:
            raise BackupError(f"the stream cannot be meant: bytes of block {key}")
        self._seen.add(key)


def encode(data: list[memoryview], compression: Compression | None) -> tuple[Any, list[memoryview]]:
    """A block's bytes for a stream: the encoding, and the bytes. Takes its time: for a thread.

    Args:
        data: The data extents' bytes.
        compression: How to compress them, if they become smaller.
    """
    length = sum(map(len, data))
    if compression is None or not length:
        return None, data
    if compression == "zlib":
        deflater = zlib.compressobj()
        packed = b"".join([*map(deflater.compress, data), deflater.flush()])
    else:
        compressor = zstd.ZstdCompressor()
        packed = b"".join([*map(compressor.compress, data), compressor.flush()])
    if len(packed) >= length:
        return None, data
    return compression, [memoryview(packed)]


def decode(block: StreamBlock, payload: bytes) -> memoryview:
    """A block's data, checked. Takes its time: for a thread.

    Raises:
        BackupError: They are not what was pulled.
    """
    try:
        data = _decompress(payload, block.encoding, block.data_bytes)
    except (zlib.error, zstd.ZstdError) as error:
        raise BackupError(f"block {block.number} of the stream is damaged: {error}") from None
    found = checksum([data]) if data else None
    if len(data) != block.data_bytes or found != block.checksum:
        raise BackupError(f"block {block.number} of the stream is damaged: its checksum is wrong")
    return memoryview(data)


def _decompress(payload: bytes, encoding: Literal["zlib", "zstd"] | None, length: int) -> bytes:
    """At most ``length`` bytes."""
    if encoding is None or not length:
        return payload
    if encoding == "zlib":
        return zlib.decompressobj().decompress(payload, length)
    return zstd.ZstdDecompressor().decompress(payload, length)
