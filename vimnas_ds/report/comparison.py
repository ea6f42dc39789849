"""The controls as a picture: accuracy against parameters, a panel for each dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

COLOURS = ("#cc3311", "#0077bb", "#009988", "#ee7733", "#aa3377", "#999933")
MARKERS = ("s", "D", "^", "v", "P", "X", "h", "<")


def comparison_figure(found: Mapping[str, Any], datasets: Sequence[str]) -> Figure:
    """`found`: as `search.comparison.comparison_object`. Picks are stars, the random ones of their
    size small dots of the same colour, other controls grey."""
    columns = min(len(datasets), 2)
    rows = -(-len(datasets) // columns)
    figure = Figure(figsize=(5.4 * columns, 3.6 * rows + 1.2), dpi=100, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    entries = found["entries"]
    picks = [e["name"] for e in entries if e["role"] == "pick"]
    controls = [e["name"] for e in entries if e["role"] == "control"]
    for axes, dataset in zip(grid, datasets, strict=False):
        for entry in entries:
            m = entry["datasets"][dataset]
            x, y = m["params"], 100 * m["top1"]
            if entry["role"] == "random":
                colour = COLOURS[picks.index(entry["like"]) % len(COLOURS)]
                axes.scatter(x, y, s=12, color=colour, alpha=0.35, linewidths=0)
            elif entry["role"] == "pick":
                colour = COLOURS[picks.index(entry["name"]) % len(COLOURS)]
                error = 100 * m["top1_se"]
                axes.errorbar(x, y, error, color=colour, capsize=3, linewidth=1)
                axes.scatter(
                    x, y, s=150, marker="*", color=colour, edgecolors="black", label=entry["name"],
                    zorder=3,
                )  # fmt: skip
            else:
                marker = MARKERS[controls.index(entry["name"]) % len(MARKERS)]
                axes.scatter(x, y, s=36, marker=marker, color="#666666", label=entry["name"])
        axes.set_title(dataset, fontsize=10)
        axes.set_xlabel("parameters")
        axes.set_ylabel(f"top-1 on {found['split']} (%)")
        axes.grid(alpha=0.3)
    for axes in grid[len(datasets) :]:
        axes.set_axis_off()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle("stars: picks; dots: random ones of the same size", fontsize=10)
    return figure
