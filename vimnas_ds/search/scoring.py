"""One way to score a candidate, for every search: mean top-1 over datasets on `select` splits.

A candidate is any forward function on the supernet. Its outcomes are kept sample by sample, so two
candidates can be compared on the same samples (paired). Sub-networks are scored once, several in
one pass over the samples, and every evaluation is one row of a CSV file, written when the ranks
have put theirs together.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vimnas_ds.search.run import SearchRun
from vimnas_ds.space import Arch
from vimnas_ds.train.dry_run import cost_of
from vimnas_ds.train.evaluate import Outcomes

#: splits that searches may read; "test" is for reported numbers only
SELECT = "select"


class DatasetForward(Protocol):
    """Logits of a batch by the head of a dataset."""

    def __call__(self, x: Tensor, *, dataset: str) -> Tensor: ...


@dataclass(frozen=True)
class Scored:
    """Outcomes per dataset; accuracy and loss are unweighted means over datasets."""

    outcomes: Mapping[str, Outcomes]

    @property
    def accuracy(self) -> float:
        return sum(o.score.top1 for o in self.outcomes.values()) / len(self.outcomes)

    @property
    def loss(self) -> float:
        return sum(o.score.loss for o in self.outcomes.values()) / len(self.outcomes)

    @property
    def rank_key(self) -> tuple[float, float]:
        """Sorts better candidates higher: accuracy, then (ties are frequent) loss. Rounded, so
        that the last bits of a sum cannot decide; a loss that is not finite is the worst."""
        loss = self.loss if math.isfinite(self.loss) else math.inf
        return round(self.accuracy, 9), -round(loss, 6)


def paired_difference(a: Scored, b: Scored) -> tuple[float, float]:
    """Accuracy of `a` minus that of `b` on the same samples, and its standard error."""
    mean = variance = 0.0
    for name, ours in a.outcomes.items():
        theirs = b.outcomes[name]
        if ours.names != theirs.names:  # a file could not be read once: compare what both saw
            at = {sample: i for i, sample in enumerate(theirs.names)}
            both = [(i, at[n]) for i, n in enumerate(ours.names) if n in at]
            pairs = torch.tensor(both, dtype=torch.int64).view(-1, 2)
            difference = ours.top1[pairs[:, 0]] - theirs.top1[pairs[:, 1]]
        else:
            difference = ours.top1 - theirs.top1
        mean += float(difference.mean()) / len(a.outcomes)
        if len(difference) > 1:
            variance += float(difference.var()) / len(difference) / len(a.outcomes) ** 2
    return mean, math.sqrt(variance)


class EvaluationLog:
    """A CSV of every evaluation, written by rank 0 row by row."""

    def __init__(self, path: Path, datasets: Sequence[str], enabled: bool):
        self.path, self._datasets, self._enabled = path, tuple(datasets), enabled
        if enabled:
            path.parent.mkdir(parents=True, exist_ok=True)
            head = ["what", "candidate", "accuracy", "loss", "params"]
            head += [f"{kind}/{name}" for name in datasets for kind in ("top1", "loss", "gflops")]
            with path.open("w", newline="") as file:
                csv.writer(file).writerow(head)

    def add(
        self, what: str, candidate: str, scored: Scored, costs: Mapping[str, tuple[int, float]]
    ) -> None:
        """`costs` may be empty for candidates that are no single sub-network."""
        if not self._enabled:
            return
        params = max(p for p, _ in costs.values()) if costs else ""
        row: list[object] = [
            what,
            candidate,
            f"{scored.accuracy:.6f}",
            f"{scored.loss:.6f}",
            params,
        ]
        for name in self._datasets:
            score = scored.outcomes[name].score
            gflops = f"{costs[name][1]:.6f}" if costs else ""
            row += [f"{score.top1:.6f}", f"{score.loss:.6f}", gflops]
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(row)


class ArchScorer:
    """Scores sub-networks of a run; each is evaluated once."""

    def __init__(self, run: SearchRun, log: EvaluationLog, datasets: Sequence[str]):
        self.run, self.log, self.datasets = run, log, tuple(datasets)
        self.scores: dict[Arch, Scored] = {}

    def costs(self, arch: Arch) -> dict[str, tuple[int, float]]:
        """(params, GFLOPs) by dataset."""
        return {name: cost_of(self.run.config, arch, name) for name in self.datasets}

    def score_all(
        self, what: str, archs: Sequence[Arch], progress: Callable[[], None]
    ) -> list[Scored]:
        """Scores of `archs`; new ones are shared among the ranks. `progress`: after each one."""
        fresh = [a for a in dict.fromkeys(archs) if a not in self.scores]

        def evaluate(archs: Sequence[Arch]) -> list[Scored]:
            forwards = [partial(self.run.net, arch=arch) for arch in archs]
            return score_forwards(self.run, self.datasets, forwards, progress)

        for arch, scored in zip(fresh, self.run.map_over_ranks(evaluate, fresh), strict=True):
            self.scores[arch] = scored
            self.log.add(what, arch.to_json(), scored, self.costs(arch))
        return [self.scores[a] for a in archs]


#: candidates scored in one pass over the samples
GROUP = 4


def score_forwards(
    run: SearchRun,
    datasets: Sequence[str],
    forwards: Sequence[DatasetForward],
    progress: Callable[[], None],
) -> list[Scored]:
    """Score networks on the select splits, in eval mode, on this rank alone.

    `progress` is called once for each of them.
    """
    assert not run.net.training
    found: list[Scored] = []
    for first in range(0, len(forwards), GROUP):
        group = dict(enumerate(forwards[first : first + GROUP]))
        outcomes = {
            name: run.evaluator.outcomes(
                {str(i): partial(f, dataset=name) for i, f in group.items()}, name, SELECT
            )
            for name in datasets
        }
        for i in group:
            found.append(Scored({name: outcomes[name][str(i)] for name in datasets}))
            progress()
    return found
