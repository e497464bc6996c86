"""Which bitmap directory and which chain record an image goes by, and the change to others.

The state machine of the header's part in :meth:`BitmapStore.replace
<nbdfleece.qcow2.bitmap_store.BitmapStore.replace>`:

1. :meth:`DirectorySwitch.prepare` makes places in the header that a single write can
   switch. What is in force stays in force.
2. :meth:`DirectorySwitch.stage` writes the idle slot, and the bitmaps extension if it
   is void. Nothing points there yet. The caller makes it durable together with
   the new directory.
3. :meth:`DirectorySwitch.commit` is the one write within one sector, made durable.

The in-memory header's autoclear bits and extensions follow the file's.
"""

from __future__ import annotations

import logging
from typing import Final, NamedTuple, Protocol

from ..block.file import FileNode
from ..errors import ImageError, StateError
from . import bitmap_directory as bitmaps_format
from . import private_extension as private_format
from .bitmap_directory import BitmapGeometry, BitmapsExtension
from .extension_area import (
    PLACEHOLDER_MAGIC,
    ExtensionArea,
    HeaderWrite,
    PlacedExtension,
    retype,
    scan_extension_area,
    straddles,
)
from .header import AUTOCLEAR_FIELD, EXTENSION_BITMAPS, Autoclear, Header, HeaderExtension
from .private_extension import PrivateExtension, Selection, Slot, SlotFlags
from .tables import MetadataMap

_log = logging.getLogger(__name__)

_EXTENSION_HEADER_SIZE: Final = 8
_BITMAPS_TOTAL: Final = _EXTENSION_HEADER_SIZE + bitmaps_format.EXTENSION_SIZE

_ROOM_KEPT_FRACTION: Final = 16
"""One part in so many of the header's cluster is left to others: QEMU's feature names and
backing file names of other lengths must still fit (4 KiB of 64 KiB)."""

NO_DIRECTORY: Final = BitmapsExtension(0, 0, 0)


class BitmapImage(Protocol):
    """What an open image does for its bitmaps; :class:`.image.Qcow2Image` is one."""

    file: FileNode
    header: Header
    path: str
    size: int
    cluster_size: int
    read_only: bool
    metadata: MetadataMap
    """Host clusters that no guest write may hit."""

    async def allocate_clusters(self, count: int) -> int:
        """Allocate ``count`` adjacent clusters with refcount 1; returns their offset in bytes."""

    def free_clusters(self, offset: int, count: int) -> None:
        """Give up clusters; they are reused only after the next flush."""

    async def flush(self) -> None:
        """Make durable what was written, refcounts included."""


class ChainRecord(NamedTuple):
    """The caller's payload as it was found."""

    payload: bytes
    matches_directory: bool
    """It was stored together with the directory, and nobody has written the image since."""


class DirectorySwitch:
    """The header's side of the bitmaps of one open image. Made by :meth:`open`."""

    def __init__(self, image: BitmapImage, area: ExtensionArea) -> None:
        self._image = image
        self._area = area
        self.fault: str | None = None
        """Why the directory that the header names cannot be believed."""
        self.directory = self._read_directory()
        """The directory in force; :data:`NO_DIRECTORY` if there is none."""
        self._private = self._read_private()
        self._selection = self._select()
        self.private_bit_was_set = self._has(Autoclear.PRIVATE) and not self._is_stale()
        """When the image was opened: nobody has written it since the record was stored."""
        self.is_uncertain = False
        """A switch failed and could not be taken back: what a power cut leaves is unknown."""

    @classmethod
    async def open(cls, image: BitmapImage) -> DirectorySwitch:
        """Read the header's extensions; ``image`` is of version 3."""
        cluster = await image.file.read(0, image.cluster_size)
        return cls(image, scan_extension_area(bytes(cluster), image.path))

    @property
    def record(self) -> ChainRecord | None:
        """The chain record in force, or the newest if none is."""
        if self._selection is None or self._selection.slot.flags & SlotFlags.EMPTY:
            return None
        slot, matches = self._selection
        fresh = matches and self._has(Autoclear.PRIVATE) and not self._is_stale()
        return ChainRecord(slot.payload, fresh)

    def geometry(self) -> BitmapGeometry:
        """What entries are checked against."""
        image = self._image
        return BitmapGeometry(image.size, image.cluster_size, image.file.size)

    # Reading

    def _has(self, autoclear_bit: int) -> bool:
        return bool(self._image.header.autoclear_features & autoclear_bit)

    def _is_stale(self) -> bool:
        return self._selection is not None and bool(self._selection.slot.flags & SlotFlags.STALE)

    def _read_directory(self) -> BitmapsExtension:
        """What the bitmaps extension says, if the autoclear bit bears it out."""
        places = self._area.find(EXTENSION_BITMAPS)
        if not places or not self._has(Autoclear.BITMAPS):
            return NO_DIRECTORY
        data = self._area.data(places[-1])
        if any(self._area.data(place) != data for place in places):
            self.fault = "there are two bitmaps extensions"
            return NO_DIRECTORY
        try:
            return bitmaps_format.unpack_extension(data, self.geometry(), self._area.path)
        except ImageError as error:
            self.fault = str(error)
            return NO_DIRECTORY

    def _read_private(self) -> PrivateExtension | None:
        place = self._private_place()
        return None if place is None else private_format.unpack_extension(self._area.data(place))

    def _private_place(self) -> PlacedExtension | None:
        places = self._area.find(private_format.EXTENSION_MAGIC)
        return places[0] if places else None

    def _select(self) -> Selection | None:
        """The record to go by."""
        if self._private is None:
            return None
        if not self._has(Autoclear.PRIVATE):
            return self._private.select_stale()
        _, size, offset = self.directory
        return self._private.select_slot(offset, size)

    # Room

    def check_room(self, payload: bytes, *, with_directory: bool) -> None:
        """Insist that the header can hold what :meth:`prepare` and :meth:`stage` will write.

        Raises:
            StateError: It cannot.
        """
        if self._private is None and self._private_place() is not None:
            raise StateError(f"{self._area.path}: the chain record is of an unknown version")
        room = self.payload_bytes_max(with_directory=with_directory)
        if len(payload) > room:
            raise StateError(
                f"{self._area.path}: the chain record needs {len(payload)} bytes, but the header"
                f" of an image with {self._image.cluster_size}-byte clusters has room for"
                f" {max(room, 0)}; use larger clusters"
            )

    def payload_bytes_max(self, *, with_directory: bool) -> int:
        """The largest payload that there is room for; negative if not even an empty one fits."""
        private = self._private or self._new_private(with_directory=with_directory)
        return private.payload_bytes_max

    def _new_private(self, *, with_directory: bool) -> PrivateExtension:
        """An empty extension that leaves room for others; its slots may be too small for use."""
        room = self._area.room() - self._image.cluster_size // _ROOM_KEPT_FRACTION
        room -= _EXTENSION_HEADER_SIZE
        if with_directory and self._bitmaps_place() is None:
            room -= _BITMAPS_TOTAL
        slot_size = self._slot_size_before_bitmaps(private_format.slot_size_for(room))
        return PrivateExtension(max(slot_size, 0), 0, (None, None))

    def _bitmaps_place(self) -> PlacedExtension | None:
        """Where a bitmaps extension lies, or can lie, that one write within a sector switches."""
        for extension_type in (EXTENSION_BITMAPS, PLACEHOLDER_MAGIC):
            for place in reversed(self._area.find(extension_type)):
                if place.length == bitmaps_format.EXTENSION_SIZE and not place.straddles_sectors:
                    return place
        return None

    # Preparing

    async def prepare(self, *, with_directory: bool, with_record: bool) -> None:
        """Make places for a directory and a record, with nothing changed for any reader.

        Raises:
            StateError: The header has no room.
            OSError: A write failed; the header is valid all the same.
        """
        if self.directory == NO_DIRECTORY and self._has(Autoclear.BITMAPS):
            # The bit without a directory: what it vouches for cannot be read.
            await self._apply(self._autoclear_write(clear=Autoclear.BITMAPS))
        await self._append_missing(with_directory=with_directory, with_record=with_record)
        if with_directory:
            await self._settle_bitmaps_place()
        if with_record:
            await self._claim()

    async def _append_missing(self, *, with_directory: bool, with_record: bool) -> None:
        """Append the extensions that have no place yet."""
        bitmaps: list[tuple[int, bytes]] = []
        private: list[tuple[int, bytes]] = []
        if with_directory and self._bitmaps_place() is None:
            # While another bitmaps extension exists, both say the same.
            data = bitmaps_format.pack_extension(self.directory)
            bitmaps.append((EXTENSION_BITMAPS, data))
        data_offset = self._area.end + _EXTENSION_HEADER_SIZE
        private_first = bool(bitmaps) and straddles(data_offset, bitmaps_format.EXTENSION_SIZE)
        wants_private = with_record or private_first
        if wants_private and self._private_place() is None:
            self._private = self._new_private(with_directory=bool(bitmaps))
            private.append(
                (private_format.EXTENSION_MAGIC, private_format.pack_extension(self._private))
            )
        if missing := (private + bitmaps if private_first else bitmaps + private):
            await self._apply(*self._area.plan_append(missing))

    def _slot_size_before_bitmaps(self, slot_size: int) -> int:
        """A slot size with which a bitmaps extension behind the private one straddles no sector."""
        end = self._area.end + 2 * _EXTENSION_HEADER_SIZE
        while straddles(
            end + PrivateExtension(slot_size, 0, (None, None)).data_size,
            bitmaps_format.EXTENSION_SIZE,
        ):
            slot_size -= 8
        return slot_size

    async def _settle_bitmaps_place(self) -> None:
        """Have exactly one bitmaps extension, and have it where one write can switch it."""
        place = self._bitmaps_place()
        if place is None:
            raise StateError(
                f"{self._area.path}: the header has no place for the bitmaps extension"
            )
        if place.type == PLACEHOLDER_MAGIC:
            data = bitmaps_format.pack_extension(self.directory)
            await self._apply(HeaderWrite(place.offset, data), retype(place, EXTENSION_BITMAPS))
        for other in self._area.find(EXTENSION_BITMAPS):
            if other.offset != place.offset:
                await self._apply(retype(other, PLACEHOLDER_MAGIC))

    async def _claim(self) -> None:
        """Have a slot that names the directory in force, and have the private bit set."""
        if self._selection is None or not self._selection.matches_directory:
            _, size, offset = self.directory
            slot = Slot(0, offset, size, SlotFlags.EMPTY, b"")
            if self._selection is not None:
                old = self._selection.slot
                slot = slot._replace(flags=old.flags | SlotFlags.STALE, payload=old.payload)
            self._selection = Selection(await self._write_slot(slot), matches_directory=True)
            await self._image.file.flush()
        if not self._has(Autoclear.PRIVATE):
            await self._apply(self._autoclear_write(set_=Autoclear.PRIVATE))

    async def disown(self) -> None:
        """Clear the private bit: what is in force may from now on be stale."""
        if self._has(Autoclear.PRIVATE):
            await self._apply(self._autoclear_write(clear=Autoclear.PRIVATE))
        if self._selection is not None:
            self._selection = self._selection._replace(matches_directory=False)

    # Switching

    async def stage(self, directory: BitmapsExtension, payload: bytes | None) -> Slot | None:
        """Write everything that a switch to ``directory`` needs but the switch.

        Args:
            directory: Where the new directory is, or :data:`NO_DIRECTORY`.
            payload: The record; None keeps the one that is in force, stale or not.

        Returns:
            The slot that will be in force with the directory, if any.
        """
        if directory != NO_DIRECTORY and self.directory == NO_DIRECTORY:
            place = self._bitmaps_place()
            assert place is not None
            data = bitmaps_format.pack_extension(directory)
            await self._write(HeaderWrite(place.offset, data))
        _, size, offset = directory
        if payload is not None:
            return await self._write_slot(Slot(0, offset, size, SlotFlags.NONE, payload))
        if self._selection is None or not self._selection.matches_directory:
            return None
        kept = self._selection.slot
        return await self._write_slot(kept._replace(directory_offset=offset, directory_size=size))

    async def _write_slot(self, slot: Slot) -> Slot:
        """Write a slot under the next generation where it destroys nothing that is in force."""
        private, place = self._private, self._private_place()
        assert private is not None
        assert place is not None
        in_force = self._selection.slot if self._selection is not None else None
        index = private.idle_index(in_force)
        slot = slot._replace(generation=private.next_generation())
        # Until it is written whole, the slot holds nothing that can be believed.
        self._private = private.with_slot(index, None)
        offset = place.offset + private.slot_position(index)
        await self._write(HeaderWrite(offset, private_format.pack_slot(slot)))
        self._private = private.with_slot(index, slot)
        return slot

    async def commit(self, directory: BitmapsExtension, slot: Slot | None) -> None:
        """Put ``directory`` and ``slot`` in force by one write within one sector.

        Raises:
            OSError: It failed and was taken back, or ``is_uncertain`` is set.
        """
        if self.directory != NO_DIRECTORY or directory != NO_DIRECTORY:
            await self._write_or_take_back(*self._plan_switch(directory))
        self.directory = directory
        self.fault = None
        if slot is not None:
            self._selection = Selection(slot, matches_directory=True)
        elif self._selection is not None:
            self._selection = self._selection._replace(matches_directory=False)

    def _plan_switch(self, directory: BitmapsExtension) -> tuple[HeaderWrite, HeaderWrite]:
        """The write that puts ``directory`` in force, and the one that takes it back."""
        set_bit = self._autoclear_write(set_=Autoclear.BITMAPS)
        clear_bit = self._autoclear_write(clear=Autoclear.BITMAPS)
        if directory == NO_DIRECTORY:
            return clear_bit, set_bit
        if self.directory == NO_DIRECTORY:
            return set_bit, clear_bit
        place = self._bitmaps_place()
        assert place is not None
        return (
            HeaderWrite(place.offset, bitmaps_format.pack_extension(directory)),
            HeaderWrite(place.offset, bitmaps_format.pack_extension(self.directory)),
        )

    async def _write_or_take_back(self, switch: HeaderWrite, back: HeaderWrite) -> None:
        self.is_uncertain = True
        try:
            await self._apply(switch)
        except OSError:
            await self._apply(back)
            self.is_uncertain = False
            raise
        self.is_uncertain = False

    async def tidy(self) -> None:
        """Note which record is in force, and hide a bitmaps extension that no longer counts.

        The switch is done and durable: a failure here is no failure of it.
        """
        try:
            await self.note_generation()
            if self.directory == NO_DIRECTORY:
                # QEMU would warn about one that its autoclear bit does not bear out.
                for place in self._area.find(EXTENSION_BITMAPS):
                    await self._apply(retype(place, PLACEHOLDER_MAGIC))
        except OSError as error:
            _log.warning("%s: tidying the header failed: %s", self._area.path, error)

    async def note_generation(self) -> None:
        """Note which record is in force, if it is not noted; it need not be durable soon."""
        place = self._private_place()
        if self._private is None or place is None or self._selection is None:
            return
        slot, matches = self._selection
        if matches and slot.generation != self._private.generation_in_force:
            self._private = self._private._replace(generation_in_force=slot.generation)
            offset = place.offset + private_format.IN_FORCE_POSITION
            await self._write(HeaderWrite(offset, slot.generation.to_bytes(8, "big")))

    # Writing

    def _autoclear_write(self, *, set_: int = 0, clear: int = 0) -> HeaderWrite:
        features = self._image.header.autoclear_features & ~int(clear) | set_
        return HeaderWrite(AUTOCLEAR_FIELD, features.to_bytes(8, "big"))

    async def _apply(self, *writes: HeaderWrite) -> None:
        """Do writes, each durable before the next."""
        for write in writes:
            await self._write(write)
            await self._image.file.flush()

    async def _write(self, write: HeaderWrite) -> None:
        """Write into the header's cluster and let the header in memory follow."""
        await self._image.file.write(write.offset, memoryview(write.data))
        self._area = self._area.after([write])
        header = self._image.header
        if write.offset == AUTOCLEAR_FIELD:
            header.autoclear_features = int.from_bytes(write.data, "big")
        header.extensions = [
            HeaderExtension(place.type, self._area.data(place), place.offset)
            for place in self._area.extensions
        ]
