"""Statistics of the searches' reports: pure functions of numbers, NumPy alone.

    tau_b = (C - D) / sqrt((C + D + Tx) (C + D + Ty))         (Kendall 1945: ties in the roots)

over all pairs: C in the same order in x and y, D in opposite order, Tx (Ty) equal in x (y) alone;
spearman is Pearson's correlation of average ranks. Both are nan where x or y is constant: then
there is no order to compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]
Indices = NDArray[np.int64]

RESAMPLES = 2000


def kendall_tau_b(x: ArrayLike, y: ArrayLike) -> float:
    """Rank correlation of two vectors of one length, -1 to 1; nan where either is constant.

    Raises ValueError for other shapes and for values that are not numbers.
    """
    first, second = _pair(x, y)
    upper = np.triu_indices(len(first), 1)
    a = np.sign(first[:, None] - first)[upper]
    b = np.sign(second[:, None] - second)[upper]
    return _ratio(float(a @ b), float(a @ a), float(b @ b))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Correlation of the ranks, ties at their average; nan and errors as `kendall_tau_b`."""
    first, second = (_ranks(values) for values in _pair(x, y))
    a, b = first - first.mean(), second - second.mean()
    return _ratio(float(a @ b), float(a @ a), float(b @ b))


def bootstrap_interval(
    statistic: Callable[..., float],
    counts: Sequence[int],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a statistic of several independent groups, each resampled alone.

    Args:
        statistic: called with one index vector a group, `counts[g]` draws of 0 .. counts[g] - 1.
        counts: members of each group.

    Resamples where the statistic is nan say nothing and are left out; (nan, nan) if all are.
    """
    rng = np.random.default_rng(seed)
    found = np.array(
        [statistic(*(rng.integers(n, size=n) for n in counts)) for _ in range(resamples)]
    )
    found = found[~np.isnan(found)]
    if not len(found):
        return math.nan, math.nan
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def standard_error(values: ArrayLike) -> float:
    """Of the mean of independent values; nan for fewer than two."""
    sample = np.asarray(values, np.float64)
    return float(sample.std(ddof=1)) / math.sqrt(len(sample)) if len(sample) > 1 else math.nan


def percentile(value: float, others: ArrayLike) -> float:
    """Share of `others` below `value`, equal ones counted half, in percent; nan if there are none.

    50 is what a pick no better than random ones gets on average.
    """
    sample = np.asarray(others, np.float64)
    if not len(sample):
        return math.nan
    return 100 * float((sample < value).mean() + (sample == value).mean() / 2)


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[Vector, Vector]:
    first, second = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(
            f"two vectors of one length are needed, got {first.shape} and {second.shape}"
        )
    if np.isnan(first).any() or np.isnan(second).any():
        raise ValueError("nan has no place in an order")
    return first, second


def _ranks(values: Vector) -> Vector:
    """Average ranks: how many are below, and half of those that are equal."""
    return (values[:, None] > values).sum(1) + (values[:, None] == values).sum(1) / 2


def _ratio(product: float, first: float, second: float) -> float:
    return product / math.sqrt(first * second) if first and second else math.nan
