"""Changing the header extensions of a live image without ever writing the header anew.

The header cluster is larger than a sector, so rewriting it can be torn by a power
cut. This module plans changes as a list of writes, each to be made durable before
the next, such that every write either lies in one 512-byte sector or touches only
bytes that no reader looks at. Between any two of them the header is valid:

* **Append**: the backing file's name is copied behind where the extensions will
  end, and the header's pointer to it switched (8 bytes); then everything behind
  the end mark is written, which nobody reads; then the end mark itself (8 bytes)
  becomes the header of the first new extension.
* **Retype**: an extension becomes one of another type (4 bytes). An extension of
  the type :data:`PLACEHOLDER_MAGIC` stands where a bitmaps extension was.

Foreign extensions are never moved or changed.

Spec: qcow2.txt, "Header extensions".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from ..errors import StateError

SECTOR_SIZE: Final = 512
"""What a disk writes whole or not at all."""

PLACEHOLDER_MAGIC: Final = 0x4E424450
"""An extension that holds the place of another and means nothing."""

BACKING_OFFSET_POSITION: Final = 8

_HEADER: Final = struct.Struct(">II")
_BACKING: Final = struct.Struct(">QI")


class HeaderWrite(NamedTuple):
    """Bytes to write at an offset of the file, and then to make durable."""

    offset: int
    data: bytes


class PlacedExtension(NamedTuple):
    """A header extension where it lies; ``offset`` is that of its data, in bytes."""

    type: int
    offset: int
    length: int

    @property
    def straddles_sectors(self) -> bool:
        """Whether a write of its data touches more than one sector."""
        return straddles(self.offset, self.length)


class ExtensionArea(NamedTuple):
    """What an image's first cluster holds behind the header's fields."""

    path: str
    cluster: bytes
    extensions: list[PlacedExtension]
    end: int
    """Where the end mark is, in bytes."""
    backing_offset: int
    """Where the backing file's name is, in bytes; 0 if there is none."""
    backing_length: int

    def find(self, extension_type: int) -> list[PlacedExtension]:
        """All extensions of a type, in their order."""
        return [extension for extension in self.extensions if extension.type == extension_type]

    def data(self, extension: PlacedExtension) -> bytes:
        """The data of an extension."""
        return self.cluster[extension.offset : extension.offset + extension.length]

    def room(self) -> int:
        """Bytes that more extensions may take, their headers included; may be negative."""
        return len(self.cluster) - self.backing_length - self.end - _HEADER.size

    def plan_append(self, extensions: Sequence[tuple[int, bytes]]) -> list[HeaderWrite]:
        """Plan to add extensions behind those that are there.

        Args:
            extensions: ``(type, data)`` of each.

        Raises:
            StateError: The first cluster has no room for them.
        """
        tail = b"".join(_pack(*extension) for extension in extensions)
        if not self._has_end_mark():
            raise StateError(f"{self.path}: the header's extensions have no aligned end mark")
        if len(tail) > self.room():
            raise StateError(
                f"{self.path}: the header has room for {max(self.room(), 0)} bytes of extensions,"
                f" {len(tail)} are needed; larger clusters than {len(self.cluster)} bytes have more"
            )
        end = self.end + len(tail) + _HEADER.size
        hidden = tail[_HEADER.size :] + _HEADER.pack(0, 0)
        return [
            *self._plan_backing_name_behind(end),
            HeaderWrite(self.end + _HEADER.size, hidden),
            HeaderWrite(self.end, tail[: _HEADER.size]),
        ]

    def _has_end_mark(self) -> bool:
        behind = self.end + _HEADER.size
        is_there = behind <= (self.backing_offset or len(self.cluster))
        return is_there and not any(self.cluster[self.end : behind]) and self.end % 8 == 0

    def _plan_backing_name_behind(self, end: int) -> list[HeaderWrite]:
        """Plan to move the backing file's name to ``end`` or behind it if it is before."""
        offset, length = self.backing_offset, self.backing_length
        if not offset or offset >= end:
            return []
        # The copy must not touch the original before the switch.
        target = end if end >= offset + length else offset + length
        if target + length > len(self.cluster):
            raise StateError(f"{self.path}: the header has no room to move the backing file's name")
        return [
            HeaderWrite(target, self.cluster[offset : offset + length]),
            HeaderWrite(BACKING_OFFSET_POSITION, target.to_bytes(8, "big")),
        ]

    def after(self, writes: Sequence[HeaderWrite]) -> ExtensionArea:
        """What the area is once the writes are done."""
        cluster = bytearray(self.cluster)
        for offset, data in writes:
            cluster[offset : offset + len(data)] = data
        return scan_extension_area(bytes(cluster), self.path)


def straddles(offset: int, length: int) -> bool:
    """Whether a range touches more than one sector."""
    return offset // SECTOR_SIZE != (offset + length - 1) // SECTOR_SIZE


def retype(extension: PlacedExtension, extension_type: int) -> HeaderWrite:
    """Plan to give an extension another type."""
    return HeaderWrite(extension.offset - _HEADER.size, extension_type.to_bytes(4, "big"))


def scan_extension_area(cluster: bytes, path: str) -> ExtensionArea:
    """Find the extensions in the first cluster of a version 3 image whose header is sound.

    Args:
        cluster: The whole first cluster.
        path: The image's name, for messages.
    """
    backing_offset, backing_length = _BACKING.unpack_from(cluster, BACKING_OFFSET_POSITION)
    if not backing_offset:
        backing_length = 0
    limit = backing_offset or len(cluster)
    position = int.from_bytes(cluster[100:104], "big")
    extensions = []
    while position + _HEADER.size <= limit:
        extension_type, length = _HEADER.unpack_from(cluster, position)
        if not extension_type:
            break
        position += _HEADER.size
        extensions.append(PlacedExtension(extension_type, position, length))
        position += -(-length // 8) * 8
    return ExtensionArea(path, cluster, extensions, position, backing_offset, backing_length)


def _pack(extension_type: int, data: bytes) -> bytes:
    """An extension with its header, padded to a multiple of 8 bytes."""
    return _HEADER.pack(extension_type, len(data)) + data + bytes(-len(data) % 8)
