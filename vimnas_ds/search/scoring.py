"""One way to score a candidate, for every search: on the `select` splits, in eval mode, once.

A candidate is any forward function on the supernet with a key that says what it is. Its outcomes
are kept sample by sample, so two candidates can be compared on the same samples (paired), and
across processes (`cache`): a search that was killed finds what it had evaluated. Every evaluation a
search asks for is one row of its CSV file, written as soon as it is known.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vimnas_ds.search.cache import OutcomeFile, digest_of
from vimnas_ds.search.objective import Objective
from vimnas_ds.search.run import SearchRun
from vimnas_ds.space import Arch
from vimnas_ds.train.dry_run import cost_of
from vimnas_ds.train.evaluate import Outcomes, Score
from vimnas_ds.train.ranks import gather_objects, run_together

#: splits that searches may read; "test" is for reported numbers only
SELECT = "select"
#: candidates of a rank scored in one pass over the samples, and between two exchanges of results
GROUP = 4


class DatasetForward(Protocol):
    """Logits of a batch by the head of a dataset."""

    def __call__(self, x: Tensor, *, dataset: str) -> Tensor: ...


class Candidate(NamedTuple):
    """`key` names it in the cache, `name` in the CSV; `cost`: relative, to share work evenly."""

    key: str
    name: str
    forward: DatasetForward
    cost: float = 1.0


@dataclass(frozen=True)
class Scored:
    """Outcomes per dataset; accuracy and loss are the objective's weighted means over datasets."""

    outcomes: Mapping[str, Outcomes]
    objective: Objective

    @cached_property
    def scores(self) -> dict[str, Score]:
        """Means over samples, by dataset."""
        return {name: self.outcomes[name].score for name in self.objective.datasets}

    @property
    def accuracy(self) -> float:
        return sum(w * self.scores[n].top1 for n, w in self.objective.weights.items())

    @property
    def loss(self) -> float:
        return sum(w * self.scores[n].loss for n, w in self.objective.weights.items())

    @property
    def value(self) -> float:
        """What is maximised: accuracy, or minus the loss."""
        return self.accuracy if self.objective.metric == "top1" else -self.loss

    @property
    def rank_key(self) -> tuple[float, float]:
        """Sorts better candidates higher: by the metric, then (ties are frequent) by the other one.
        Rounded, so that the last bits of a sum cannot decide; a loss that is not finite is the
        worst."""
        loss = self.loss if math.isfinite(self.loss) else math.inf
        accuracy, certainty = round(self.accuracy, 9), -round(loss, 6)
        by_loss = self.objective.metric == "loss"
        return (certainty, accuracy) if by_loss else (accuracy, certainty)


def paired_difference(a: Scored, b: Scored) -> tuple[float, float]:
    """The value of `a` minus that of `b` on the same samples, and its standard error
    (infinite where a dataset has fewer than two of them)."""
    mean = variance = 0.0
    for name, weight in a.objective.weights.items():
        ours, theirs = a.outcomes[name], b.outcomes[name]
        mine, other = (_values(o, a.objective) for o in (ours, theirs))
        if ours.names != theirs.names:  # a file could not be read once: compare what both saw
            at = {sample: i for i, sample in enumerate(theirs.names)}
            both = [(i, at[n]) for i, n in enumerate(ours.names) if n in at]
            pairs = torch.tensor(both, dtype=torch.int64).view(-1, 2)
            difference = mine[pairs[:, 0]] - other[pairs[:, 1]]
        else:
            difference = mine - other
        mean += weight * float(difference.mean())
        known = len(difference) > 1
        variance += weight**2 * float(difference.var()) / len(difference) if known else math.inf
    return mean, math.sqrt(variance)


def _values(outcomes: Outcomes, objective: Objective) -> Tensor:
    return outcomes.top1 if objective.metric == "top1" else -outcomes.loss


class EvaluationLog:
    """A CSV of every evaluation, written by rank 0 row by row; an earlier one is replaced by the
    first row."""

    def __init__(self, path: Path, datasets: Sequence[str], enabled: bool):
        self.path, self._datasets, self._enabled = path, tuple(datasets), enabled
        self._begun = False

    def go_on(self) -> None:
        """Add to the rows that are there."""
        self._begun = True

    def _begin(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = ["what", "candidate", "accuracy", "loss", "params"]
        head += [f"{kind}/{name}" for name in self._datasets for kind in ("top1", "loss", "gflops")]
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerow(head)
        self._begun = True

    def add(
        self, what: str, candidate: str, scored: Scored, costs: Mapping[str, tuple[int, float]]
    ) -> None:
        """`costs` may be empty for candidates that are no single sub-network."""
        if not self._enabled:
            return
        if not self._begun:
            self._begin()
        params = max(p for p, _ in costs.values()) if costs else ""
        row: list[object] = [
            what,
            candidate,
            f"{scored.accuracy:.6f}",
            f"{scored.loss:.6f}",
            params,
        ]
        for name in self._datasets:
            score = scored.scores[name]
            gflops = f"{costs[name][1]:.6f}" if costs else ""
            row += [f"{score.top1:.6f}", f"{score.loss:.6f}", gflops]
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(row)


class Evaluations:
    """What a search asks: scores of candidates, each evaluated once in the life of a checkpoint.

    Args:
        run: the checkpoint, its data and the ranks, which share new candidates among themselves.
        log: a row for every score a search asks for.
        objective: see `Objective`.
        cache: folder of the outcome files; None: kept in memory alone, as for tuned weights.

    Raises ConfigError for a cache that cannot be used.
    """

    def __init__(
        self, run: SearchRun, log: EvaluationLog, objective: Objective, cache: Path | None = None
    ):
        self.run, self.log, self.objective = run, log, objective
        self._files = {name: OutcomeFile(self._names(name)) for name in objective.datasets}
        if cache is not None:
            self._open(cache)

    def _names(self, dataset: str) -> list[str]:
        return [sample.path for sample in self.run.data.splits[dataset][SELECT]]

    def _open(self, cache: Path) -> None:
        """Rank 0 reads the files, and has all ranks know what is in them."""
        run = self.run

        def read() -> None:
            for name in self._files if run.ranks.is_main else ():
                path = cache / f"{name}-{digest_of(run.identity(name))[:16]}.outcomes"
                self._files[name] = OutcomeFile(self._names(name), path)

        run_together(read, run.ranks)
        if run.ranks.world_size > 1:
            known = [file.records for file in self._files.values()] if run.ranks.is_main else []
            for file, records in zip(self._files.values(), gather_objects(known)[0], strict=True):
                file.records = dict(records)

    @property
    def datasets(self) -> tuple[str, ...]:
        return self.objective.datasets

    def forget(self) -> None:
        """The weights have changed: nothing is known of them, and they are no checkpoint's."""
        self._files = {name: OutcomeFile(self._names(name)) for name in self.datasets}

    def score_all(
        self,
        what: str,
        candidates: Sequence[Candidate],
        progress: Callable[[], None],
        costs: Callable[[Candidate], Mapping[str, tuple[int, float]]] | None = None,
    ) -> list[Scored]:
        """Scores of `candidates`, in their order, the same on every rank.

        Args:
            what: the CSV's first column.
            progress: called on each rank after each of its candidates.
            costs: (params, GFLOPs) by dataset, for the CSV.
        """
        fresh: dict[str, Candidate] = {}
        known = 0
        for one in candidates:
            if all(one.key in file for file in self._files.values()):
                known += 1
            else:
                fresh.setdefault(one.key, one)
        for _ in range(self.run.ranks.rank, known, self.run.ranks.world_size):
            progress()
        done = iter(_chunks(list(fresh.values()), GROUP * self.run.ranks.world_size))
        missing = set(fresh)
        for one in candidates:
            while one.key in missing:
                chunk = next(done)
                self._evaluate(chunk, progress)
                missing -= {c.key for c in chunk}
            found = self._scored(one.key)
            self.log.add(what, one.name, found, costs(one) if costs else {})
        return [self._scored(one.key) for one in candidates]

    def _evaluate(self, chunk: Sequence[Candidate], progress: Callable[[], None]) -> None:
        """New candidates, shared among the ranks by their cost."""
        world = self.run.ranks.world_size
        dealt = _dealt(chunk, world)

        def evaluate(mine: Sequence[Candidate]) -> list[dict[str, Outcomes]]:
            return evaluate_forwards(self.run, self.datasets, [c.forward for c in mine], progress)

        for one, outcomes in zip(dealt, self.run.map_over_ranks(evaluate, dealt), strict=True):
            for name, file in self._files.items():
                file.add(one.key, outcomes[name])

    def _scored(self, key: str) -> Scored:
        return Scored(_Kept(self._files, key), self.objective)


class _Kept(Mapping[str, Outcomes]):
    """A candidate's outcomes by dataset, unpacked when they are asked for: a search that keeps
    thousands of scores keeps no vectors."""

    def __init__(self, files: Mapping[str, OutcomeFile], key: str):
        self._files, self._key = dict(files), key

    def __getitem__(self, dataset: str) -> Outcomes:
        return self._files[dataset].get(self._key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _chunks(items: Sequence[Candidate], size: int) -> list[Sequence[Candidate]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _dealt(chunk: Sequence[Candidate], world: int) -> list[Candidate]:
    """In an order in which every `world`-th one makes an equal load: dearest first, to and fro."""
    ordered = sorted(chunk, key=lambda c: -c.cost)
    rows = [ordered[i : i + world] for i in range(0, len(ordered), world)]
    return [c for turn, row in enumerate(rows) for c in (row[::-1] if turn % 2 else row)]


class ArchScorer:
    """Scores sub-networks; `scores` has those asked for so far, in the order of their asking."""

    def __init__(self, evaluations: Evaluations):
        self.evaluations = evaluations
        self.scores: dict[Arch, Scored] = {}

    def costs(self, arch: Arch) -> dict[str, tuple[int, float]]:
        """(params, GFLOPs) by dataset."""
        config, names = self.evaluations.run.config, self.evaluations.datasets
        return {name: cost_of(config, arch, name) for name in names}

    def score_all(
        self, what: str, archs: Sequence[Arch], progress: Callable[[], None]
    ) -> list[Scored]:
        """Scores of `archs`; each has one row in the CSV, the first time it is asked for."""
        fresh = [a for a in dict.fromkeys(archs) if a not in self.scores]
        net = self.evaluations.run.net
        costs = {arch.to_json(): self.costs(arch) for arch in fresh}
        candidates = [
            Candidate(key, key, partial(net, arch=arch), sum(g for _, g in costs[key].values()))
            for arch in fresh
            for key in (arch.to_json(),)
        ]
        found = self.evaluations.score_all(
            what, candidates, progress, lambda candidate: costs[candidate.key]
        )
        self.scores.update(zip(fresh, found, strict=True))
        return [self.scores[a] for a in archs]


def evaluate_forwards(
    run: SearchRun,
    datasets: Sequence[str],
    forwards: Sequence[DatasetForward],
    progress: Callable[[], None],
) -> list[dict[str, Outcomes]]:
    """Outcomes of networks on the select splits by dataset, in eval mode, on this rank alone.

    `progress` is called once for each of them.
    """
    assert not run.net.training
    found: list[dict[str, Outcomes]] = []
    for first in range(0, len(forwards), GROUP):
        group = dict(enumerate(forwards[first : first + GROUP]))
        outcomes = {
            name: run.evaluator.outcomes(
                {str(i): partial(f, dataset=name) for i, f in group.items()}, name, SELECT
            )
            for name in datasets
        }
        for i in group:
            found.append({name: outcomes[name][str(i)] for name in datasets})
            progress()
    return found
