"""The bitmap directory: what is packed is read back, what is damaged is named, nothing crashes."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.errors import ImageError
from nbdfleece.qcow2.bitmap_directory import (
    BITMAPS_MAX,
    BitmapEntry,
    BitmapFlags,
    BitmapGeometry,
    BitmapsExtension,
    directory_size,
    list_directory,
    pack_directory,
    pack_extension,
    pack_table,
    stored_bitmap_bytes,
    table_entries_needed,
    unpack_extension,
    unpack_table,
)

CLUSTER = 65536
GEOMETRY = BitmapGeometry(disk_size=1 << 40, cluster_size=CLUSTER, file_size=1 << 30)
GOOD = BitmapEntry("good", 65536, BitmapFlags.AUTO, 5 * CLUSTER, 32)

names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@st.composite
def entries(draw: st.DrawFn) -> BitmapEntry:
    granularity = 1 << draw(st.integers(16, 31))
    return BitmapEntry(
        draw(names.filter(lambda name: len(name.encode()) <= 1023)),
        granularity,
        BitmapFlags(draw(st.integers(0, 3))),
        draw(st.integers(1, 1000)) * CLUSTER,
        table_entries_needed(GEOMETRY.disk_size, granularity, CLUSTER),
    )


@given(st.lists(entries(), unique_by=lambda entry: entry.name, max_size=5))
def test_directory_round_trip_is_exact(wanted: list[BitmapEntry]) -> None:
    data = pack_directory(wanted)
    listing = list_directory(data, len(wanted), GEOMETRY)
    assert listing.entries == wanted
    assert listing.damaged == []
    assert len(data) == directory_size(entry.name for entry in wanted)
    for entry, position in zip(wanted, listing.positions, strict=True):
        assert data[position + 24 :].startswith(entry.name.encode())


def test_directory_entry_layout_is_the_specified_one() -> None:
    expected = struct.pack(">QIIBBHI", 5 * CLUSTER, 32, 2, 1, 16, 4, 0) + b"good\0\0\0\0"
    assert pack_directory([GOOD]) == expected


def patched(position: int, value: bytes) -> bytes:
    data = bytearray(pack_directory([GOOD]))
    data[position : position + len(value)] = value
    return bytes(data)


@pytest.mark.parametrize(
    ("position", "value", "reason"),
    [
        (0, struct.pack(">Q", 0), "table at 0x0"),
        (0, struct.pack(">Q", CLUSTER + 512), "not at a cluster"),
        (0, struct.pack(">Q", 1 << 30), "past the end of the file"),
        (0, struct.pack(">Q", 0xFFFFFFFFFFFF0000), "past the end of the file"),
        (8, struct.pack(">I", 0), "table of 0 entries"),
        (8, struct.pack(">I", 31), "where 32 are needed"),
        (8, struct.pack(">I", 33), "where 32 are needed"),
        (8, struct.pack(">I", 0xFFFFFFFF), "impossible table"),
        (12, struct.pack(">I", 4), "unknown flags 0x4"),
        (12, struct.pack(">I", 1 << 31), "unknown flags"),
        (16, b"\2", "unknown type 2"),
        (17, b"\x08", "granularity bits 8"),
        (17, b"\x20", "granularity bits 32"),
        (17, b"\xff", "granularity bits 255"),
        (18, struct.pack(">H", 0), "name of 0 bytes"),
        (18, struct.pack(">H", 0xFFFF), "do not fit"),
        (20, struct.pack(">I", 1), "extra data"),
        (20, struct.pack(">I", 0xFFFFFFFF), "do not fit"),
        (24, b"\xff", "not UTF-8"),
        (24, b"\0", "NUL"),
    ],
)
def test_damaged_entry_is_listed_with_its_reason(position: int, value: bytes, reason: str) -> None:
    listing = list_directory(patched(position, value), 1, GEOMETRY)
    assert listing.entries == []
    assert reason in listing.damaged[0].reason


def test_damaged_entry_does_not_hide_the_ones_around_it() -> None:
    bad = patched(12, struct.pack(">I", 4))
    others = [GOOD._replace(name=name) for name in ("first", "last")]
    data = pack_directory(others[:1]) + bad + pack_directory(others[1:])
    listing = list_directory(data, 3, GEOMETRY)
    assert listing.entries == others
    assert [(item.name, item.position) for item in listing.damaged] == [("good", 32)]


def test_name_that_is_there_twice_is_damage() -> None:
    listing = list_directory(pack_directory([GOOD, GOOD]), 2, GEOMETRY)
    assert listing.entries == [GOOD]
    assert listing.damaged[0].reason == "is there twice"


def test_entries_that_the_extension_does_not_count_are_damage() -> None:
    two = pack_directory([GOOD, GOOD._replace(name="more")])
    assert "not counted" in list_directory(two, 1, GEOMETRY).damaged[0].reason
    assert "do not fit" in list_directory(two, 3, GEOMETRY).damaged[0].reason


def test_bitmap_in_use_may_have_the_table_of_another_disk_size() -> None:
    entry = GOOD._replace(flags=BitmapFlags.IN_USE, table_entries=7)
    assert list_directory(pack_directory([entry]), 1, GEOMETRY).entries == [entry]


@given(st.binary(max_size=300), st.integers(1, BITMAPS_MAX))
def test_random_directory_never_raises(data: bytes, count: int) -> None:
    listing = list_directory(data, count, GEOMETRY)
    assert listing.damaged or len(listing.entries) == count
    assert len(listing.entries) + len(listing.damaged) <= len(data) // 24 + 1


@given(st.integers(0, 63), st.integers(0, 255))
def test_directory_with_one_byte_changed_never_raises(position: int, value: int) -> None:
    data = bytearray(pack_directory([GOOD, GOOD._replace(name="other")]))
    data[position] = value
    listing = list_directory(data, 2, GEOMETRY)
    assert 1 <= len(listing.entries) + len(listing.damaged) <= 3


def test_extension_round_trip_is_exact() -> None:
    extension = BitmapsExtension(3, 96, 7 * CLUSTER)
    data = pack_extension(extension)
    assert data == struct.pack(">IIQQ", 3, 0, 96, 7 * CLUSTER)
    assert unpack_extension(data, GEOMETRY, "x") == extension


@pytest.mark.parametrize(
    "fields",
    [
        (0, 0, 96, CLUSTER),
        (BITMAPS_MAX + 1, 0, 32 * (BITMAPS_MAX + 1), CLUSTER),
        (3, 1, 96, CLUSTER),
        (3, 0, 95, CLUSTER),
        (3, 0, 0, CLUSTER),
        (3, 0, 1 << 40, CLUSTER),
        (3, 0, 96, 0),
        (3, 0, 96, CLUSTER + 8),
        (3, 0, 96, 1 << 30),
        (3, 0, 96, 0xFFFFFFFFFFFF0000),
    ],
)
def test_impossible_extension_is_refused(fields: tuple[int, int, int, int]) -> None:
    with pytest.raises(ImageError, match="bitmaps extension"):
        unpack_extension(struct.pack(">IIQQ", *fields), GEOMETRY, "x")


def test_extension_of_a_wrong_size_is_refused() -> None:
    with pytest.raises(ImageError, match="wrong size: expected 24, found 23"):
        unpack_extension(bytes(23), GEOMETRY, "x")


def test_table_round_trip_is_exact() -> None:
    table = np.array([0, 1, 9 * CLUSTER] + [0] * 29, dtype=np.uint64)
    data = pack_table(table)
    assert data[:24] == struct.pack(">QQQ", 0, 1, 9 * CLUSTER)
    assert unpack_table(data, GOOD, GEOMETRY, "x").tolist() == table.tolist()


@pytest.mark.parametrize(
    "entry",
    [2, 1 << 8, 1 << 56, 1 << 63, CLUSTER + 512, CLUSTER | 1, 1 << 30, (1 << 30) - CLUSTER + 512],
)
def test_impossible_table_entry_is_refused_with_its_place(entry: int) -> None:
    table = np.array([0] * 31 + [entry], dtype=np.uint64)
    with pytest.raises(ImageError, match=f"{entry:#x}") as caught:
        unpack_table(pack_table(table), GOOD, GEOMETRY, "x")
    assert caught.value.offset == GOOD.table_offset + 8 * 31


def test_table_entry_at_the_very_end_of_the_file_is_good() -> None:
    table = np.array([0] * 31 + [(1 << 30) - CLUSTER], dtype=np.uint64)
    assert unpack_table(pack_table(table), GOOD, GEOMETRY, "x")[31] == (1 << 30) - CLUSTER


def test_table_of_another_size_is_refused() -> None:
    entry = GOOD._replace(flags=BitmapFlags.IN_USE, table_entries=7)
    with pytest.raises(ImageError, match="expected 32 entries, found 7"):
        unpack_table(bytes(56), entry, GEOMETRY, "x")


@pytest.mark.parametrize(
    ("disk_size", "granularity", "expected"),
    [
        (0, 512, 0),
        (1, 512, 8),
        (512 * 64, 512, 8),
        (512 * 64 + 1, 512, 16),
        (1 << 40, 65536, 2 << 20),
    ],
)
def test_stored_bytes_are_rounded_up_to_eight(
    disk_size: int, granularity: int, expected: int
) -> None:
    assert stored_bitmap_bytes(disk_size, granularity) == expected
