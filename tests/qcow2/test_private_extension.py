"""The private header extension: a torn slot is never believed, the right one is chosen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.qcow2.private_extension import (
    SLOT_HEADER_SIZE,
    SLOT_SIZE_MAX,
    PrivateExtension,
    Slot,
    SlotFlags,
    pack_extension,
    pack_slot,
    slot_size_for,
    unpack_extension,
)

SLOT_SIZE = 2048
OLD = Slot(4, 0x50000, 64, SlotFlags.NONE, b"old" * 300)
NEW = Slot(5, 0x90000, 96, SlotFlags.NONE, b"new" * 500)

slots = st.none() | st.builds(
    Slot,
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 3).map(SlotFlags),
    st.binary(max_size=SLOT_SIZE - SLOT_HEADER_SIZE),
)


@given(slots, slots)
def test_extension_round_trip_is_exact(first: Slot | None, second: Slot | None) -> None:
    extension = PrivateExtension(SLOT_SIZE, 5, (first, second))
    data = pack_extension(extension)
    assert len(data) == extension.data_size
    assert unpack_extension(data) == extension


@pytest.mark.parametrize("changed", range(0, SLOT_HEADER_SIZE + len(NEW.payload), 97))
def test_slot_with_one_bit_changed_is_not_believed(changed: int) -> None:
    data = bytearray(pack_extension(PrivateExtension(SLOT_SIZE, 5, (OLD, NEW))))
    data[PrivateExtension(SLOT_SIZE, 5, (OLD, NEW)).slot_position(1) + changed] ^= 0x10
    extension = unpack_extension(data)
    assert extension is not None
    assert extension.slots == (OLD, None)


@given(st.sets(st.integers(0, 4)))
def test_slot_torn_at_sectors_is_whole_or_not_believed(written: set[int]) -> None:
    """Rule 6: what a power cut leaves is the old record or the new one."""
    before = pack_slot(OLD._replace(generation=3)).ljust(SLOT_SIZE, b"\0")
    after = pack_slot(NEW)
    torn = bytearray(before)
    for sector in written:
        part = after[512 * sector : 512 * (sector + 1)]
        torn[512 * sector : 512 * sector + len(part)] = part
    whole = pack_extension(PrivateExtension(SLOT_SIZE, 5, (OLD, None)))[:-SLOT_SIZE] + bytes(torn)
    extension = unpack_extension(whole)
    assert extension is not None
    assert extension.slots[1] in (OLD._replace(generation=3), NEW, None)


@given(st.binary(max_size=500))
def test_random_bytes_are_never_believed(data: bytes) -> None:
    extension = unpack_extension(data)
    assert extension is None or extension.slots == (None, None)


def test_extension_of_another_version_or_layout_is_not_understood() -> None:
    data = pack_extension(PrivateExtension(SLOT_SIZE, 5, (OLD, NEW)))
    assert unpack_extension(b"\0\0\0\2" + data[4:]) is None
    assert unpack_extension(data[:-8]) is None
    assert unpack_extension(b"") is None


def test_slot_that_names_the_directory_is_selected_even_if_it_is_older() -> None:
    extension = PrivateExtension(SLOT_SIZE, 5, (OLD, NEW))
    assert extension.select_slot(0x50000, 64) == (OLD, True)
    assert extension.select_slot(0x90000, 96) == (NEW, True)


def test_newest_slot_is_selected_but_does_not_match_if_none_names_the_directory() -> None:
    extension = PrivateExtension(SLOT_SIZE, 5, (NEW, OLD))
    assert extension.select_slot(0x50000, 65) == (NEW, False)
    assert extension._replace(slots=(None, None)).select_slot(0x50000, 64) is None


def test_newer_of_two_slots_that_name_the_directory_is_selected() -> None:
    newer = OLD._replace(generation=9)
    assert PrivateExtension(SLOT_SIZE, 5, (newer, OLD)).select_slot(0x50000, 64) == (newer, True)


@pytest.mark.parametrize(
    ("stored", "in_force", "expected"),
    [
        ((None, None), None, 0),
        ((OLD, None), OLD, 1),
        ((None, NEW), NEW, 0),
        ((OLD, NEW), OLD, 1),
        ((OLD, NEW), NEW, 0),
        ((NEW, OLD), None, 1),
    ],
)
def test_idle_slot_is_never_the_one_in_force(
    stored: tuple[Slot | None, Slot | None], in_force: Slot | None, expected: int
) -> None:
    assert PrivateExtension(SLOT_SIZE, 5, stored).idle_index(in_force) == expected


def test_slot_size_uses_the_room_and_stays_aligned() -> None:
    assert slot_size_for(60 * 1024) == 30712
    assert slot_size_for(4 << 20) == SLOT_SIZE_MAX
    assert slot_size_for(0) <= 0


def test_slot_with_unknown_flags_is_not_believed() -> None:
    unknown = OLD._replace(flags=SlotFlags(4))
    data = pack_extension(PrivateExtension(SLOT_SIZE, 5, (unknown, NEW)))
    extension = unpack_extension(data)
    assert extension is not None
    assert extension.slots == (None, NEW)


def test_record_that_may_never_have_been_in_force_is_not_believed_after_another_writer() -> None:
    """The chain of one directory is never taken for that of another."""
    extension = PrivateExtension(SLOT_SIZE, 4, (OLD, NEW))
    assert extension.select_slot(0x50000, 64) == (OLD, True)
    assert extension.select_stale() is None
    assert extension._replace(generation_in_force=5).select_stale() == (NEW, False)
    assert extension._replace(slots=(OLD, None)).select_stale() == (OLD, False)
    assert extension._replace(generation_in_force=5, slots=(OLD, None)).select_stale() is None


def test_copy_of_a_record_is_believed_as_the_record_was() -> None:
    copy = OLD._replace(generation=5, flags=SlotFlags.STALE)
    assert PrivateExtension(SLOT_SIZE, 4, (OLD, copy)).select_stale() == (copy, False)
