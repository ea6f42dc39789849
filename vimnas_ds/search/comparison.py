"""Does a pick beat random sub-networks of its size? Numbers, and a verdict that cannot flatter.

    p = (1 + random ones at least as good) / (k + 1)

is the exact probability that the pick, were it just another random one, would come out so high: no
distribution is assumed, ties count against it. With 20 controls only a pick better than all of them
has p < 0.05, and only then is it said to beat them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vimnas_ds.search.controls import Entry
from vimnas_ds.search.statistics import percentile, standard_error
from vimnas_ds.space import Arch

#: in place of a dataset's name: the objective's weighted mean over datasets
MEAN = "mean"
LEVEL = 0.05


@dataclass(frozen=True)
class Measured:
    """A sub-network on one dataset: accuracies as fractions, `count` samples, costs."""

    top1: float
    top5: float
    count: int
    params: int
    gflops: float

    @property
    def top1_se(self) -> float:
        """Of the accuracy, by the number of samples."""
        return math.sqrt(self.top1 * (1 - self.top1) / self.count)


@dataclass(frozen=True)
class Verdict:
    """A pick against its k random ones on a dataset, or on the mean of all."""

    pick: str
    dataset: str
    top1: float
    random_mean: float
    random_se: float
    random_best: float
    percentile: float
    p: float
    k: int

    @property
    def beats(self) -> bool:
        return self.p < LEVEL

    def __str__(self) -> str:
        gap = 100 * (self.top1 - self.random_mean)
        what = f"{gap:+.1f} points of the mean of {self.k} random ones, p = {self.p:.2f}"
        if self.beats:
            return f"{self.pick} beats random sub-networks of its size on {self.dataset} ({what})"
        note = "" if self.k >= 1 / LEVEL - 1 else "; too few of them to tell"
        return (
            f"{self.pick} does NOT beat random sub-networks of its size on {self.dataset} "
            f"({what}{note})"
        )


#: sub-network -> dataset -> what was measured
Table = Mapping[Arch, Mapping[str, Measured]]


def top1(table: Table, arch: Arch, dataset: str, weights: Mapping[str, float]) -> float:
    """On a dataset, or for `MEAN` the weighted mean."""
    if dataset != MEAN:
        return table[arch][dataset].top1
    return sum(w * table[arch][name].top1 for name, w in weights.items())


def judge(entries: Sequence[Entry], table: Table, weights: Mapping[str, float]) -> list[Verdict]:
    """Every pick on every dataset and on their mean."""
    verdicts = []
    for entry in entries:
        if entry.role != "pick":
            continue
        alike = [e.arch for e in entries if e.like == entry.name]
        for dataset in (MEAN, *weights):
            ours = top1(table, entry.arch, dataset, weights)
            others = [top1(table, arch, dataset, weights) for arch in alike]
            at_least = sum(round(o, 9) >= round(ours, 9) for o in others)
            verdicts.append(
                Verdict(
                    entry.name,
                    dataset,
                    ours,
                    statistics.fmean(others),
                    standard_error(others),
                    max(others),
                    percentile(ours, others),
                    (1 + at_least) / (len(others) + 1),
                    len(others),
                )
            )
    return verdicts


def comparison_object(
    entries: Sequence[Entry], table: Table, weights: Mapping[str, float], about: Mapping[str, Any]
) -> dict[str, Any]:
    """compare.json: `about`, every entry with its numbers by dataset, and the verdicts."""
    return {
        **about,
        "weights": dict(weights),
        "entries": [
            {
                "name": entry.name,
                "role": entry.role,
                "like": entry.like,
                "arch": json.loads(entry.arch.to_json()),
                "mean_top1": top1(table, entry.arch, MEAN, weights),
                "datasets": {
                    name: {**asdict(m), "top1_se": m.top1_se}
                    for name, m in table[entry.arch].items()
                },
            }
            for entry in entries
        ],
        "verdicts": [{**asdict(v), "beats": v.beats} for v in judge(entries, table, weights)],
    }


def rows_of(dataset: str, entries: Sequence[Entry], table: Table) -> list[list[str]]:
    """The lines of a dataset's table: picks and controls, after each pick its random ones."""
    lines = []
    for entry in entries:
        if entry.role == "random":
            continue
        m = table[entry.arch][dataset]
        lines.append(
            [
                entry.name,
                f"{m.top1:.1%} +- {m.top1_se:.1%}",
                f"{m.top5:.1%}",
                "",
                f"{m.params:,}",
                f"{m.gflops:.4g}",
            ]
        )
        alike = [table[e.arch][dataset] for e in entries if e.like == entry.name]
        if alike:
            tops = [a.top1 for a in alike]
            error = standard_error(tops)
            lines.append(
                [
                    f"  {len(alike)} random of its size",
                    f"{statistics.fmean(tops):.1%} +- {error:.1%}",
                    f"{statistics.fmean(a.top5 for a in alike):.1%}",
                    f"best {max(tops):.1%}, pick at {percentile(m.top1, tops):.0f} %",
                    f"{statistics.fmean(a.params for a in alike):,.0f}",
                    f"{statistics.fmean(a.gflops for a in alike):.4g}",
                ]
            )
    return lines


HEAD = ["sub-network", "top-1", "top-5", "of the random ones", "params", "GFLOPs a view"]
