"""Does a pick beat random sub-networks of its size? Numbers, and a verdict that cannot flatter.

    p = (1 + random ones at least as good) / (k + 1)

is the exact probability that the pick, were it just another random one, would come out so high: no
distribution is assumed, ties count against it. With 20 controls only a pick better than all of them
has p < 0.05, and only then is it said to beat them: once a pick, on the mean over datasets, since
of many tests some would pass by chance. On the samples it was chosen on it cannot beat anything.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vimnas_ds.search.controls import Entry
from vimnas_ds.search.objective import MEAN
from vimnas_ds.search.scoring import SELECT
from vimnas_ds.search.statistics import percentile, standard_error
from vimnas_ds.space import Arch

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
class SizeGap:
    """How far the random ones' parameters are from the pick's, in percent of these. Where the pick
    is at an end of the space all lie on one side, and a difference may be one of size."""

    widest: float
    mean: float
    one_sided: bool

    def __str__(self) -> str:
        side = f", all {'smaller' if self.mean < 0 else 'larger'}" if self.one_sided else ""
        return f"size within {self.widest:.1f} %, {self.mean:+.1f} % on average{side}"


@dataclass(frozen=True)
class Verdict:
    """A pick against its k random ones on a dataset, or on the mean of all.

    `claims`: it says whether the pick beats them; only one of a pick's verdicts does.
    """

    pick: str
    dataset: str
    top1: float
    random_mean: float
    random_se: float
    random_best: float
    percentile: float
    p: float
    k: int
    size_gap: SizeGap
    claims: bool
    held_out: bool  #: the pick was not chosen on these samples

    @property
    def beats(self) -> bool:
        return self.claims and self.p < LEVEL

    def __str__(self) -> str:
        gap = 100 * (self.top1 - self.random_mean)
        what = (
            f"{gap:+.1f} points against the mean of {self.k} random ones ({self.size_gap}), "
            f"percentile {self.percentile:.0f}, p = {self.p:.3f}"
        )
        if not self.held_out:
            what += "; chosen on these samples: this says nothing"
        if not self.claims:
            return f"{self.pick} on {self.dataset}: {what}"
        does = "beats" if self.beats else "does NOT beat"
        note = "; too few of them to tell" if 1 / (self.k + 1) >= LEVEL else ""
        return f"{self.pick} {does} random sub-networks of its size on {self.dataset}: {what}{note}"


#: sub-network -> dataset -> what was measured
Table = Mapping[Arch, Mapping[str, Measured]]


def top1(table: Table, arch: Arch, dataset: str, weights: Mapping[str, float]) -> float:
    """On a dataset, or for `MEAN` the weighted mean; rounded, so that equal counts are ties."""
    if dataset != MEAN:
        return round(table[arch][dataset].top1, 9)
    return round(sum(w * table[arch][name].top1 for name, w in weights.items()), 9)


def size_gap(table: Table, dataset: str, arch: Arch, alike: Sequence[Arch]) -> SizeGap:
    """With the parameters of a dataset's head."""
    size = table[arch][dataset].params
    gaps = [100 * (table[a][dataset].params / size - 1) for a in alike]
    one_sided = max(gaps) < 0 or min(gaps) > 0
    return SizeGap(max(map(abs, gaps)), statistics.fmean(gaps), one_sided)


def judge(
    entries: Sequence[Entry], table: Table, weights: Mapping[str, float], split: str
) -> list[Verdict]:
    """Every pick on the mean of the datasets, where they are several, and on each.

    `split`: of the accuracies; searches choose on `select`.
    """
    first, held_out = next(iter(weights)), split != SELECT
    names = [MEAN, *weights] if len(weights) > 1 else [first]
    verdicts = []
    for entry in entries:
        if entry.role != "pick":
            continue
        alike = [e.arch for e in entries if e.like == entry.name]
        for dataset in names:
            ours = top1(table, entry.arch, dataset, weights)
            others = [top1(table, arch, dataset, weights) for arch in alike]
            at_least = sum(o >= ours for o in others)
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
                    size_gap(table, first if dataset == MEAN else dataset, entry.arch, alike),
                    held_out and dataset == names[0],
                    held_out,
                )
            )
    return verdicts


def comparison_object(
    entries: Sequence[Entry], table: Table, weights: Mapping[str, float], about: Mapping[str, Any]
) -> dict[str, Any]:
    """compare.json: `about` (with its `split`), every entry with its numbers by dataset, and the
    verdicts; `beats` is null where nothing is claimed."""
    verdicts = judge(entries, table, weights, about["split"])
    return {
        **about,
        "weights": dict(weights),
        "entries": [
            {
                "name": entry.name,
                "role": entry.role,
                "like": entry.like,
                "evaluations": entry.evaluations,
                "arch": json.loads(entry.arch.to_json()),
                "mean_top1": top1(table, entry.arch, MEAN, weights),
                "datasets": {
                    name: {**asdict(m), "top1_se": m.top1_se}
                    for name, m in table[entry.arch].items()
                },
            }
            for entry in entries
        ],
        "verdicts": [{**asdict(v), "beats": v.beats if v.claims else None} for v in verdicts],
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
                "" if entry.evaluations is None else f"{entry.evaluations:,}",
            ]
        )
        archs = [e.arch for e in entries if e.like == entry.name]
        alike = [table[a][dataset] for a in archs]
        if alike:
            gap = size_gap(table, dataset, entry.arch, archs)
            tops = [a.top1 for a in alike]
            error = standard_error(tops)
            lines.append(
                [
                    f"  {len(alike)} random of its size",
                    f"{statistics.fmean(tops):.1%} +- {error:.1%}",
                    f"{statistics.fmean(a.top5 for a in alike):.1%}",
                    f"best {max(tops):.1%}, pick at {percentile(m.top1, tops):.0f} %; {gap}",
                    f"{statistics.fmean(a.params for a in alike):,.0f}",
                    f"{statistics.fmean(a.gflops for a in alike):.4g}",
                    "",
                ]
            )
    return lines


HEAD = [
    "sub-network",
    "top-1",
    "top-5",
    "of the random ones",
    "params",
    "GFLOPs a view",
    "evaluations",
]
