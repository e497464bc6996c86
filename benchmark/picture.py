"""SVG pictures: ratios as bars, growth as lines. Written by hand: no library is needed for it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

from .measure import Metric, Ratio, Result, best_peer_ratio

_BAR_HEIGHT = 18
_ROW_HEIGHT = 30
_LABEL_WIDTH = 430
_PLOT_WIDTH = 420
_COLOURS = ("#0b6e4f", "#c1440e", "#3b5b92", "#8a6d00", "#7a3e8e", "#555555")


def ratios_picture(results: list[Result]) -> str:
    """One bar per figure, ours to the best peer, on a logarithmic scale, with its spread."""
    bars = [
        (_label(result, metric), metric, ratio)
        for result in results
        for metric in result.metrics
        if metric.at_least is not None
        and (ratio := best_peer_ratio(metric, result.contestants)) is not None
    ]
    highest = max((ratio.greatest for _, _, ratio in bars), default=1.0)
    lowest = min((ratio.least for _, _, ratio in bars), default=1.0)
    scale = _LogScale(min(0.5, lowest), max(4.0, highest), _LABEL_WIDTH, _PLOT_WIDTH)
    height = 40 + _ROW_HEIGHT * len(bars)
    parts = list(_grid(scale, height))
    for number, (label, metric, ratio) in enumerate(bars):
        parts += _bar(label, metric, ratio, scale, 30 + number * _ROW_HEIGHT)
    return _svg(_LABEL_WIDTH + _PLOT_WIDTH + 70, height, parts)


def _label(result: Result, metric: Metric) -> str:
    text = result.title if len(result.metrics) == 1 else f"{result.title}: {metric.key}"
    return text if len(text) <= 68 else text[:67] + "…"


class _LogScale:
    """Maps values to positions."""

    def __init__(self, low: float, high: float, start: float, width: float) -> None:
        self.low, self.high = low, max(high, low * 1.01)
        self._start = start
        self._unit = width / math.log(self.high / self.low)

    def at(self, value: float) -> float:
        """The position of a value."""
        return self._start + math.log(max(value, self.low) / self.low) * self._unit

    def ticks(self) -> Iterable[float]:
        """1, 2, 5, 10, ... inside the scale."""
        for exponent in range(-9, 18):
            for digit in (1, 2, 5):
                value = digit * 10.0**exponent
                if self.low <= value <= self.high:
                    yield value


def _grid(scale: _LogScale, height: int) -> Iterable[str]:
    for value in scale.ticks():
        x = scale.at(value)
        colour = "#333" if value == 1 else "#ddd"
        yield f'<line x1="{x:.1f}" y1="20" x2="{x:.1f}" y2="{height - 8}" stroke="{colour}"/>'
        yield f'<text x="{x:.1f}" y="14" text-anchor="middle">{value:g}</text>'


def _bar(label: str, metric: Metric, ratio: Ratio, scale: _LogScale, y: int) -> Iterable[str]:
    assert metric.at_least is not None
    one, end = scale.at(1), scale.at(ratio.median)
    colour = _COLOURS[0] if ratio.median >= metric.at_least else _COLOURS[1]
    middle = y + _BAR_HEIGHT / 2
    yield f'<text x="{_LABEL_WIDTH - 8}" y="{y + 13}" text-anchor="end">{escape(label)}</text>'
    yield (
        f'<rect x="{min(one, end):.1f}" y="{y}" width="{abs(end - one):.1f}"'
        f' height="{_BAR_HEIGHT}" fill="{colour}"/>'
    )
    yield (
        f'<line x1="{scale.at(ratio.least):.1f}" y1="{middle}" x2="{scale.at(ratio.greatest):.1f}"'
        f' y2="{middle}" stroke="#000"/>'
    )
    goal = scale.at(metric.at_least)
    yield (
        f'<line x1="{goal:.1f}" y1="{y - 2}" x2="{goal:.1f}" y2="{y + _BAR_HEIGHT + 2}"'
        ' stroke="#000" stroke-width="2" stroke-dasharray="3 2"/>'
    )
    right = scale.at(scale.high) + 8
    yield f'<text x="{right:.1f}" y="{y + 13}">{ratio.median:.2f}</text>'


def curves_picture(
    title: str, x_unit: str, y_unit: str, lines: dict[str, list[tuple[float, float]]]
) -> str:
    """Lines on two logarithmic scales, one per server."""
    points = [point for line in lines.values() for point in line]
    horizontal = _LogScale(min(x for x, _ in points), max(x for x, _ in points), 70, 420)
    vertical = _LogScale(min(y for _, y in points) / 1.2, max(y for _, y in points) * 1.2, 0, 240)
    parts = [f'<text x="70" y="16" font-weight="bold">{escape(title)}</text>']
    for value in horizontal.ticks():
        x = horizontal.at(value)
        parts.append(f'<line x1="{x:.1f}" y1="30" x2="{x:.1f}" y2="270" stroke="#eee"/>')
    for x_value in sorted({x for x, _ in points}):
        x = horizontal.at(x_value)
        parts.append(f'<text x="{x:.1f}" y="285" text-anchor="middle">{x_value:g}</text>')
    for value in vertical.ticks():
        y = 270 - vertical.at(value)
        parts.append(f'<line x1="70" y1="{y:.1f}" x2="490" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="64" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    parts.append(f'<text x="280" y="302" text-anchor="middle">{escape(x_unit)}</text>')
    parts.append(f'<text x="8" y="26">{escape(y_unit)}</text>')
    for number, (label, line) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(f"{horizontal.at(x):.1f},{270 - vertical.at(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="500" y="{44 + 18 * number}" fill="{colour}">{escape(label)}</text>')
    return _svg(720, 310, parts)


def _svg(width: int, height: int, parts: Iterable[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
    )
    background = f'<rect width="{width}" height="{height}" fill="#fff"/>'
    return "\n".join([head, background, *parts, "</svg>"]) + "\n"
