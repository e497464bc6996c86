from __future__ import annotations

from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.backup.picture import cells_of, draw_blocks, draw_svg
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


def test_disk_of_no_bytes_has_a_picture() -> None:
    empty = Extents.from_pairs([])
    assert draw_blocks(empty, 10, 2).count("\n") == 1
    ElementTree.fromstring(draw_svg(empty, "x"))
