"""Maps as pictures: where data, zeroes and changes lie, on a terminal, as SVG or as PNG.

The disk is cut into cells of equal size, read like a page. A cell shows the most telling
thing in it, so that one changed cluster is not lost among a thousand others: changed data,
then what has become zero, then data, then nothing.
"""

from __future__ import annotations

import struct
import zlib
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
_ROWS: Final = 32
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


def draw_svg(merged: Extents, title: str) -> str:
    """A picture as an SVG document, with a legend."""
    cells = cells_of(merged, _COLUMNS * _ROWS)
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


def draw_png(merged: Extents, title: str) -> bytes:
    """A picture as a PNG file, with a bar for the share of each look below.

    PNG has no letters: the title and the legend are in its text chunks (``Title``,
    ``Description``), which image viewers show as properties.
    """
    cells = np.array(cells_of(merged, _COLUMNS * _ROWS), dtype=np.uint8)
    lines = -(-len(cells) // _COLUMNS)
    grid = np.full(lines * _COLUMNS, len(LOOKS), dtype=np.uint8)
    grid[: len(cells)] = cells
    width = _COLUMNS * _CELL + 2 * _MARGIN
    bars_top = 2 * _MARGIN + lines * _CELL
    pixels = np.full((bars_top + len(LOOKS) * _MARGIN, width), len(LOOKS), dtype=np.uint8)
    drawn = np.kron(grid.reshape(lines, _COLUMNS), np.ones((_CELL, _CELL), dtype=np.uint8))
    drawn[_CELL - 1 :: _CELL] = drawn[:, _CELL - 1 :: _CELL] = len(LOOKS)
    pixels[_MARGIN : _MARGIN + len(drawn), _MARGIN:-_MARGIN] = drawn
    for number, length in enumerate(_bars(merged)):
        top = bars_top + number * _MARGIN
        pixels[top : top + _CELL, _MARGIN : _MARGIN + length] = number
    description = "; ".join(f"{look.colour} {text}" for look, text in _legend(merged))
    return _pack_png(pixels, {"Title": title, "Description": description})


def _bars(merged: Extents) -> list[int]:
    """How long the bar of each look is, in pixels; never nothing for something."""
    size = max(1, merged.total())
    return [-(-total * _COLUMNS * _CELL // size) for total in _totals(merged)]


def _pack_png(
    pixels: np.ndarray[tuple[int, int], np.dtype[np.uint8]], texts: dict[str, str]
) -> bytes:
    """A PNG file of palette indices, shape (height, width).

    Spec: PNG (ISO/IEC 15948), "Chunk layout", "IHDR", "PLTE", "iTXt".
    """
    height, width = pixels.shape
    palette = bytes.fromhex("".join(look.colour[1:] for look in LOOKS) + "ffffff")
    rows = np.hstack([np.zeros((height, 1), dtype=np.uint8), pixels])  # filter 0 of each row
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", palette),
        *((b"iTXt", f"{key}\0\0\0\0\0{text}".encode()) for key, text in texts.items()),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    ]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _legend(merged: Extents) -> list[tuple[Look, str]]:
    """Every look with how many bytes are so."""
    return [
        (look, f"{look.name}: {total} bytes")
        for look, total in zip(LOOKS, _totals(merged), strict=True)
    ]


def _totals(merged: Extents) -> list[int]:
    """Bytes of each look."""
    by_kind = {
        kind: int(merged.lengths[merged.status == status].sum()) for status, kind in _KIND.items()
    }
    return [by_kind[kind] for kind in range(len(LOOKS))]
