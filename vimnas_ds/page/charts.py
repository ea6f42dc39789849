"""Charts as inline SVG: lines over steps, points with error bars.

Coordinates are fixed and the picture scales with its column: 400 units wide, so that its letters
stay readable on a phone. Colours are CSS classes (`c0`, `c1`, ... in the page's style), which both
colour schemes define. Line charts carry their data for the page's pointer read-out; points carry
their text as `data-tip`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vimnas_ds.page.markup import escape

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 10, 34
#: colours that the style defines
COLOURS = 8

Write = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """A named curve; `colour` counts from 0, dashed ones tell a second kind of thing."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Dot:
    """A point with what is said about it; `error` is one standard error of y."""

    x: float
    y: float
    tip: str
    colour: int
    error: float = 0.0
    shape: str = "dot"  #: dot, small, ring or star


def percent_axis(value: float) -> str:
    """A fraction on an axis."""
    return f"{100 * value:.3g}%"


def number_axis(value: float) -> str:
    """A number on an axis: 1500 as 1.5k."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


class Frame:
    """Axes: data to coordinates, ticks with their grid lines."""

    def __init__(
        self, xs: Sequence[float], ys: Sequence[float], floor: float | None, height: int = HEIGHT
    ):
        self.height = height
        self.x_ticks, (self.x0, self.x1) = _ticks(min(xs), max(xs), 4, tight=True)
        low = min(ys) if floor is None else min(floor, *ys)
        self.y_ticks, (self.y0, self.y1) = _ticks(low, max(ys), 4)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        inner = self.height - TOP - BOTTOM
        return self.height - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * inner

    def axes(self, x_name: str, y_name: str, write_x: Write, write_y: Write) -> str:
        bottom = self.height - BOTTOM
        parts = []
        for tick in self.y_ticks:
            y = self.y(tick)
            parts.append(f'<path class="rule" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            text = escape(write_y(tick))
            place = f'x="{LEFT - 5}" y="{y + 3.5:.1f}"'
            parts.append(f'<text class="tick" {place} text-anchor="end">{text}</text>')
        for tick in self.x_ticks:
            x = self.x(tick)
            anchor = "end" if x > WIDTH - 24 else "middle"
            parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
            text = escape(write_x(tick))
            place = f'x="{x:.1f}" y="{bottom + 15}" text-anchor="{anchor}"'
            parts.append(f'<text class="tick" {place}>{text}</text>')
        parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        place = f'x="{middle}" y="{self.height - 4}" text-anchor="middle"'
        parts.append(f'<text class="name" {place}>{escape(x_name)}</text>')
        parts.append(
            f'<text class="name" transform="translate(10 {(TOP + bottom) / 2:.0f}) rotate(-90)" '
            f'text-anchor="middle">{escape(y_name)}</text>'
        )
        return "".join(parts)


def line_chart(
    lines: Sequence[Line],
    y_name: str,
    write_y: Write = number_axis,
    floor: float | None = None,
    level: tuple[str, float] | None = None,
    key: bool = True,
) -> str:
    """Curves over steps with their legend; `level` is a named dashed line to compare with."""
    lines = [Line(n.name, _finite(n.points), n.colour, n.dashed) for n in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return '<p class="none">no points yet</p>'
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + ([level[1]] if level else [])
    frame = Frame(xs, ys, floor)
    parts = [frame.axes("step", y_name, number_axis, write_y)]
    if level:
        y = frame.y(level[1])
        parts.append(f'<path class="level" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
    data = []
    for line in lines:
        spots = [(frame.x(x), frame.y(y)) for x, y in line.points]
        colour = f"c{line.colour % COLOURS}"
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        dashed = " dashed" if line.dashed else ""
        parts.append(f'<path class="line {colour}{dashed}" d="M{path}"/>')
        if len(spots) <= 24:
            dots = "".join(
                f'<circle class="spot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in spots
            )
            parts.append(dots)
        read = [[round(x, 1), round(s), write_y(v) if write_y is percent_axis else f"{v:.4g}"]
                for (x, _), (s, v) in zip(spots, line.points, strict=True)]  # fmt: skip
        data.append({"name": line.name, "colour": colour, "points": read})
    parts.append(f'<path class="hair" d="M0 {TOP}V{frame.height - BOTTOM}"/>')
    label = f"{y_name} over steps: {', '.join(line.name for line in lines)}"
    chart = _svg("".join(parts), frame.height, label, f' data-lines="{escape(json.dumps(data))}"')
    names = [(n.name, f"c{n.colour % COLOURS}{' dashed' if n.dashed else ''}") for n in lines]
    if level:
        names.append((level[0], "level"))
    return chart + (legend(names) if key and len(names) > 1 else "")


def dot_chart(
    dots: Sequence[Dot],
    x_name: str,
    y_name: str,
    write_x: Write = number_axis,
    write_y: Write = percent_axis,
    steps: Sequence[tuple[float, float]] = (),
) -> str:
    """Points; `steps`: a front's (x, y), cheapest first, joined in steps, for between two of them a
    budget buys the cheaper one."""
    xs = [d.x for d in dots]
    ys = [y for d in dots for y in (d.y - d.error, d.y + d.error)]
    frame = Frame(xs, ys, None, 260)
    parts = [frame.axes(x_name, y_name, write_x, write_y)]
    if len(steps) > 1:
        first, *rest = [(frame.x(x), frame.y(y)) for x, y in steps]
        path = f"M{first[0]:.1f} {first[1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in rest)
        parts.append(f'<path class="line c0" d="{path}"/>')
    for dot in dots:
        parts.append(_dot(dot, frame))
    return _svg("".join(parts), frame.height, f"{y_name} against {x_name}")


def _dot(dot: Dot, frame: Frame) -> str:
    x, y, colour = frame.x(dot.x), frame.y(dot.y), f"c{dot.colour % COLOURS}"
    parts = ""
    if dot.error:
        low, high = frame.y(dot.y - dot.error), frame.y(dot.y + dot.error)
        parts = f'<path class="bar {colour}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'
    tip = f' data-tip="{escape(dot.tip)}" tabindex="0" role="img" aria-label="{escape(dot.tip)}"'
    if dot.shape == "star":
        corners = " ".join(
            f"{x + r * math.sin(i * math.pi / 5):.1f},{y - r * math.cos(i * math.pi / 5):.1f}"
            for i, r in enumerate([8, 3.4] * 5)
        )
        return f'{parts}<polygon class="dot {colour} star" points="{corners}"{tip}/>'
    radius = {"dot": 4.5, "small": 2.6, "ring": 6.5}[dot.shape]
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius}"'
    return f'{parts}<circle class="dot {colour} {dot.shape}" {place}{tip}/>'


def margin_bar(value: float, error: float, most: float, doubtful: bool) -> str:
    """A margin with one (thick) and two (thin) standard errors around it; 0 is the upright line."""

    def x(v: float) -> float:
        return 4 + 112 * min(max((v + 0.35 * most) / (1.7 * most), 0), 1)

    bars = ""
    if math.isfinite(error):
        bars = (
            f'<path class="bar thin" d="M{x(value - 2 * error):.1f} 9H{x(value + 2 * error):.1f}"/>'
            f'<path class="bar thick" d="M{x(value - error):.1f} 9H{x(value + error):.1f}"/>'
        )
    mood = "doubtful" if doubtful else "sure"
    dot = f'<circle class="dot" cx="{x(value):.1f}" cy="9" r="3.6"/>'
    zero = f'<path class="axis" d="M{x(0):.1f} 1V17"/>'
    inner = f"{zero}{bars}{dot}"
    return f'<svg class="margin {mood}" viewBox="0 0 120 18" aria-hidden="true">{inner}</svg>'


def legend(names: Sequence[tuple[str, str]]) -> str:
    """(name, CSS classes) of what a chart shows."""
    marks = "".join(
        f'<span><svg class="mark" viewBox="0 0 18 8" aria-hidden="true"><path class="line {kind}" '
        f'd="M1 4H17"/></svg>{escape(name)}</span>'
        for name, kind in names
    )
    return f'<div class="legend">{marks}</div>'


def _svg(inner: str, height: int, label: str, extra: str = "") -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(label)}"{extra}>{inner}</svg>'
    )


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _ticks(
    low: float, high: float, count: int, tight: bool = False
) -> tuple[list[float], tuple[float, float]]:
    """Round numbers, about `count` of them, and the range that an axis covers: to the outer ticks,
    or (`tight`) just the data's."""
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if tight:
        margin = 0.03 * (high - low)
        inside = [step * i for i in range(first, last + 1)]
        reach = low - margin, high + margin
        return [t for t in inside if reach[0] <= t <= reach[1]], reach
    return [step * i for i in range(first, last + 1)], (step * first, step * last)
