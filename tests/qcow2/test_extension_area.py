"""Header extensions are added in an order of writes that no power cut can hurt."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.errors import StateError
from nbdfleece.qcow2.extension_area import (
    ExtensionArea,
    HeaderWrite,
    retype,
    scan_extension_area,
    straddles,
)

HEADER_LENGTH = 112

contents = st.tuples(st.integers(1, 0xFFFFFFFF), st.binary(max_size=700))


def make_cluster(
    extensions: list[tuple[int, bytes]], backing: bytes | None, gap: int = 0, size: int = 4096
) -> bytes:
    """A first cluster with nothing but what this module looks at."""
    cluster = bytearray(size)
    struct.pack_into(">I", cluster, 100, HEADER_LENGTH)
    position = HEADER_LENGTH
    for extension_type, data in extensions:
        packed = struct.pack(">II", extension_type, len(data)) + data + bytes(-len(data) % 8)
        cluster[position : position + len(packed)] = packed
        position += len(packed)
    if backing is not None:
        position += 8 + gap
        struct.pack_into(">QI", cluster, 8, position, len(backing))
        cluster[position : position + len(backing)] = backing
    return bytes(cluster)


def meaning(area: ExtensionArea) -> tuple[list[tuple[int, bytes]], bytes]:
    """What a reader of the header sees."""
    extensions = [(extension.type, area.data(extension)) for extension in area.extensions]
    end = area.backing_offset + area.backing_length
    return extensions, area.cluster[area.backing_offset : end] if area.backing_offset else b""


def torn(cluster: bytes, write: HeaderWrite, sectors: set[int]) -> bytes:
    """The cluster with only some sectors of a write on it."""
    result = bytearray(cluster)
    for index, value in enumerate(write.data, write.offset):
        if index // 512 in sectors:
            result[index] = value
    return bytes(result)


@given(
    st.lists(contents, max_size=2),
    st.none() | st.binary(min_size=1, max_size=300),
    st.integers(0, 40),
    st.lists(contents, min_size=1, max_size=2),
    st.sets(st.integers(0, 7)),
)
def test_append_torn_anywhere_shows_the_old_extensions_or_the_new(
    old: list[tuple[int, bytes]],
    backing: bytes | None,
    gap: int,
    new: list[tuple[int, bytes]],
    sectors: set[int],
) -> None:
    area = scan_extension_area(make_cluster(old, backing, gap * 8), "x")
    assert meaning(area) == (old, backing or b"")
    *writes, last = area.plan_append(new)
    for write in writes:
        half = scan_extension_area(torn(area.cluster, write, sectors), "x")
        assert meaning(half) == (old, backing or b"")
        area = area.after([write])
        assert meaning(area) == (old, backing or b"")
    assert not straddles(last.offset, len(last.data))
    assert meaning(area.after([last])) == (old + new, backing or b"")


@pytest.mark.parametrize("backing_length", [0, 1, 100])
def test_append_fills_the_room_to_the_last_byte_and_not_beyond(backing_length: int) -> None:
    backing = b"b" * backing_length if backing_length else None
    area = scan_extension_area(make_cluster([], backing, gap=3000), "x")
    room = area.room() // 8 * 8
    area.plan_append([(1, bytes(room - 8))])
    with pytest.raises(StateError, match=f"room for {area.room()} bytes"):
        area.plan_append([(1, bytes(room))])


def test_append_without_an_end_mark_is_refused() -> None:
    cluster = bytearray(make_cluster([(1, b"data")], b"name"))
    struct.pack_into(">Q", cluster, 8, HEADER_LENGTH + 16)
    area = scan_extension_area(bytes(cluster), "disk.qcow2")
    with pytest.raises(StateError, match=r"disk\.qcow2: .* end mark"):
        area.plan_append([(2, b"")])


def test_retype_changes_the_type_and_nothing_else() -> None:
    area = scan_extension_area(make_cluster([(1, b"one"), (2, b"two"), (3, b"")], b"name"), "x")
    write = retype(area.find(2)[0], 9)
    assert len(write.data) == 4
    assert meaning(area.after([write])) == ([(1, b"one"), (9, b"two"), (3, b"")], b"name")


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [(488, 24, False), (496, 24, True), (504, 24, True), (512, 24, False), (511, 1, False)],
)
def test_range_straddles_where_it_touches_two_sectors(
    offset: int, length: int, expected: bool
) -> None:
    assert straddles(offset, length) == expected
