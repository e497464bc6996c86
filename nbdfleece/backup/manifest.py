"""The manifest of a restore point: what it contains, and how to prove it.

A restore point is complete when its manifest is there: the manifest is written last, to a
temporary name, made durable and renamed. It is one JSON object::

    {"format": "nbdfleece-backup", "version": 1, "blake2b": "...", "point": {...}}

``blake2b`` is that of the bytes of the value of ``point`` as they stand in the file. The
encoding is canonical (decoding and encoding gives the same bytes), so that no byte of the
file can change unnoticed.

All checksums are BLAKE2b with 256 bits in hexadecimal; of a file it is what
``b2sum -l 256`` prints. A block's checksum is that of its data extents' bytes one after
another, as the extents of the same manifest list them; a block without data has none.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np

from ..extents import Extents
from .errors import BackupError

FORMAT: Final = "nbdfleece-backup"
VERSION: Final = 1

BLOCK_BYTES: Final = 4 << 20
"""Bytes of the disk that one checksum covers: the unit of pulling, resuming and verifying."""

TEMPORARY_SUFFIX: Final = ".tmp"
"""Of a file that is being written and has not got its name yet."""

HASH_BYTES: Final = 32
_FILE_CHUNK_BYTES: Final = 4 << 20

Kind = Literal["full", "incremental"]
Compression = Literal["zlib", "zstd"]


class DiskEntry(msgspec.Struct, kw_only=True, rename="kebab"):
    """One disk of a restore point.

    Attributes:
        name: The disk's name, the same in all points of a chain.
        size: Bytes of the disk.
        kind: Whether the file has everything or only what changed since ``parent``.
        parent: The restore point whose file of this disk is the backing file.
        reason: Why it is full although an increment was asked for.
        uri: Where it was pulled from.
        bitmap: The metadata context that told what changed.
        file: The qcow2 file, in the manifest's directory.
        file_size: Its bytes.
        file_blake2b: Its checksum.
        block_size: Bytes of the disk that a checksum of ``blocks`` covers.
        blocks: Block numbers and checksums, ascending; blocks without data are left out.
        extents: Lengths and status in turns, for the whole disk: 0 as in the parent (zeroes
            in a full one), 1 data in this file, 3 zeroes in this file.
        read_bytes: What was read from the server.
        compression: How clusters of the file are compressed, if any are.
    """

    name: str
    size: int
    kind: Kind
    parent: str | None
    reason: str | None
    uri: str
    bitmap: str | None
    file: str
    file_size: int
    file_blake2b: str
    block_size: int
    blocks: list[tuple[int, str]]
    extents: list[tuple[int, int]]
    read_bytes: int
    compression: Compression | msgspec.UnsetType = msgspec.UNSET

    def layer(self) -> Extents:
        """The extents as arrays."""
        return Extents.from_pairs(self.extents)

    def changed_bytes(self) -> int:
        """Bytes of the disk that this file says anything of."""
        return sum(length for length, status in self.extents if status)

    def data_bytes(self) -> int:
        """Bytes of data in this file."""
        return sum(length for length, status in self.extents if status == 1)


class Point(msgspec.Struct, kw_only=True, rename="kebab"):
    """A restore point.

    Attributes:
        name: Its name in the backup directory.
        parent: The point that it builds on; None if every disk is full.
        checkpoint: The server's checkpoint that was made with the snapshot: the name to ask
            for changes from.
        checkpoint_created: When the server made it, in seconds since the epoch, where that is
            known: another checkpoint may get the same name later.
        started: When the pull began.
        finished: When it was complete.
        tool: Name and version of the program that made it.
        disks: One entry for each disk.
    """

    name: str
    parent: str | None
    checkpoint: str | None
    checkpoint_created: float | None
    started: datetime
    finished: datetime
    tool: str
    disks: list[DiskEntry]

    def disk(self, name: str) -> DiskEntry:
        """The entry of a disk.

        Raises:
            BackupError: There is none.
        """
        for entry in self.disks:
            if entry.name == name:
                return entry
        raise BackupError(f"restore point {self.name!r} has no disk {name!r}")

    @property
    def size(self) -> int:
        """Bytes of all disks."""
        return sum(disk.size for disk in self.disks)


class _Envelope(msgspec.Struct):
    format: str
    version: int
    blake2b: str
    point: msgspec.Raw


def encode_manifest(point: Point) -> bytes:
    """A restore point as the bytes of its manifest."""
    body = msgspec.json.encode(point)
    envelope = _Envelope(FORMAT, VERSION, checksum([body]), msgspec.Raw(body))
    return msgspec.json.encode(envelope) + b"\n"


def decode_manifest(data: bytes, path: str | os.PathLike[str]) -> Point:
    """The restore point that a manifest's bytes describe.

    Raises:
        BackupError: The manifest is damaged, or another version wrote it.
    """
    name = os.fspath(path)
    try:
        envelope = msgspec.json.decode(data, type=_Envelope)
        if envelope.format != FORMAT:
            raise BackupError(f"{name}: not a manifest of a backup")
        if envelope.version != VERSION:
            raise BackupError(
                f"{name}: version {envelope.version} of the format is not known,"
                f" only {VERSION}: use the program that wrote it"
            )
        point = msgspec.json.decode(envelope.point, type=Point)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BackupError(f"{name}: the manifest is damaged: {error}") from None
    if checksum([bytes(envelope.point)]) != envelope.blake2b or encode_manifest(point) != data:
        raise BackupError(f"{name}: the manifest is damaged: its checksum does not fit")
    _check_point(point, name)
    return point


def _check_point(point: Point, name: str) -> None:
    """What the code relies on and JSON types do not say."""
    for disk in point.disks:
        lengths = [length for length, _ in disk.extents]
        if any(length <= 0 for length in lengths) or sum(lengths) != disk.size:
            raise BackupError(f"{name}: the extents of disk {disk.name!r} are not its size")
        if os.path.basename(disk.file) != disk.file or disk.block_size <= 0:
            raise BackupError(f"{name}: the entry of disk {disk.name!r} cannot be meant")


def checksum(parts: Iterable[bytes | memoryview]) -> str:
    """The checksum of some bytes one after another, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def file_checksum(path: str | os.PathLike[str]) -> str:
    """The checksum of a whole file."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    buffer = memoryview(bytearray(_FILE_CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def layer_pairs(parts: list[Extents]) -> list[tuple[int, int]]:
    """Extents of consecutive parts as a manifest lists them."""
    return Extents.concatenate(parts).pairs() if parts else []


def write_atomically(path: Path, data: bytes) -> None:
    """Put a file in place, durably: it has its old content or the new one, never a part.

    Raises:
        OSError: It cannot be written; the old content, or none, is there.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make a directory's names durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def starts(extents: Extents) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where each extent begins, shape (n,), in bytes."""
    return np.cumsum(extents.lengths) - extents.lengths
