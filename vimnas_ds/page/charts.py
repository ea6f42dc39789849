"""Charts as inline SVG: lines over steps, points with error bars.

Coordinates are fixed and the picture scales with its column: 400 units wide, so that its letters
stay readable on a phone. Colours are CSS classes, which page.css defines for both colour schemes:
`c0`, `c1`, ... datasets, `n0`, ... sub-networks, `q0`, ... choices from small to large. Line charts
carry their data for the page's pointer read-out; points carry their text as `data-tip`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vimnas_ds.page.markup import escape

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 24, 34
#: a curve of so few points shows them
MOST_SPOTS = 24
#: sub-networks with a colour of their own
SUBNETS = ("largest", "smallest", "perturbation", "front", "evolution")
#: colours of each kind that the style defines
COLOURS = {"c": 8, "n": 8, "q": 6}

#: shapes with corners: the radius of each, and how far the first is turned from the top
CORNERS: dict[str, tuple[list[float], float]] = {
    "star": ([8, 3.4] * 5, 0),
    "up": ([6] * 3, 0),
    "down": ([6] * 3, math.pi),
    "square": ([5.7] * 4, math.pi / 4),
    "diamond": ([6] * 4, 0),
    "cross": ([7, 2.6] * 4, math.pi / 4),
    "plus": ([7, 2.6] * 4, 0),
    "hexagon": ([5] * 6, 0),
}

Unit = Literal["", "%"]  # of an axis: plain numbers, or fractions as percent


@dataclass(frozen=True)
class Line:
    """A named curve; dashed ones tell a second kind of thing."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Dot:
    """A point with what is said about it; `error` is one standard error of y."""

    x: float
    y: float
    tip: str
    colour: str
    error: float = 0.0
    shape: str = "dot"  #: dot, small, ring, or one of CORNERS


def colour(kind: str, number: int) -> str:
    """The CSS class of the `number`th thing of a kind; they come round again."""
    return f"{kind}{number % COLOURS[kind]}"


def subnet_colour(name: str) -> str:
    """The CSS class of a sub-network, the same in all charts; others than `SUBNETS` share three."""
    if name in SUBNETS:
        return colour("n", SUBNETS.index(name))
    others = COLOURS["n"] - len(SUBNETS)
    return colour("n", len(SUBNETS) + sum(name.encode(errors="replace")) % others)


def tick_text(value: float, step: float, unit: Unit) -> str:
    """A number on an axis whose ticks are `step` apart: 1500 as 1.5k, 0.25 as 25%."""
    scale, suffix = (100.0, "%") if unit else (1.0, "")
    for size, letter in ((1e-9, "G"), (1e-6, "M"), (1e-3, "k")):
        if not unit and abs(value) * size >= 1:
            scale, suffix = size, letter
            break
    shown = [step * scale * 10**digits for digits in range(7)]
    digits = next((d for d, s in enumerate(shown) if s > 0.9 and abs(s - round(s)) < 1e-6), 6)
    return f"{value * scale:.{digits}f}{suffix}"


class Frame:
    """Axes: data to coordinates, ticks with their grid lines."""

    def __init__(
        self, xs: Sequence[float], ys: Sequence[float], height: int = HEIGHT, least: float = 0.0
    ):
        self.height = height
        self.x_ticks, (self.x0, self.x1) = _ticks(min(xs), max(xs), 4, tight=True)
        low, high = min(ys), max(ys)
        if high - low < least:
            middle = (low + high) / 2
            low, high = middle - least / 2, middle + least / 2
        self.y_ticks, (self.y0, self.y1) = _ticks(low, high, 4)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        inner = self.height - TOP - BOTTOM
        return self.height - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * inner

    def axes(self, x_name: str, y_name: str, x_unit: Unit, y_unit: Unit) -> str:
        bottom, parts = self.height - BOTTOM, []
        for tick in self.y_ticks:
            y, text = self.y(tick), tick_text(tick, _gap(self.y_ticks), y_unit)
            parts.append(f'<path class="rule" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(_text("tick", LEFT - 6, y + 3.5, text, "end"))
        for tick in self.x_ticks:
            x, text = self.x(tick), tick_text(tick, _gap(self.x_ticks), x_unit)
            parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
            parts.append(_text("tick", x, bottom + 15, text, "end" if x > WIDTH - 24 else "middle"))
        parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
        parts.append(_text("name", (LEFT + WIDTH - RIGHT) / 2, self.height - 4, x_name, "middle"))
        parts.append(_text("name", 2, 11, y_name, "start"))
        return "".join(parts)


def line_chart(
    lines: Sequence[Line],
    y_name: str,
    unit: Unit = "",
    from_zero: bool = False,
    level: tuple[str, float] | None = None,
    least: float = 0.0,
) -> str:
    """Curves over steps with their legend.

    `level`: a named dotted line to compare with; `least`: the height that the axis covers at least,
    so that noise is not drawn as large as a trend.
    """
    lines = [replace(n, points=[(x, y) for x, y in n.points if math.isfinite(y)]) for n in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return '<p class="none">no points yet</p>'
    ys = [y for line in lines for _, y in line.points]
    ys += [level[1]] if level else []
    ys += [0.0] if from_zero else []
    frame = Frame([x for line in lines for x, _ in line.points], ys, least=least)
    parts = [frame.axes("step", y_name, "", unit)]
    if level:
        y = frame.y(level[1])
        parts.append(f'<path class="level" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
    data = []
    for line in lines:
        spots = [(frame.x(x), frame.y(y)) for x, y in line.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        dashed = " dashed" if line.dashed else ""
        parts.append(f'<path class="line {line.colour}{dashed}" d="M{path}"/>')
        if len(spots) <= MOST_SPOTS:
            parts += [
                f'<circle class="spot {line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="2"/>'
                for x, y in spots
            ]
        read = [
            [round(x, 1), round(step), f"{value:.1%}" if unit else f"{value:.4g}"]
            for (x, _), (step, value) in zip(spots, line.points, strict=True)
        ]
        data.append({"name": line.name, "points": read})
    parts.append(f'<path class="hair" d="M0 {TOP}V{frame.height - BOTTOM}"/>')
    label = f"{y_name} over steps: {', '.join(line.name for line in lines)}"
    chart = _svg("".join(parts), frame.height, label, f' data-lines="{escape(json.dumps(data))}"')
    names = [(n.name, f"{n.colour}{' dashed' if n.dashed else ''}") for n in lines]
    if level:
        names.append((level[0], "level"))
    return chart + (legend(names) if len(names) > 1 else "")


def dot_chart(
    dots: Sequence[Dot],
    x_name: str,
    y_name: str,
    x_unit: Unit = "",
    steps: Sequence[tuple[float, float]] = (),
) -> str:
    """Points, their height a fraction; `steps`: a front's (x, y), cheapest first, joined in steps,
    for between two of them a budget buys the cheaper one."""
    xs = [d.x for d in dots]
    ys = [y for d in dots for y in (d.y - d.error, d.y + d.error)]
    frame = Frame(xs, ys, 260)
    parts = [frame.axes(x_name, y_name, x_unit, "%")]
    if len(steps) > 1:
        first, *rest = [(frame.x(x), frame.y(y)) for x, y in steps]
        path = f"M{first[0]:.1f} {first[1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in rest)
        parts.append(f'<path class="line front" d="{path}"/>')
    for dot in dots:
        parts.append(_dot(dot, frame))
    return _svg("".join(parts), frame.height, f"{y_name} against {x_name}")


def _dot(dot: Dot, frame: Frame) -> str:
    x, y = frame.x(dot.x), frame.y(dot.y)
    parts = ""
    if dot.error:
        low, high = frame.y(dot.y - dot.error), frame.y(dot.y + dot.error)
        parts = f'<path class="bar {dot.colour}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'
    tip = f' data-tip="{escape(dot.tip)}" tabindex="0" role="img" aria-label="{escape(dot.tip)}"'
    return parts + _mark(dot.shape, dot.colour, x, y, tip)


def _mark(shape: str, colour: str, x: float, y: float, extra: str = "") -> str:
    kind = f'class="dot {colour} {shape}"'
    if shape in CORNERS:
        radii, turn = CORNERS[shape]
        angles = [turn + 2 * math.pi * i / len(radii) for i in range(len(radii))]
        points = " ".join(
            f"{x + r * math.sin(a):.1f},{y - r * math.cos(a):.1f}"
            for r, a in zip(radii, angles, strict=True)
        )
        return f'<polygon {kind} points="{points}"{extra}/>'
    radius = {"dot": 4.5, "small": 2.6, "ring": 6.5}[shape]
    return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="{radius}"{extra}/>'


def margin_bar(value: float, error: float, reach: tuple[float, float], doubtful: bool) -> str:
    """A margin with one (thick) and two (thin) standard errors around it; 0 is the upright line.
    `reach`: the values at both ends."""
    low, high = reach

    def x(v: float) -> float:
        return 4 + 112 * (v - low) / ((high - low) or 1.0)

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
    """(name, CSS classes) of what a chart's lines show."""
    return _legend([(name, f'<path class="line {kind}" d="M1 4H17"/>', 8) for name, kind in names])


def mark_legend(names: Sequence[tuple[str, str, str]]) -> str:
    """(name, colour, shape) of what a chart's points show."""
    return _legend([(name, _mark(shape, kind, 9, 9), 18) for name, kind, shape in names])


def _legend(names: Sequence[tuple[str, str, int]]) -> str:
    """(name, drawing 18 wide, its height)."""
    marks = "".join(
        f'<span><svg class="mark" style="height:{height}px" viewBox="0 0 18 {height}" '
        f'aria-hidden="true">{drawing}</svg>{escape(name)}</span>'
        for name, drawing, height in names
    )
    return f'<div class="legend">{marks}</div>'


def _svg(inner: str, height: int, label: str, extra: str = "") -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(label)}"{extra}>{inner}</svg>'
    )


def _text(kind: str, x: float, y: float, text: str, anchor: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(text)}</text>'


def _gap(ticks: Sequence[float]) -> float:
    return ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) or 1.0


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
