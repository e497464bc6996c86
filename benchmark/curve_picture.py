"""SVG pictures of growth: a line per server on two logarithmic scales, and the fitted exponents."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Final

from .growth import Points, fit
from .picture import LogScale, svg

_LEFT: Final = 64
_TOP: Final = 44
_WIDTH: Final = 430
_HEIGHT: Final = 250
_SERIES: Final = 4
"""Styles of lines that there are."""


def curve_picture(
    title: str, x_unit: str, y_unit: str, lines: dict[str, Points], note: str = ""
) -> str:
    """Lines by the label of their server; a note says that points are missing."""
    points = [point for line in lines.values() for point in line]
    across = LogScale(min(x for x, _ in points), max(x for x, _ in points), _LEFT, _WIDTH)
    low, high = min(y for _, y in points), max(y for _, y in points)
    # At least a factor of ten, so that noise does not look like growth.
    middle = (low * high) ** 0.5
    up = LogScale(min(low / 1.3, middle / 3.2), max(high * 1.3, middle * 3.2), 0, _HEIGHT)
    parts = [f'<text x="{_LEFT}" y="18" font-weight="bold">{escape(title)}</text>']
    parts.append(f'<text x="8" y="{_TOP - 10}">{escape(y_unit)}: less is better</text>')
    parts += _axes(across, up, sorted({x for x, _ in points}))
    bottom = _TOP + _HEIGHT
    label = f"{x_unit} ({note})" if note else x_unit
    parts.append(
        f'<text x="{_LEFT + _WIDTH / 2}" y="{bottom + 38}" text-anchor="middle">'
        f"{escape(label)}</text>"
    )
    for number, (name, line) in enumerate(lines.items()):
        parts += _series(number, name, line, across, up)
    return svg(_LEFT + _WIDTH + 210, bottom + 52, parts)


def _axes(across: LogScale, up: LogScale, xs: list[float]) -> Iterable[str]:
    bottom = _TOP + _HEIGHT
    for value in xs:
        x = across.at(value)
        yield f'<line x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{bottom}" class="grid"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>'
    for value in up.ticks():
        y = bottom - up.at(value)
        right = _LEFT + _WIDTH
        yield f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" class="grid"/>'
        yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'


def _series(number: int, name: str, line: Points, across: LogScale, up: LogScale) -> Iterable[str]:
    style = f"s{number % _SERIES}"
    places = [(across.at(x), _TOP + _HEIGHT - up.at(y)) for x, y in line]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    yield f'<polyline points="{path}" class="{style} line"/>'
    for x, y in places:
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="{style}"/>'
    growth = fit(line)
    right, y = _LEFT + _WIDTH + 14, _TOP + 14 + 40 * number
    yield f'<circle cx="{right + 5}" cy="{y - 4}" r="5" class="{style}"/>'
    yield f'<text x="{right + 16}" y="{y}">{escape(name)}</text>'
    if growth is not None:
        yield f'<text x="{right + 16}" y="{y + 16}">exponent {growth.exponent:.2f}</text>'
