"""SVG pictures, written by hand: no library is needed for it. Ratios as bars."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

from .measure import Metric, Ratio, Result, best_peer_ratio

_BAR_HEIGHT = 18
_ROW_HEIGHT = 30
_LABEL_WIDTH = 430
_PLOT_WIDTH = 420

_STYLE = """<style>
.page { fill: #ffffff } text { fill: #1f2328 } .grid { stroke: #d8dee4 } .ink { stroke: #1f2328 }
.good { fill: #1a7f5a } .bad { fill: #d0521b }
.s0 { stroke: #1a7f5a; fill: #1a7f5a } .s1 { stroke: #d0521b; fill: #d0521b }
.s2 { stroke: #3f6fb5; fill: #3f6fb5 } .s3 { stroke: #8a5fb0; fill: #8a5fb0 }
.line { fill: none; stroke-width: 2.5 } .name { stroke: none }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117 } text { fill: #e6edf3 } .grid { stroke: #30363d } .ink { stroke: #e6edf3 }
.good { fill: #3fb68b } .bad { fill: #f0803c }
.s0 { stroke: #3fb68b; fill: #3fb68b } .s1 { stroke: #f0803c; fill: #f0803c }
.s2 { stroke: #79a8ec; fill: #79a8ec } .s3 { stroke: #bc93e6; fill: #bc93e6 }
.line { fill: none } }
</style>"""
"""Colours for light and dark pages, chosen by the reader's browser."""


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
    scale = LogScale(min(0.5, lowest), max(4.0, highest), _LABEL_WIDTH, _PLOT_WIDTH)
    height = 40 + _ROW_HEIGHT * len(bars)
    parts = list(_grid(scale, height))
    for number, (label, metric, ratio) in enumerate(bars):
        parts += _bar(label, metric, ratio, scale, 30 + number * _ROW_HEIGHT)
    return svg(_LABEL_WIDTH + _PLOT_WIDTH + 70, height, parts)


def _label(result: Result, metric: Metric) -> str:
    text = result.title if len(result.metrics) == 1 else f"{result.title}: {metric.key}"
    return text if len(text) <= 68 else text[:67] + "…"


class LogScale:
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


def _grid(scale: LogScale, height: int) -> Iterable[str]:
    for value in scale.ticks():
        x = scale.at(value)
        kind = "ink" if value == 1 else "grid"
        yield f'<line x1="{x:.1f}" y1="20" x2="{x:.1f}" y2="{height - 8}" class="{kind}"/>'
        yield f'<text x="{x:.1f}" y="14" text-anchor="middle">{value:g}</text>'


def _bar(label: str, metric: Metric, ratio: Ratio, scale: LogScale, y: int) -> Iterable[str]:
    assert metric.at_least is not None
    one, end = scale.at(1), scale.at(ratio.median)
    kind = "good" if ratio.median >= metric.at_least else "bad"
    middle = y + _BAR_HEIGHT / 2
    yield f'<text x="{_LABEL_WIDTH - 8}" y="{y + 13}" text-anchor="end">{escape(label)}</text>'
    yield (
        f'<rect x="{min(one, end):.1f}" y="{y}" width="{abs(end - one):.1f}"'
        f' height="{_BAR_HEIGHT}" class="{kind}"/>'
    )
    yield (
        f'<line x1="{scale.at(ratio.least):.1f}" y1="{middle}" x2="{scale.at(ratio.greatest):.1f}"'
        f' y2="{middle}" class="ink"/>'
    )
    goal = scale.at(metric.at_least)
    yield (
        f'<line x1="{goal:.1f}" y1="{y - 2}" x2="{goal:.1f}" y2="{y + _BAR_HEIGHT + 2}"'
        ' class="ink" stroke-width="2" stroke-dasharray="3 2"/>'
    )
    right = scale.at(scale.high) + 8
    yield f'<text x="{right:.1f}" y="{y + 13}">{ratio.median:.2f}</text>'


def svg(width: int, height: int, parts: Iterable[str]) -> str:
    """A whole picture."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
    )
    background = f'<rect width="{width}" height="{height}" class="page"/>'
    return "\n".join([head, _STYLE, background, *parts, "</svg>"]) + "\n"
