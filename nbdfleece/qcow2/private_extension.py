"""The private header extension: an opaque record that changes together with the bitmap directory.

The extension holds two slots. A slot is the caller's payload, the bitmap
directory (offset and size) that it belongs to, a generation, and a checksum over
all of that. A record is stored by writing the slot that is not in force, making
it durable, and then pointing the bitmaps extension at a new directory, which is
one write within one sector: it brings the directory and the slot that names it
into force together, or neither (rule 6). A torn write of a slot harms nothing:
its checksum says so, and the slot in force was not touched.

QEMU keeps the extension when it rewrites a header, but may move it; hence no
field depends on where in the file it lies. What QEMU does to the bitmaps does
not reach the record, hence the private autoclear bit 63, which the specification
reserves: QEMU keeps it while it only reads and clears it before its first write.
Before a record is stored in an image without the bit, the record that is there is
copied to a slot that names the directory in force, with the flag
:attr:`SlotFlags.STALE` (:attr:`SlotFlags.EMPTY` if there is none), and only then the
bit is set. So a crash neither makes an old record look fresh nor lets one be
believed whose directory never came into force.

Once QEMU has put its own directory in place of ours, no slot names it, and the
newest slot may be one that never came into force. Therefore the generation that did
is noted in the extension after each switch, at leisure. If a power cut took that
note and QEMU wrote next, the record is lost: "no known chain" is safe, a chain that
belongs to another directory is not.

The checksum is BLAKE2b cut to 64 bits rather than a CRC-32. A torn slot is a mix
of two similar records, old sectors and new ones; taking it for good would mean a
wrong chain and silently incomplete backups, so the odds have to be negligible
whatever the mix looks like, and hashing 30 KiB once per checkpoint costs nothing.

A directory offset of 0 stands for "the image has no bitmap directory".
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from enum import IntFlag
from typing import Final, NamedTuple

EXTENSION_MAGIC: Final = 0x4E424446
VERSION: Final = 1
SLOT_SIZE_MAX: Final = 256 * 1024
"""Larger slots would only make images with large clusters slow to open."""

_EXTENSION: Final = struct.Struct(">IIQ")
_SLOT: Final = struct.Struct(">8sQQQII")
IN_FORCE_POSITION: Final = 8
"""Where the generation in force is noted, in bytes from the beginning of the extension's data."""

SLOT_HEADER_SIZE: Final = _SLOT.size
"""Bytes of a slot that are not payload."""


class SlotFlags(IntFlag):
    """Flags of a slot."""

    NONE = 0
    STALE = 1 << 0
    """Another program wrote the image after the payload was made."""
    EMPTY = 1 << 1
    """There is no record."""


_FLAGS_KNOWN: Final = int(SlotFlags.STALE | SlotFlags.EMPTY)


class Slot(NamedTuple):
    """One record and the directory that it belongs to; offset and size are bytes."""

    generation: int
    directory_offset: int
    directory_size: int
    flags: SlotFlags
    payload: bytes


class Selection(NamedTuple):
    """The record to go by, and whether it names the directory that was asked for."""

    slot: Slot
    matches_directory: bool


class PrivateExtension(NamedTuple):
    """The extension's two slots; None for one that is empty, torn or damaged."""

    slot_size: int
    """Bytes of a slot, header included, a multiple of 8."""
    generation_in_force: int
    """The generation that is known to have come into force last; it may lag behind."""
    slots: tuple[Slot | None, Slot | None]

    @property
    def payload_bytes_max(self) -> int:
        """The largest payload that a slot can hold."""
        return self.slot_size - SLOT_HEADER_SIZE

    @property
    def data_size(self) -> int:
        """Bytes of the extension's data."""
        return _EXTENSION.size + 2 * self.slot_size

    def newest(self) -> Slot | None:
        """The valid slot of the highest generation."""
        return _newest(self.slots)

    def select_slot(self, directory_offset: int, directory_size: int) -> Selection | None:
        """Find the record that is in force with a directory, nobody having written since.

        Args:
            directory_offset: Where the directory lies, in bytes; 0 if there is none.
            directory_size: Its size in bytes.

        Returns:
            The newest slot that names the directory; if none does, the newest that has
            been in force; None if there is none.
        """
        wanted = (directory_offset, directory_size)
        named = _newest(
            slot
            for slot in self.slots
            if slot and (slot.directory_offset, slot.directory_size) == wanted
        )
        return self.select_stale() if named is None else Selection(named, matches_directory=True)

    def select_stale(self) -> Selection | None:
        """Find the newest record, somebody else having written since; None if it is in doubt.

        What a slot names proves nothing then: QEMU may have put its own directory where
        an older one of ours was.
        """
        newest = self.newest()
        if newest is None or newest.generation < self.generation_in_force:
            return None
        is_copy = bool(newest.flags & (SlotFlags.STALE | SlotFlags.EMPTY))
        if newest.generation > self.generation_in_force and not is_copy:
            return None
        return Selection(newest, matches_directory=False)

    def idle_index(self, in_force: Slot | None) -> int:
        """Which slot may be overwritten while ``in_force`` stays: an invalid or the older one."""
        first, second = self.slots
        if first is None or second is None:
            return 0 if first is None else 1
        if in_force in self.slots:
            return 1 - self.slots.index(in_force)
        return 0 if first.generation < second.generation else 1

    def slot_position(self, index: int) -> int:
        """Where slot ``index`` begins, in bytes from the beginning of the extension's data."""
        return _EXTENSION.size + index * self.slot_size

    def next_generation(self) -> int:
        """A generation that is higher than that of any valid slot."""
        newest = self.newest()
        return 1 if newest is None else newest.generation + 1

    def with_slot(self, index: int, slot: Slot | None) -> PrivateExtension:
        """The extension after slot ``index`` was overwritten."""
        slots = (slot, self.slots[1]) if index == 0 else (self.slots[0], slot)
        return self._replace(slots=slots)


def _newest(slots: Iterable[Slot | None]) -> Slot | None:
    return max(filter(None, slots), key=lambda slot: slot.generation, default=None)


def slot_size_for(room: int) -> int:
    """The slot size for an extension whose data may take ``room`` bytes; may be 0 or negative."""
    return min((room - _EXTENSION.size) // 2 // 8 * 8, SLOT_SIZE_MAX)


def pack_slot(slot: Slot) -> bytes:
    """Encode a slot.

    Returns:
        ``SLOT_HEADER_SIZE + len(slot.payload)`` bytes.

    Wire:
        0 - 7: BLAKE2b-64 of everything that follows, up to the payload's end
        8 - 15: generation
        16 - 23: directory offset
        24 - 31: directory size in bytes
        32 - 35: flags
        36 - 39: payload length in bytes
        then the payload
    """
    generation, directory_offset, directory_size, flags, payload = slot
    rest = _SLOT.pack(
        bytes(8), generation, directory_offset, directory_size, int(flags), len(payload)
    )[8:]
    return _checksum(rest + payload) + rest + payload


def pack_extension(extension: PrivateExtension) -> bytes:
    """Encode the data of the extension.

    Wire:
        0 - 3: version, 1
        4 - 7: slot size in bytes
        8 - 15: generation that came into force last, noted at leisure
        then two slots of that size
    """
    slots = [b"" if slot is None else pack_slot(slot) for slot in extension.slots]
    body = b"".join(slot.ljust(extension.slot_size, b"\0") for slot in slots)
    return _EXTENSION.pack(VERSION, extension.slot_size, extension.generation_in_force) + body


def unpack_extension(data: bytes | memoryview) -> PrivateExtension | None:
    """Decode the data of the extension.

    Returns:
        None if it is of another version or not laid out as this one: it holds nothing
        that can be understood, and must not be written to.
    """
    if len(data) < _EXTENSION.size:
        return None
    version, slot_size, in_force = _EXTENSION.unpack_from(data)
    if version != VERSION or slot_size % 8 or len(data) != _EXTENSION.size + 2 * slot_size:
        return None
    first = _EXTENSION.size
    middle = first + slot_size
    slots = (_unpack_slot(data[first:middle]), _unpack_slot(data[middle:]))
    return PrivateExtension(slot_size, in_force, slots)


def _unpack_slot(data: bytes | memoryview) -> Slot | None:
    """Decode a slot; None unless its checksum is right."""
    if len(data) < SLOT_HEADER_SIZE:
        return None
    checksum, generation, offset, size, flags, length = _SLOT.unpack_from(data)
    if length > len(data) - SLOT_HEADER_SIZE:
        return None
    covered = bytes(data[8 : SLOT_HEADER_SIZE + length])
    if _checksum(covered) != checksum or flags & ~_FLAGS_KNOWN:
        return None
    return Slot(generation, offset, size, SlotFlags(flags), covered[SLOT_HEADER_SIZE - 8 :])


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()
