"""Inherited against stand-alone accuracy of the same sub-networks, as scatter plots."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

#: Panels in one row.
COLUMNS = 3

Vector = NDArray[np.float64]


def ranking_figure(
    panels: Sequence[tuple[str, Vector, Vector]], params: Vector, title: str
) -> Figure:
    """One scatter plot a panel (its title, inherited and stand-alone accuracies as fractions),
    coloured by parameters."""
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.5 * columns + 1.2, 3.3 * rows + 0.5), dpi=100, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (name, inherited, alone) in zip(grid.flat, panels, strict=False):
        drawn = axes.scatter(
            100 * inherited,
            100 * alone,
            c=params / 1e6,
            cmap="viridis",
            s=34,
            edgecolors="black",
            alpha=0.8,
        )
        axes.margins(0.12)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.set_xlabel("inherited top-1 (%)")
        axes.set_ylabel("trained alone, top-1 (%)")
        axes.set_title(name, fontsize=10)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.colorbar(drawn, ax=grid, label="parameters (M)", shrink=0.8)
    figure.suptitle(title, fontsize=11)
    return figure
