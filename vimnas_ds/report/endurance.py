"""Whether what a process holds grows: straight lines through samples of it, and a picture.

Of each half of a run, with x the step and y the quantity, least squares give

    y = a + b x,    rise = b * (last x - first x)

and the quantity is flat if neither the second half's line rises by more than a tolerance, nor the
peak of the last quarter above that of the second: a line through many samples sees little of an
evaluation that happens to run, peaks see through memory that is freed only now and then. The start
is left to caches, pools and allocators that fill.

What is flat may still grow by tolerance / (last x - first x) a step: a longer run proves more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

Series = tuple[Sequence[float], Sequence[float]]  # (steps, values)


@dataclass(frozen=True)
class Trend:
    """One quantity of one process over a run."""

    start: float  #: the first sample
    settled: float  #: median of the samples of the second quarter: after the warm-up
    end: float  #: median of those of the last quarter
    slopes: tuple[float, float]  #: per 1000 steps, of the first half and of the second
    rise: float  #: of the line through the second half, from its beginning to its end
    peak_rise: float  #: of the last quarter's peak above the second quarter's
    span: float  #: steps from the first sample of the second half to the last

    def is_flat(self, tolerance: float) -> bool:
        """Shrinking is flat too."""
        return max(self.rise, self.peak_rise) <= tolerance

    def unseen(self, tolerance: float) -> float:
        """What a steady growth may be, per step, and pass for flat."""
        return tolerance / self.span


def trend(steps: Sequence[float], values: Sequence[float]) -> Trend:
    """Raises ValueError on fewer than 8 samples, or on fewer than two steps in either half."""
    x, y = np.asarray(steps, float), np.asarray(values, float)
    if len(x) < 8:
        raise ValueError(f"a trend needs at least 8 samples, there are {len(x)}")
    share = (x - x[0]) / max(x[-1] - x[0], 1)
    slopes = [_slope(x[part], y[part]) for part in (share <= 0.5, share >= 0.5)]
    early, late, second = y[(share >= 0.25) & (share <= 0.5)], y[share >= 0.75], x[share >= 0.5]
    if not len(early):
        raise ValueError("a trend needs samples in the second quarter of the run")
    span = float(second[-1] - second[0])
    return Trend(
        float(y[0]),
        float(np.median(early)),
        float(np.median(late)),
        (1000 * slopes[0], 1000 * slopes[1]),
        slopes[1] * span,
        float(late.max() - early.max()),
        span,
    )


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    if len(np.unique(x)) < 2:
        raise ValueError("a trend needs samples at two steps at least in each half of the run")
    return float(np.polyfit(x - x.mean(), y, 1)[0])


def endurance_figure(samples: Mapping[str, Mapping[str, Series]]) -> Figure:
    """A panel for each quantity, a line for each process: samples[quantity][process]."""
    figure = Figure(figsize=(9, 1.9 * len(samples)), dpi=100, layout="constrained")
    grid = figure.subplots(len(samples), 1, sharex=True, squeeze=False).ravel()
    for axes, (quantity, processes) in zip(grid, samples.items(), strict=True):
        for name, (steps, values) in processes.items():
            axes.plot(steps, values, ".-", linewidth=0.8, markersize=3, label=name)
        axes.set_ylabel(quantity, fontsize=9)
        axes.grid(alpha=0.3)
    grid[0].legend(fontsize=8)
    grid[-1].set_xlabel("step")
    return figure
