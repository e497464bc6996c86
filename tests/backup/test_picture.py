from __future__ import annotations

import struct
import zlib
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.backup.picture import LOOKS, cells_of, draw_blocks, draw_png, draw_svg
from nbdfleece.extents import Extents

KIND = {2: 0, 0: 1, 3: 2, 1: 3}


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3)), min_size=1), st.integers(1, 60))
def test_cell_shows_the_most_telling_thing_in_it(pairs: list[tuple[int, int]], count: int) -> None:
    extents = Extents.from_pairs(pairs)
    each = [KIND[status] for length, status in pairs for _ in range(length)]
    size = len(each)
    count = min(count, size)
    cells = cells_of(extents, count)
    assert len(cells) == count
    for number, cell in enumerate(cells):
        low, high = number * size // count, (number + 1) * size // count
        assert cell == max(each[low:high])


def test_blocks_have_rows_of_the_width_asked_for_and_a_legend() -> None:
    text = draw_blocks(Extents.from_pairs([(600, 2), (1, 1), (599, 2)]), columns=10, rows=4)
    lines = text.splitlines()
    assert [len(line) for line in lines[:-1]] == [10] * 4
    assert sum(line.count("█") for line in lines[:-1]) == 1
    assert "changed data: 1 bytes" in lines[-1]


def test_svg_is_well_formed_whatever_the_title() -> None:
    merged = Extents.from_pairs([(1 << 20, 2), (1 << 16, 3), (1 << 20, 0)])
    root = ElementTree.fromstring(draw_svg(merged, "<a & b>"))
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "<a & b>"
    assert "changed to zero: 65536 bytes" in texts


def chunks_of(png: bytes) -> dict[bytes, bytes]:
    """The chunks of a PNG file, each with its checksum; those of one kind put together."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    found: dict[bytes, bytes] = {}
    position = 8
    while position < len(png):
        length, kind = struct.unpack_from(">I4s", png, position)
        data = png[position + 8 : position + 8 + length]
        (crc,) = struct.unpack_from(">I", png, position + 8 + length)
        assert crc == zlib.crc32(kind + data)
        found[kind] = found.get(kind, b"") + data
        position += 12 + length
    assert list(found) == [b"IHDR", b"PLTE", b"iTXt", b"IDAT", b"IEND"]
    return found


@pytest.mark.parametrize("pairs", [[], [(1 << 20, 2), (1 << 16, 1), (1 << 16, 3), (1 << 20, 0)]])
def test_png_has_a_pixel_of_the_looks_colour_for_each_cell(pairs: list[tuple[int, int]]) -> None:
    merged = Extents.from_pairs(pairs)
    found = chunks_of(draw_png(merged, "<ä>"))
    width, height, depth, colours, *rest = struct.unpack(">IIBBBBB", found[b"IHDR"])
    assert (depth, colours, rest) == (8, 3, [0, 0, 0])
    rows = zlib.decompress(found[b"IDAT"])
    assert len(rows) == height * (width + 1)
    cells = cells_of(merged, 64 * 32)
    for number, cell in enumerate(cells):
        line, column = 20 + number // 64 * 10, 20 + number % 64 * 10
        assert rows[line * (width + 1) + 1 + column] == cell
    colour = LOOKS[3].colour
    assert found[b"PLTE"][9:12] == bytes.fromhex(colour[1:])
    texts = found[b"iTXt"].decode()
    assert "<ä>" in texts
    assert f"{colour} changed data: {65536 if pairs else 0} bytes" in texts


def test_disk_of_no_bytes_has_a_picture() -> None:
    empty = Extents.from_pairs([])
    assert draw_blocks(empty, 10, 2).count("\n") == 1
    ElementTree.fromstring(draw_svg(empty, "x"))
