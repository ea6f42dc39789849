"""One picture of a classification: confusion matrix and per-class accuracy.

Up to `MAX_MATRIX` classes the matrix itself, rows normalised (a row: what the samples of one class
were taken for), with the accuracies as bars in the same rows. Above, a wall of cells says nothing:
then the most confused pairs, the worst classes, and the accuracies of all classes, sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vimnas_ds.confusion import Confusion

#: Classes up to which the matrix is drawn, and up to which its cells hold their shares in percent.
MAX_MATRIX, MAX_WRITTEN = 40, 16
#: Pairs and classes listed for larger heads.
LISTED = 25
#: Letters of a class name that are shown beside a matrix, and in a list.
LETTERS, LIST_LETTERS = 40, 52
BLUE, RED = "#4477aa", "#bb5566"


def confusion_figure(confusion: Confusion, names: Sequence[str], title: str) -> Figure:
    """`names`: one per class. Raises ValueError for another number of names."""
    if len(names) != len(confusion.counts):
        raise ValueError(f"{len(confusion.counts)} classes, {len(names)} names")
    if len(names) <= MAX_MATRIX:
        figure = _matrix(confusion, [shortened(name, LETTERS) for name in names])
    else:
        figure = _lists(confusion, [shortened(name, LIST_LETTERS) for name in names])
    mean = f"mean of classes {confusion.mean_class:.1%}"
    numbers = f"top-1 {confusion.top1:.1%}, top-5 {confusion.top5:.1%}, {mean}"
    figure.suptitle(f"{title}\n{numbers}, {confusion.count:,} samples", fontsize=11)
    return figure


def write_figure(figure: Figure, path: Path) -> None:
    """As PNG."""
    FigureCanvasAgg(figure).print_png(str(path))


def shortened(name: str, letters: int) -> str:
    """On one line of at most so many letters: words from both ends, which tell similar sentences
    apart ("Putting something ... onto something")."""
    text = " ".join(name.split())
    if len(text) > letters:
        half = letters // 2
        front, back = text[: letters - half - 1], text[-half:]
        if " " in front and " " in back:  # whole words
            front, back = front.rpartition(" ")[0], back.partition(" ")[2]
        text = f"{front} … {back}" if len(front) + len(back) + 3 <= letters else f"{front}…{back}"
    return text.replace("$", r"\$")


def _matrix(confusion: Confusion, names: list[str]) -> Figure:
    count = len(names)
    written = count <= MAX_WRITTEN
    cell, size = (0.52, 9) if written else (0.24, 7)
    letters = max(map(len, names))
    side, margin = max(2.6, cell * count), 0.075 * letters
    figure = Figure(figsize=(margin + side + 3.6, 1.6 + margin + side), dpi=100)
    figure.set_layout_engine("constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[side, 2.0])

    totals = confusion.per_class.numpy()
    rows = confusion.counts.numpy() / np.maximum(totals, 1)[:, None]
    shown = np.ma.masked_array(rows, np.broadcast_to(totals[:, None] == 0, rows.shape))
    left.set_facecolor("#cccccc")  # a class without samples
    image = left.imshow(shown, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    if written:
        for (true, predicted), share in np.ndenumerate(rows):
            if share:
                ink = "white" if share > 0.6 else "black"
                text = f"{100 * share:.0f}"
                left.text(predicted, true, text, ha="center", va="center", color=ink, fontsize=8)
    left.set_xticks(range(count), names, rotation=90, fontsize=size)
    left.set_yticks(range(count), names, fontsize=size)
    left.set_xlabel("predicted")
    left.set_ylabel("true class")
    left.set_title("share of each true class" + (" in %" if written else ""), fontsize=10)
    if not written:
        figure.colorbar(image, ax=left, location="left", shrink=0.5)

    accuracy = [rows[i, i] if totals[i] else 0.0 for i in range(count)]
    right.barh(range(count), accuracy, height=0.7, color=BLUE)
    for i, total in enumerate(totals.tolist()):
        text = f"{accuracy[i]:.0%} of {total}" if total else "no samples"
        right.text(1.03, i, text, va="center", fontsize=size)
    right.axvline(confusion.top1, color=RED, linestyle="--", linewidth=1.2)
    right.set_xlim(0, 1.55)
    right.set_xticks([0, 0.5, 1], ["0", "50%", "100%"])
    right.tick_params(labelleft=False, left=False)
    right.set_title("accuracy (dashed: top-1)", fontsize=10)
    right.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _lists(confusion: Confusion, names: list[str]) -> Figure:
    pairs, worst = confusion.most_confused(LISTED), confusion.worst_classes(LISTED)
    correct, totals = confusion.correct.tolist(), confusion.per_class.tolist()
    figure = Figure(figsize=(17, 2.2 + 0.22 * LISTED + 2.6), dpi=100, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1.5, 1], height_ratios=[0.22 * LISTED, 2.6])

    left = figure.add_subplot(grid[0, 0])
    labels = [f"{names[p.true]} → {names[p.predicted]}" for p in pairs]
    values = [p.count for p in pairs]
    notes = [f"{p.count} of {totals[p.true]} ({p.share:.0%})" for p in pairs]
    _listed(left, labels, values, notes, RED)
    left.set_title("most confused: true → predicted, samples", fontsize=10)
    if not pairs:
        left.text(0.5, 0.5, "none", transform=left.transAxes, ha="center")

    right = figure.add_subplot(grid[0, 1])
    shares = [correct[c] / totals[c] for c in worst]
    notes = [f"{s:.0%} of {totals[c]}" for c, s in zip(worst, shares, strict=True)]
    _listed(right, [names[c] for c in worst], shares, notes, BLUE)
    right.set_xlim(0, 1.25)
    right.set_xticks([0, 0.5, 1], ["0", "50%", "100%"])
    right.set_title("worst classes: accuracy", fontsize=10)

    below = figure.add_subplot(grid[1, :])
    every = sorted((n / total for n, total in zip(correct, totals, strict=True) if total))
    below.fill_between(range(len(every)), every, step="mid", color=BLUE, alpha=0.75)
    below.axhline(confusion.top1, color=RED, linestyle="--", linewidth=1.2)
    below.set_ylim(0, 1)
    below.set_xlabel("classes")
    below.set_xlim(-0.5, max(len(every) - 0.5, 0.5))
    below.set_yticks([0, 0.5, 1], ["0", "50%", "100%"])
    empty = len(totals) - len(every)
    note = f"; {empty} without samples left out" if empty else ""
    below.set_title(f"all classes, sorted by accuracy (dashed: top-1{note})", fontsize=10)
    below.spines[["top", "right"]].set_visible(False)
    return figure


def _listed(
    axes: Axes, labels: list[str], values: Sequence[float], notes: list[str], color: str
) -> None:
    """Horizontal bars from the top, each with its note behind it."""
    bars = axes.barh(range(len(labels)), values, height=0.7, color=color)
    axes.bar_label(bars, notes, fontsize=8, padding=3)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(LISTED - 0.5, -0.5)
    axes.set_xlim(0, 1.25 * max([*values, 1e-9]))
    axes.spines[["top", "right"]].set_visible(False)
