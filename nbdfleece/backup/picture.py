"""Maps as pictures: where data, zeroes and changes lie, on a terminal or as SVG.

The disk is cut into cells of equal size, read like a page. A cell shows the most telling
thing in it, so that one changed cluster is not lost among a thousand others: changed data,
then what has become zero, then data, then nothing.
"""

from __future__ import annotations

from typing import Final, NamedTuple
from xml.sax.saxutils import escape

import numpy as np

from ..extents import Extents
from .block_status import DIRTY, ZERO, overlay


class Look(NamedTuple):
    """How a kind of cell is shown."""

    name: str
    letter: str
    colour: str


LOOKS: Final = (
    Look("zero", "·", "#e8e8ec"),
    Look("data", "▒", "#7a9cc6"),
    Look("changed to zero", "○", "#f2b56b"),
    Look("changed data", "█", "#c8372d"),
)
"""The kinds of cells, the more telling the later."""

_KIND: Final = {ZERO: 0, 0: 1, DIRTY | ZERO: 2, DIRTY: 3}
_COLUMNS: Final = 64
_CELL: Final = 10
_MARGIN: Final = 20


def cells_of(merged: Extents, count: int) -> list[int]:
    """Which look each of ``count`` cells has; fewer if the disk has fewer bytes.

    Args:
        merged: Dirty and zero in one.
        count: How many cells there are at most.
    """
    size = merged.total()
    count = min(count, size)
    if not count:
        return []
    kinds = np.array([_KIND[status] for status in range(4)], dtype=np.uint32)[merged.status & 3]
    edges = np.linspace(0, size, count + 1).astype(np.int64)
    cells = Extents(np.diff(edges), np.arange(count, dtype=np.uint32))
    found, numbers = overlay(Extents(merged.lengths, kinds), cells)
    first = np.flatnonzero(np.diff(numbers.status.astype(np.int64), prepend=-1))
    shown: list[int] = np.maximum.reduceat(found.status, first).tolist()
    return shown


def draw_blocks(merged: Extents, columns: int, rows: int) -> str:
    """A picture in characters, with a legend."""
    cells = cells_of(merged, columns * rows)
    lines = [
        "".join(LOOKS[kind].letter for kind in cells[start : start + columns])
        for start in range(0, len(cells), columns)
    ]
    legend = "  ".join(f"{look.letter} {text}" for look, text in _legend(merged))
    return "\n".join([*lines, legend]) + "\n"


def draw_svg(merged: Extents, title: str, *, rows: int = 32) -> str:
    """A picture as an SVG document, with a legend."""
    cells = cells_of(merged, _COLUMNS * rows)
    lines = [cells[start : start + _COLUMNS] for start in range(0, len(cells), _COLUMNS)]
    width = _COLUMNS * _CELL + 2 * _MARGIN
    legend_top = 2 * _MARGIN + len(lines) * _CELL + _MARGIN
    height = legend_top + len(LOOKS) * _MARGIN + _MARGIN // 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        f' width="{width}" height="{height}" font-family="sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_MARGIN}" y="{_MARGIN + 4}" font-weight="bold">{escape(title)}</text>',
    ]
    for number, line in enumerate(lines):
        parts += _svg_line(line, 2 * _MARGIN + number * _CELL)
    for number, (look, text) in enumerate(_legend(merged)):
        top = legend_top + number * _MARGIN
        parts.append(_svg_cell(_MARGIN, top, 1, look.colour))
        parts.append(f'<text x="{_MARGIN + 18}" y="{top + 10}">{escape(text)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _svg_line(line: list[int], top: int) -> list[str]:
    """Neighbours of one look as one rectangle."""
    parts = []
    start = 0
    for column in range(1, len(line) + 1):
        if column == len(line) or line[column] != line[start]:
            left = _MARGIN + start * _CELL
            parts.append(_svg_cell(left, top, column - start, LOOKS[line[start]].colour))
            start = column
    return parts


def _svg_cell(left: int, top: int, cells: int, colour: str) -> str:
    width, height = cells * _CELL - 1, _CELL - 1
    return f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="{colour}"/>'


def _legend(merged: Extents) -> list[tuple[Look, str]]:
    """Every look with how many bytes are so."""
    totals = {status: int(merged.lengths[merged.status == status].sum()) for status in _KIND}
    by_kind = {kind: totals[status] for status, kind in _KIND.items()}
    return [(look, f"{look.name}: {by_kind[kind]} bytes") for kind, look in enumerate(LOOKS)]
