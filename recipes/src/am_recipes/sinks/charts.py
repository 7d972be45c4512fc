"""Line charts as SVG: ticks, a band of extremes, and the values under the pointer without a script."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from am_recipes.sinks.curves import Curve
from am_recipes.sinks.text import short

Scale = Callable[[float], float]


@dataclass(frozen=True)
class Series:
    """One line of a chart; `color` counts the palette from 1.

    `dots` marks every point; a `faint` line stands behind the others and is not in the legend.
    """

    name: str
    curve: Curve
    color: int
    dots: bool = False
    faint: bool = False

    def points(self) -> list[tuple[float, float]]:
        return [(bucket.step, bucket.mean) for bucket in self.curve.buckets]


def chart(
    title: str, series: Sequence[Series], width: int, height: int, from_zero: bool = False, pointer: bool = True
) -> str:
    """Draw lines over steps, with ticks, and a rule with the values under the `pointer`; "" where there is no point."""
    series = [line for line in series if line.curve.buckets]
    if not series:
        return ""
    left, right, top, bottom = 56, width - 14, 38, height - 30
    x_low = min(line.curve.first[0] for line in series if line.curve.first)
    x_high = max(line.curve.last[0] for line in series if line.curve.last)
    low = 0.0 if from_zero else min(line.curve.low for line in series)
    high = max(line.curve.high for line in series)
    x_ticks = _ticks(x_low, x_high, width // 110, whole=True)
    y_ticks = _ticks(low, high, height // 50)
    y_low, y_high = min(low, y_ticks[0]), max(y_ticks[-1], high)

    def across(x: float) -> float:
        return (left + right) / 2 if x_high == x_low else left + (x - x_low) / (x_high - x_low) * (right - left)

    def up(y: float) -> float:
        return bottom - (y - y_low) / ((y_high - y_low) or 1) * (bottom - top)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text class="title" x="4" y="16">{escape(title)}</text>')
    parts += [
        f'<line class="grid" x1="{left}" x2="{right}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>'
        f'<text class="tick" x="{left - 8}" y="{up(y) + 4:.1f}" text-anchor="end">{short(y)}</text>'
        for y in y_ticks
    ]
    parts += [
        f'<text class="tick" x="{across(x):.1f}" y="{bottom + 18}" text-anchor="middle">{x:,.0f}</text>'
        for x in x_ticks
        if x_low <= x <= x_high
    ]
    parts += [_line(line, across, up) for line in series]
    parts.append(_legend(series, right) if len(series) > 1 else "")
    parts.append(_pointer(series, across, up, (left, right, top, bottom)) if pointer else "")
    return "".join(parts) + "</svg>"


def _line(line: Series, across: Scale, up: Scale) -> str:
    points = [f"{across(x):.1f},{up(y):.1f}" for x, y in line.points()]
    shade = "faint " if line.faint else ""
    parts = [_envelope(line, across, up), f'<polyline class="{shade}c{line.color}" points="{" ".join(points)}"/>']
    if line.dots or len(points) <= 20:
        parts += [
            f'<circle class="c{line.color}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.2"/>' for x, y in line.points()
        ]
    return "".join(parts)


def _legend(series: Sequence[Series], right: float) -> str:
    parts, x = [], right
    for line in reversed([line for line in series if not line.faint]):
        x -= 8 * len(line.name) + 34
        parts.append(
            f'<circle class="c{line.color}" cx="{x:.0f}" cy="12" r="4"/>'
            f'<text class="tick" x="{x + 9:.0f}" y="16">{escape(line.name)}</text>'
        )
    return "".join(parts)


def _pointer(
    series: Sequence[Series],
    across: Scale,
    up: Scale,
    box: tuple[float, float, float, float],
) -> str:
    """One transparent column for each x; the one under the pointer shows its rule, dots and values."""
    left, right, top, bottom = box
    columns: dict[float, list[tuple[Series, float]]] = {}
    for line in series:
        for x, y in line.points():
            columns.setdefault(x, []).append((line, y))
    places = sorted(columns)
    edges = [left, *((across(a) + across(b)) / 2 for a, b in pairwise(places)), right]
    parts = []
    for x, (start, end) in zip(places, pairwise(edges), strict=True):
        text = f"step {x:,.0f}   " + "   ".join(f"{line.name} {short(y)}" for line, y in columns[x])
        anchor = "start" if across(x) < (left + right) / 2 else "end"
        dots = "".join(
            f'<circle class="c{line.color}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="4.5"/>' for line, y in columns[x]
        )
        parts.append(
            f'<g class="at"><rect x="{start:.1f}" y="{top}" width="{end - start:.1f}" height="{bottom - top}"/>'
            f'<line x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{top}" y2="{bottom}"/>{dots}'
            f'<text x="{across(x):.1f}" y="{top - 5}" text-anchor="{anchor}">{escape(text)}</text></g>'
        )
    return "".join(parts)


def _envelope(line: Series, across: Scale, up: Scale) -> str:
    """The band between the smallest and largest value of each bucket, where buckets hold more than one."""
    if line.curve.size == 1:
        return ""
    high = [(across(bucket.step), up(bucket.high)) for bucket in line.curve.buckets]
    low = [(across(bucket.step), up(bucket.low)) for bucket in line.curve.buckets]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*high, *reversed(low)])
    return f'<polygon class="c{line.color}" points="{path}"/>'


def _ticks(low: float, high: float, wanted: int, whole: bool = False) -> list[float]:
    """Round numbers, 1, 2, 2.5 or 5 times a power of ten apart, from at or below `low` to at or past `high`."""
    if high == low:
        low, high = (low - 0.5, high + 0.5) if whole else (low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1))
    raw = (high - low) / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    distance = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    if whole:
        distance = max(1.0, float(round(distance)))
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return [number * distance for number in range(first, last + 1)]
