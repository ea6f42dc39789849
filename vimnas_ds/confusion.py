"""Exact counts of a classification: what was predicted for every class, and top-5 hits.

Counts are integers, so their sum over processes does not depend on how samples were shared. Ranks
of classes go by probability, equal ones by class number: a row has one prediction, always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOP = 5


@dataclass(frozen=True)
class Pair:
    """`count` samples of class `true` were taken for class `predicted`, a `share` of that class."""

    true: int
    predicted: int
    count: int
    share: float


@dataclass(frozen=True)
class Confusion:
    """counts: int64 (C, C), [true, predicted]; top5_hits: int64 (C,), samples of each class whose
    label is among the five most probable classes (all of them, if there are fewer)."""

    counts: Tensor
    top5_hits: Tensor

    @classmethod
    def empty(cls, num_classes: int) -> Confusion:
        return cls(
            torch.zeros(num_classes, num_classes, dtype=torch.int64),
            torch.zeros(num_classes, dtype=torch.int64),
        )

    def add(self, probabilities: Tensor, label: int) -> None:
        """One sample's class probabilities (C,)."""
        best = probabilities.sort(descending=True, stable=True).indices[:TOP].tolist()
        self.counts[label, best[0]] += 1
        self.top5_hits[label] += label in best

    @property
    def count(self) -> int:
        """Samples."""
        return int(self.counts.sum())

    @property
    def correct(self) -> Tensor:
        """Correct predictions per class: (C,)."""
        return self.counts.diagonal()

    @property
    def per_class(self) -> Tensor:
        """Samples per class: (C,)."""
        return self.counts.sum(1)

    @property
    def top1(self) -> float:
        return int(self.correct.sum()) / self.count

    @property
    def top5(self) -> float:
        return int(self.top5_hits.sum()) / self.count

    @property
    def mean_class(self) -> float:
        """Accuracy averaged over the classes that have samples."""
        there = self.per_class > 0
        return float((self.correct[there].double() / self.per_class[there]).mean())

    def triples(self) -> list[tuple[int, int, int]]:
        """(true, predicted, count) of every cell that is not zero, in the matrix's order."""
        places = self.counts.nonzero().tolist()
        return [(t, p, int(self.counts[t, p])) for t, p in places]

    def most_confused(self, most: int) -> list[Pair]:
        """The largest cells off the diagonal: by count, then by share of the true class."""
        totals = self.per_class.tolist()
        pairs = [Pair(t, p, n, n / totals[t]) for t, p, n in self.triples() if t != p]
        return sorted(pairs, key=lambda x: (-x.count, -x.share, x.true, x.predicted))[:most]

    def worst_classes(self, most: int) -> list[int]:
        """Classes with samples, lowest accuracy first; equal ones by more samples."""
        correct, totals = self.correct.tolist(), self.per_class.tolist()
        there = [c for c, n in enumerate(totals) if n]
        return sorted(there, key=lambda c: (correct[c] / totals[c], -totals[c], c))[:most]


def class_labels(names: Sequence[str], num_classes: int) -> list[str]:
    """One name per output of the head; outputs that no file stands for get their number."""
    return [names[i] if i < len(names) else f"(class {i})" for i in range(num_classes)]
