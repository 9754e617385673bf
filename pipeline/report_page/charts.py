"""Charts as SVG text: points, boxes and lines in the colours of the page's style sheet, which knows light and dark.

A point tells what it is when the pointer rests on it (`title`). Nothing here knows what the numbers mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 8
"""Classes c0 to c7 of the style sheet, taken in turn."""

_ROW, _LEFT, _RIGHT, _TOP, _BOTTOM = 46, 150, 16, 10, 40


@dataclass(frozen=True)
class Point:
    """A value with what it says of itself; `group` chooses the colour."""

    x: float
    y: float
    title: str
    group: int = 0


@dataclass(frozen=True)
class Strip:
    """One row of a distribution: its points' `x`, quartiles, and the mean with its interval, where there are any."""

    name: str
    points: tuple[Point, ...]
    quartiles: tuple[float, float, float] | None
    mean: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Line:
    """A curve; (x, y) in order."""

    name: str
    points: tuple[tuple[float, float], ...]
    group: int = 0


@dataclass(frozen=True)
class Bar:
    """A length from zero, with what it says of itself; `group` chooses the colour."""

    name: str
    value: float
    title: str
    group: int = 0


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = (self.high - self.low) or 1.0
        return self.start + (self.end - self.start) * (value - self.low) / span


def ticks(low: float, high: float, *, wanted: int = 5) -> list[float]:
    """Round numbers within a range: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def strip_chart(strips: Sequence[Strip], *, x_label: str, low: float, high: float, width: int = 720) -> str:
    """Every case as a point, a row a label, with box and mean; read from left to right."""
    height = _TOP + _ROW * len(strips) + _BOTTOM
    scale = Scale(low, high, _LEFT, width - _RIGHT)
    parts = [_vertical_grid(scale, height - _BOTTOM, x_label)]
    for row, strip in enumerate(strips):
        middle = _TOP + _ROW * (row + 0.5)
        parts.append(f'<text class="name" x="{_LEFT - 12}" y="{middle + 4:.1f}">{escape(_short(strip.name))}</text>')
        parts.append(_box(strip, scale, middle))
        parts += [_dot(scale(p.x), middle + _jitter(n), p) for n, p in enumerate(strip.points)]
        parts.append(_mean(strip, scale, middle))
    return _svg(width, height, parts, f"Distribution of {x_label}")


def bar_chart(bars: Sequence[Bar], *, x_label: str, width: int = 720) -> str:
    """Bars from left to right, from a line at zero, which some may be below; each with its value behind it."""
    left, row = 190, 30
    height = _TOP + row * len(bars) + _BOTTOM
    low, high = min(0.0, *(bar.value for bar in bars)), max(0.0, *(bar.value for bar in bars))
    room = 0.14 * (high - low) or 1.0
    scale = Scale(low - room if low < 0 else 0.0, high + room if high > 0 else 0.0, left, width - _RIGHT)
    parts, zero = [_vertical_grid(scale, height - _BOTTOM, x_label)], scale(0.0)
    for number, bar in enumerate(bars):
        middle, end = _TOP + row * (number + 0.5), scale(bar.value)
        title = f"<title>{escape(bar.title)}</title>"
        parts.append(f'<text class="name" x="{left - 12}" y="{middle + 4:.1f}">{escape(_short(bar.name, 26))}</text>')
        parts.append(
            f'<rect class="c{bar.group % COLOURS}" x="{min(zero, end):.1f}" y="{middle - 9:.1f}" '
            f'width="{max(abs(end - zero), 1.0):.1f}" height="18" rx="2">{title}</rect>'
        )
        anchor, x = ("end", end - 6) if bar.value < 0 else ("start", end + 6)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{middle + 4:.1f}" text-anchor="{anchor}">{_value(bar.value)}</text>'
        )
    parts.append(f'<line class="level" x1="{zero:.1f}" x2="{zero:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
    return _svg(width, height, parts, x_label)


def scatter_chart(
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    levels: Sequence[tuple[float, str]] = (),
    width: int = 340,
    from_zero: bool = True,
) -> str:
    """Points with horizontal lines at `levels` (value, what it is); `from_zero` has 0 on the upright axis too."""
    height, left = 260, 62
    xs, ys = [p.x for p in points] or [0.0], [p.y for p in points] + [v for v, _ in levels]
    ys += [0.0] if from_zero or not ys else []
    across = Scale(*_padded(min(xs), max(xs)), left, width - _RIGHT)
    up = Scale(*_padded(min(ys), max(ys)), height - _BOTTOM, _TOP)
    parts = [_frame(across, up, x_label, y_label)]
    for value, name in levels:
        y = up(value)
        parts.append(f'<line class="level" x1="{left}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="note" x="{width - _RIGHT}" y="{y - 4:.1f}" text-anchor="end">{escape(name)}</text>')
    parts += [_dot(across(p.x), up(p.y), p) for p in points]
    return _svg(width, height, parts, f"{y_label} against {x_label}")


def line_chart(lines: Sequence[Line], *, x_label: str, y_label: str, width: int = 340) -> str:
    """Curves over a shared axis, each named at its end by a title."""
    height, left = 260, 62
    points = [point for line in lines for point in line.points] or [(0.0, 0.0)]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    across = Scale(min(xs), max(xs), left, width - _RIGHT)
    up = Scale(*_padded(min(ys), max(ys)), height - _BOTTOM, _TOP)
    parts = [_frame(across, up, x_label, y_label)]
    for line in lines:
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line.points)
        title = f"<title>{escape(line.name)}</title>"
        parts.append(f'<polyline class="curve s{line.group % COLOURS}" points="{path}">{title}</polyline>')
        if len(line.points) <= 12:
            ends = [Point(x, y, f"{line.name}: {y:.3f} at {x:.0f}", line.group) for x, y in line.points]
            parts += [_dot(across(p.x), up(p.y), p) for p in ends]
    return _svg(width, height, parts, f"{y_label} over {x_label}")


def _svg(width: int, height: int, parts: Sequence[str], label: str) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'


def _vertical_grid(scale: Scale, bottom: float, label: str) -> str:
    parts = []
    for value in ticks(scale.low, scale.high):
        x = scale(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>')
    middle = (scale.start + scale.end) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{bottom + 34}" text-anchor="middle">{escape(label)}</text>')
    return "".join(parts)


def _frame(across: Scale, up: Scale, x_label: str, y_label: str) -> str:
    """Grid, ticks and names of both axes."""
    parts = [_vertical_grid(across, up.start, x_label)]
    for value in ticks(up.low, up.high):
        y = up(value)
        parts.append(f'<line class="grid" x1="{across.start}" x2="{across.end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{across.start - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    middle = (up.start + up.end) / 2
    turned = f'transform="rotate(-90 14 {middle})"'
    parts.append(f'<text class="axis" x="14" y="{middle}" text-anchor="middle" {turned}>{escape(y_label)}</text>')
    return "".join(parts)


def _dot(x: float, y: float, point: Point) -> str:
    title = f"<title>{escape(point.title)}</title>"
    return f'<circle class="dot c{point.group % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{title}</circle>'


def _box(strip: Strip, scale: Scale, middle: float) -> str:
    if strip.quartiles is None:
        return ""
    first, median, third = (scale(q) for q in strip.quartiles)
    box = f'<rect class="box" x="{first:.1f}" y="{middle - 14}" width="{third - first:.1f}" height="28" rx="3"/>'
    return box + f'<line class="median" x1="{median:.1f}" x2="{median:.1f}" y1="{middle - 14}" y2="{middle + 14}"/>'


def _mean(strip: Strip, scale: Scale, middle: float) -> str:
    if strip.mean is None:
        return ""
    x, told = scale(strip.mean), f"mean {strip.mean:.3f}"
    part = ""
    if strip.interval is not None:
        low, high = (scale(v) for v in strip.interval)
        told += f", 95 % {strip.interval[0]:.3f} to {strip.interval[1]:.3f}"
        part = f'<line class="interval" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>'
    corners = f"{x - 5:.1f},{middle} {x:.1f},{middle - 6} {x + 5:.1f},{middle} {x:.1f},{middle + 6}"
    return f'<g>{part}<polygon class="mean" points="{corners}"/><title>{escape(told)}</title></g>'


def _value(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 2 else f"{value:.1f}"


def _jitter(number: int) -> float:
    """Pixels off the middle, the same each time: the golden section spreads neighbours far apart."""
    return 20.0 * ((number * 0.6180339887498949) % 1.0 - 0.5)


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room


def _short(name: str, most: int = 20) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
