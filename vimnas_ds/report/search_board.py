"""TensorBoard of the searches: scalars and pictures; candidates against their size, fronts.

By default they lie under the run's own tensorboard folder, one subfolder a search, replaced by the
next one of its kind: `tensorboard --logdir RUN/tensorboard` shows training and searches together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from vimnas_ds.report.pictures import render


def candidates_figure(
    params: Sequence[float], values: Sequence[float], best: int, title: str, metric: str
) -> Figure:
    """Every candidate's accuracy (or, by the metric "loss", loss) against its parameters; `best`
    (an index) is marked."""
    figure = Figure(figsize=(5.2, 3.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    shown = values if metric == "loss" else [100 * v for v in values]
    axes.scatter(params, shown, s=18, color="#4477aa", alpha=0.7)
    axes.scatter([params[best]], [shown[best]], s=70, facecolors="none", edgecolors="r")
    axes.set_xlabel("parameters")
    axes.set_ylabel("mean loss on select" if metric == "loss" else "mean top-1 on select (%)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    return figure


def front_figure(
    costs: Sequence[float],
    accuracies: Sequence[float],
    front: Sequence[int],
    errors: Sequence[float],
    pick: int,
    cost_name: str,
) -> Figure:
    """Every candidate's accuracy against a cost; the `front`'s indices (cheapest first) joined in
    steps, for between two of them a budget buys the cheaper one, with one standard error of their
    accuracies (`errors`, by the front's order); `pick` (an index) is marked."""
    figure = Figure(figsize=(6.4, 4.2), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    points = [100 * a for a in accuracies]
    axes.scatter(costs, points, s=14, color="#bbbbbb", label=f"{len(points)} evaluated")
    x, y = [costs[i] for i in front], [points[i] for i in front]
    axes.step(x, y, where="post", color="#4477aa", linewidth=1.2)
    bars = [100 * e for e in errors]
    axes.errorbar(x, y, bars, fmt="none", ecolor="#4477aa", elinewidth=1, capsize=2)
    label = f"front of {len(front)}, +- one standard error"
    axes.scatter(x, y, s=26, color="#4477aa", label=label, zorder=3)
    picked = axes.scatter([costs[pick]], [points[pick]], s=110, label="picked", zorder=4)
    picked.set(facecolor="none", edgecolor="#bb5566", linewidth=1.6)
    axes.set_xlabel(cost_name)
    axes.set_ylabel("mean top-1 on select (%)")
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    return figure


class SearchBoard:
    """Event files of one search, replacing an earlier search's in `folder`. For rank 0 alone."""

    def __init__(self, folder: Path):
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = SummaryWriter(str(folder))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def figure(self, tag: str, figure: Figure, step: int = 0) -> None:
        """On the disk when it returns, with all before it: a search may be killed."""
        self._writer.add_image(tag, render(figure), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
