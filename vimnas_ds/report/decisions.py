"""Decisions of a perturbation search as a table and as a picture, in the order made.

drop     accuracy of the network before, minus that without the choice; by the metric "loss", the
         loss without the choice, minus that before
margin   of the kept choice to the runner-up, +- its paired standard error (the least certain round
         of an elimination)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vimnas_ds.report.table import format_table


class Unit(NamedTuple):
    """How the drops of a metric are written."""

    title: str
    scale: float
    digits: int

    def write(self, value: float, sign: str = "") -> str:
        return f"{self.scale * value:{sign}.{self.digits}f}"


#: by the search's metric
UNITS = {
    "top1": Unit("top-1 points lost without", 100, 2),
    "loss": Unit("loss (nats) gained without", 1, 4),
}


class DecisionRow(NamedTuple):
    """One decision as a picture shows it; accuracies are shares, losses in nats."""

    name: str
    drop: Mapping[float, float]  #: what is lost without each choice
    kept: float
    margin: float  #: of the kept choice to the runner-up
    margin_se: float
    note: str  #: why the margin decides nothing, if it does not


def decisions_table(decisions: Sequence[DecisionRow], metric: str) -> str:
    """As plain text, in the unit of the metric."""
    rows, unit = list[list[str]](), UNITS[metric]
    for d in decisions:
        drops = "  ".join(f"{c:g}: {unit.write(v, '+')}" for c, v in d.drop.items())
        margin = f"{unit.write(d.margin)} +- {unit.write(d.margin_se)}"
        rows.append([d.name, f"{d.kept:g}", drops, margin, d.note])
    return format_table(["decision", "kept", unit.title, "margin", "note"], rows)


def drops_figure(decisions: Sequence[DecisionRow], metric: str) -> Figure:
    """Rows: decisions in the order made. Left: the drop of each choice, the kept one framed. Right:
    the margin to the runner-up with one and two paired standard errors; hollow and starred inside
    the noise."""
    unit = UNITS[metric]
    widest = max(len(d.drop) for d in decisions)
    most = max(abs(v) for d in decisions for v in d.drop.values()) or 1.0
    rows = range(len(decisions))
    size = (5.0 + 1.1 * widest, max(2.5, 1.2 + 0.32 * len(decisions)))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes, beside = figure.subplots(1, 2, sharey=True, width_ratios=[1.1 * widest + 0.6, 3.0])
    grid = [[*d.drop.values(), *[math.nan] * (widest - len(d.drop))] for d in decisions]
    axes.imshow(grid, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    for row, decision in enumerate(decisions):
        for column, (choice, value) in enumerate(decision.drop.items()):
            text = f"{choice:g}: {unit.write(value, '+')}"
            weight = "bold" if choice == decision.kept else "normal"
            ink = "white" if abs(value) > 0.6 * most else "black"
            label = axes.text(column, row, text, ha="center", va="center", fontsize=8)
            label.set(color=ink, weight=weight)
            if choice == decision.kept:
                corner = (column - 0.48, row - 0.46)
                axes.add_patch(Rectangle(corner, 0.96, 0.92, fill=False, linewidth=1.6))
        mean, error = unit.scale * decision.margin, unit.scale * decision.margin_se
        colour = "#aa3377" if decision.note else "#4477aa"
        if math.isfinite(error):
            beside.plot([mean - 2 * error, mean + 2 * error], [row, row], color=colour, linewidth=1)
            beside.plot([mean - error, mean + error], [row, row], color=colour, linewidth=3)
        face = "white" if decision.note else colour
        beside.plot([mean], [row], "o", color=colour, markerfacecolor=face, markersize=5)
        margin = (
            f"{unit.write(decision.margin)} \N{PLUS-MINUS SIGN} {unit.write(decision.margin_se)}"
        )
        text = margin + (" *" if decision.note else "")
        beside.text(
            1.02, row, text, transform=beside.get_yaxis_transform(), va="center", fontsize=8
        )
    axes.set_yticks(rows, [d.name for d in decisions], fontsize=8)
    axes.set_xticks([])
    axes.set_title(f"{unit.title}\na choice; framed: kept", fontsize=10)
    beside.axvline(0, color="black", linewidth=0.8)
    beside.tick_params(axis="y", left=False)
    beside.tick_params(axis="x", labelsize=8)
    unsure = sum(bool(d.note) for d in decisions)
    noise = f"* in the noise: {unsure} of {len(decisions)}"
    beside.set_title(f"margin to the runner-up\n{noise}", fontsize=10)
    beside.grid(axis="x", alpha=0.3)
    return figure
