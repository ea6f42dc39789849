"""Does a supernet rank its sub-networks as training them alone would?

Inherited accuracies (the supernet's weights) and stand-alone ones (own weights, same recipe) on the
same `select` samples are compared by Kendall's tau-b, with two bootstrap intervals: over the
sub-networks (would others rank as well?) and over the samples (is the split large enough?). A
search gains where tau is above 0, and above the tau of parameters: larger ones are mostly better
(an interval of the difference too, over the sub-networks).
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vimnas_ds.config import ConfigError, RunConfig
from vimnas_ds.report.table import format_table
from vimnas_ds.search.objective import MEAN
from vimnas_ds.search.scoring import Scored
from vimnas_ds.search.statistics import Indices, bootstrap_interval, kendall_tau_b, spearman
from vimnas_ds.space import Arch, SearchSpace
from vimnas_ds.train.dry_run import cost_of

#: sub-networks below which a tau says too little
FEWEST = 12
#: samples of a dataset below which the order of its accuracies is mostly chance
FEW_SAMPLES = 30
#: members that the choice is made from, all of a smaller space
POOL = 2000

Hits = NDArray[np.float64]  # (A, N): 1 where sub-network a is right on sample n
Vector = NDArray[np.float64]  # (A,)


def choose_archs(config: RunConfig, space: SearchSpace, count: int, seed: int) -> list[Arch]:
    """The smallest, the largest, and a random one of each of `count` - 2 equal ranges of parameters
    between them, ascending; where a range has none, the nearest one. Distinct, the same for a seed.

    Raises ConfigError where the space has too few.
    """
    if count > space.size():
        raise ConfigError(f"--count {count}: the space has {space.size()} sub-networks")
    rng, dataset = random.Random(f"{seed}/ranking"), next(iter(config.vimnas.data.datasets))
    if space.size() <= POOL:
        pool = set(space.members())
    else:
        pool = {space.sample(rng) for _ in range(max(POOL, 20 * count))}
    ends = [space.smallest(), space.largest()]
    params = {a: cost_of(config, a, dataset)[0] for a in sorted(pool, key=str) if a not in ends}
    low, high = (cost_of(config, a, dataset)[0] for a in ends)
    width = (high - low) / max(count - 2, 1)
    for number in range(min(count - 2, len(params))):
        middle = low + (number + 0.5) * width
        inside = [a for a, p in params.items() if abs(p - middle) <= width / 2]
        nearest = min(params, key=lambda a: abs(params[a] - middle))
        chosen = rng.choice(inside) if inside else nearest
        ends.insert(-1, chosen)
        del params[chosen]
    return sorted(ends, key=lambda a: cost_of(config, a, dataset)[0])


@dataclass(frozen=True)
class Agreement:
    """How two accuracies order the same sub-networks; nan where one of them is constant."""

    tau: float
    low: float  #: 95 % interval over the sub-networks
    high: float
    low_over_samples: float  #: 95 % interval over the samples
    high_over_samples: float
    spearman: float
    tau_of_params: float  #: of the parameters' order with the stand-alone one
    gain_low: float  #: 95 % interval of tau - tau_of_params over the sub-networks
    gain_high: float

    def __str__(self) -> str:
        return f"tau {self.tau:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def verdict(self) -> str:
        """One sentence: whether a search may trust the supernet."""
        if math.isnan(self.tau):
            return (
                "tau is undefined: all sub-networks have one and the same accuracy, so there is no "
                "order to compare; train the supernet anew for longer, or with a larger "
                "vimnas.data.held_out"
            )
        if self.low <= 0 <= self.high:
            return f"{self}: the interval contains 0: do not trust a search on this supernet yet"
        if self.high < 0:
            return f"{self}: the supernet ranks sub-networks upside down: do not trust a search"
        but = ""
        if not self.gain_low > 0:
            but = (
                f", but is not shown to do so better than their parameters (tau "
                f"{self.tau_of_params:.2f}; difference [{self.gain_low:.2f}, {self.gain_high:.2f}])"
            )
        return f"{self}: the supernet ranks sub-networks better than chance{but}"


def agreement(
    inherited: Sequence[Hits],
    alone: Sequence[Hits],
    params: Vector,
    seed: int,
    weights: Sequence[float] = (1.0,),
) -> Agreement:
    """Of accuracies averaged over datasets: one (A, N) matrix and one weight a dataset."""

    def tau(*drawn: Indices) -> float:
        a = mean_accuracy([h[:, i] for h, i in zip(inherited, drawn, strict=True)], weights)
        b = mean_accuracy([h[:, i] for h, i in zip(alone, drawn, strict=True)], weights)
        return kendall_tau_b(a, b)

    def gain(i: Indices) -> float:
        return kendall_tau_b(x[i], y[i]) - kendall_tau_b(params[i], y[i])

    x, y = mean_accuracy(inherited, weights), mean_accuracy(alone, weights)
    over_archs = bootstrap_interval(lambda i: kendall_tau_b(x[i], y[i]), [len(x)], seed=seed)
    over_samples = bootstrap_interval(tau, [hits.shape[1] for hits in inherited], seed=seed)
    of_params = kendall_tau_b(params, y), *bootstrap_interval(gain, [len(x)], seed=seed)
    return Agreement(kendall_tau_b(x, y), *over_archs, *over_samples, spearman(x, y), *of_params)


def mean_accuracy(hits: Sequence[Hits], weights: Sequence[float]) -> Vector:
    """(A,) accuracies, weighted mean over datasets; rounded, so that equal counts are ties."""
    total = sum(w * h.mean(1) for h, w in zip(hits, weights, strict=True))
    return np.round(total / sum(weights), 9)


def paired_hits(
    inherited: Sequence[Scored], alone: Sequence[Scored], dataset: str
) -> tuple[Hits, Hits]:
    """Both sides' hits on the samples that every evaluation could read."""
    outcomes = [scored.outcomes[dataset] for scored in (*inherited, *alone)]
    common = set(outcomes[0].names).intersection(*(o.names for o in outcomes))
    rows = [
        [hit for hit, name in zip(o.top1.tolist(), o.names, strict=True) if name in common]
        for o in outcomes
    ]
    hits = np.array(rows, np.float64)
    return hits[: len(inherited)], hits[len(inherited) :]


@dataclass(frozen=True)
class Panel:
    """Both accuracies of every sub-network on one dataset, or their mean over all."""

    name: str
    inherited: Vector
    alone: Vector
    samples: int
    agreement: Agreement


@dataclass(frozen=True)
class Ranking:
    """What was found; the last panel is the one that counts: the mean, where datasets are several.

    `params`: with the largest head.
    """

    archs: Sequence[Arch]
    params: Vector
    panels: Sequence[Panel]

    @property
    def overall(self) -> Panel:
        return self.panels[-1]

    def rows(self) -> list[dict[str, Any]]:
        """One a sub-network: its number, parameters, accuracies by dataset, architecture."""
        rows = []
        for i, arch in enumerate(self.archs):
            row: dict[str, Any] = {"number": f"{i:02d}", "params": int(self.params[i])}
            for panel in self.panels:
                row[f"inherited/{panel.name}"] = float(panel.inherited[i])
                row[f"alone/{panel.name}"] = float(panel.alone[i])
            rows.append({**row, "arch": arch.to_json()})
        return rows

    def warnings(self) -> list[str]:
        """One sentence for each dataset with too few samples."""
        return [
            f"{panel.name}: {panel.samples} samples are too few to rank sub-networks by; train the "
            "supernet anew with a larger vimnas.data.held_out, or leave it out with --datasets"
            for panel in self.panels
            if panel.samples < FEW_SAMPLES
        ]

    def table(self) -> str:
        """One row a sub-network, below it one row a dataset."""
        rows = [
            [row["number"], f"{row['params']:,}"]
            + [f"{v:.1%}" for key, v in row.items() if "/" in key]
            for row in self.rows()
        ]
        heads = [f"{p.name} {kind}" for p in self.panels for kind in ("inherited", "alone")]
        accuracies = format_table(["sub-network", "params", *heads], rows)
        rows = []
        for panel in self.panels:
            a = panel.agreement
            over_samples = f"[{a.low_over_samples:.2f}, {a.high_over_samples:.2f}]"
            cells = [f"{a.tau:.2f}", f"[{a.low:.2f}, {a.high:.2f}]", over_samples]
            cells += [f"{a.spearman:.2f}", f"{a.tau_of_params:.2f}"]
            cells += [f"[{a.gain_low:.2f}, {a.gain_high:.2f}]"]
            rows.append([panel.name, f"{panel.samples:,}", *cells])
        head = ["dataset", "samples", "tau", "over sub-networks", "over samples", "spearman"]
        return f"{accuracies}\n\n{format_table([*head, 'tau of params', 'tau above it'], rows)}"

    def write(self, folder: Path, details: Mapping[str, Any]) -> None:
        """ranking.json and ranking.csv; undefined numbers are null in the one."""
        rows = self.rows()
        found = {
            **details,
            "verdict": self.overall.agreement.verdict(),
            "warnings": self.warnings(),
            "agreement": {
                panel.name: {"samples": panel.samples, **_without_nan(asdict(panel.agreement))}
                for panel in self.panels
            },
            "archs": [{**row, "arch": json.loads(row["arch"])} for row in rows],
        }
        (folder / "ranking.json").write_text(json.dumps(found, indent=2) + "\n")
        with (folder / "ranking.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def build_ranking(
    config: RunConfig,
    archs: Sequence[Arch],
    inherited: Sequence[Scored],
    alone: Sequence[Scored],
    seed: int,
) -> Ranking:
    """Compare both scores of `archs` on every dataset that they have, and on their mean by the
    objective's weights."""
    weights = inherited[0].objective.weights
    names = list(weights)
    params = np.array([max(cost_of(config, a, n)[0] for n in names) for a in archs], np.float64)
    hits = {name: paired_hits(inherited, alone, name) for name in names}

    def panel(name: str, datasets: Sequence[str]) -> Panel:
        x, y = ([hits[d][side] for d in datasets] for side in (0, 1))
        samples = sum(h.shape[1] for h in x)
        shares = [weights[d] for d in datasets]
        found = agreement(x, y, params, seed, shares)
        return Panel(name, mean_accuracy(x, shares), mean_accuracy(y, shares), samples, found)

    panels = [panel(name, [name]) for name in names]
    return Ranking(archs, params, panels + ([panel(MEAN, names)] if len(names) > 1 else []))


def _without_nan(values: Mapping[str, float]) -> dict[str, float | None]:
    return {key: None if math.isnan(v) else v for key, v in values.items()}
