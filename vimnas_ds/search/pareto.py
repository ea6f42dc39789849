"""Accuracy against a cost: dominance, crowding and hypervolume of points in the plane.

The selection is NSGA-II's (Deb et al. 2002): candidates in order of their front (those that no
other beats in accuracy and cost, then those once the first are taken away, ...), and within a front
the lonelier ones first, so that the front is kept along its whole length. It is written here and
not taken from pymoo: for two objectives it is these few lines, while pymoo's operators work on
vectors of one length, and a sub-network's layers come and go with its depth. Ours do not, check
exact constraints before anything is evaluated, and evaluate no candidate twice; parents are chosen
among all evaluated, since each is an evaluation paid for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Point(NamedTuple):
    """Lower cost and higher accuracy are better."""

    cost: float
    accuracy: float


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other dominates, cheapest first; of equal points the first."""
    order = sorted(range(len(points)), key=lambda i: (points[i].cost, -points[i].accuracy))
    found: list[int] = []
    for i in order:
        if not found or points[i].accuracy > points[found[-1]].accuracy:
            found.append(i)
    return found


def crowding(points: Sequence[Point]) -> list[float]:
    """Of each point of a front, cheapest first: the distance between its two neighbours, in units
    of the front's extent on each axis; infinite at the ends."""
    if len(points) < 3:
        return [math.inf] * len(points)
    first, last = points[0], points[-1]
    width, height = last.cost - first.cost, last.accuracy - first.accuracy
    inner = [
        (after.cost - before.cost) / width + (after.accuracy - before.accuracy) / height
        for before, after in zip(points, points[2:], strict=False)
    ]
    return [math.inf, *inner, math.inf]


def survivors(points: Sequence[Point], count: int) -> list[int]:
    """Indices of the best `count` points, best first: by front, then by crowding."""
    left, found = list(range(len(points))), list[int]()
    while left and len(found) < count:
        taken = [left[i] for i in front([points[i] for i in left])]
        distance = dict(zip(taken, crowding([points[i] for i in taken]), strict=True))
        found += sorted(taken, key=lambda i: -distance[i])
        left = [i for i in left if i not in distance]
    return found[:count]


def hypervolume(points: Sequence[Point], low: float, high: float) -> float:
    """The area that the points dominate between the costs `low` and `high` and above accuracy 0,
    divided by the width: the best accuracy within a budget, averaged over budgets between the two
    (0 where nothing is that cheap)."""
    if high <= low:
        return max((p.accuracy for p in points), default=0.0)
    steps = [points[i] for i in front(points)]
    ends = [p.cost for p in steps[1:]] + [high]
    area = sum(p.accuracy * (end - p.cost) for p, end in zip(steps, ends, strict=True))
    return area / (high - low)


def knee(points: Sequence[Point]) -> int:
    """Of a front, cheapest first: the point farthest above the line between its ends, where more
    cost begins to bring less."""
    first, last = points[0], points[-1]
    if len(points) < 3:
        return len(points) - 1
    width, height = last.cost - first.cost, last.accuracy - first.accuracy
    gain = [(p.accuracy - first.accuracy) / height - (p.cost - first.cost) / width for p in points]
    return gain.index(max(gain))
