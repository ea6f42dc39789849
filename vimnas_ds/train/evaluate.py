"""The one evaluator: outcomes of any forward function on a split, sample by sample.

Training shares the samples among ranks and sums; the searches let every rank see all samples and
share the candidates instead, so that a candidate's score does not depend on the number of ranks.

Batches of a `select` split are decoded once and kept while they fit the memory allowed, so that
repeated evaluations cost the network's time alone. Every sample counts once, whatever the world
size; a broken file is left out and counted, and too many of them end the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vimnas_ds.data.bad import DataMissing, TooManyBadFiles, are_too_many
from vimnas_ds.data.joint import Loaders
from vimnas_ds.data.loader import Batch, EvalLoader
from vimnas_ds.train.ranks import Ranks, StopAsked, sum_over_ranks

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    """Accuracies as fractions, mean cross-entropy, samples counted."""

    top1: float
    top5: float
    loss: float
    count: int


@dataclass(frozen=True)
class Outcomes:
    """What happened to each sample, in the split's order: three float64 vectors of one length."""

    top1: Tensor  #: 1 where the highest logit is the label
    top5: Tensor  #: 1 where the label is among the five highest
    loss: Tensor  #: cross-entropy
    names: tuple[str, ...]  #: the samples' files

    @property
    def score(self) -> Score:
        top1, top5, loss = (float(v.mean()) for v in (self.top1, self.top5, self.loss))
        return Score(top1, top5, loss, len(self.loss))


class Evaluator:
    """Evaluates on the `select` and `test` splits of all datasets."""

    def __init__(
        self, loaders: Loaders, ranks: Ranks, dtype: torch.dtype, batch: int, cache_mb: int
    ):
        self.loaders, self.ranks, self.dtype, self.batch = loaders, ranks, dtype, batch
        self._room = cache_mb * 2**20
        self._kept: dict[tuple[str, str], list[Batch]] = {}
        self.files: tuple[str, ...] = ()  #: of the batch whose logits are being asked for
        #: asked before every batch of `scores`
        self.give_up: Callable[[], bool] = lambda: False
        self._cut_short = False
        self.skipped: dict[str, dict[str, str]] = {}  #: dataset -> unusable file -> reason

    def _batches(self, dataset: str, split: str) -> Iterator[Batch]:
        key = (dataset, split)
        if key in self._kept:
            yield from self._kept[key]
            return
        loader = self.loaders.evaluation(dataset, split, self.batch)
        kept: list[Batch] | None = [] if split == "select" else None
        used = 0
        try:
            for batch in loader:
                used += batch.x.nbytes
                if kept is not None and used <= self._room:
                    kept.append(batch)
                else:
                    kept = None
                self._judge(loader)
                yield batch
            self._judge(loader)
        finally:
            self.skipped.setdefault(dataset, {}).update(loader.skipped)
            loader.close()
        if kept is not None:
            self._room -= used
            self._kept[key] = kept

    def _judge(self, loader: EvalLoader) -> None:
        section, bad = self.loaders.data.section, len(loader.skipped)
        if are_too_many(bad, loader.seen, section.max_bad_share):
            folder = section.datasets[loader.name].folder
            raise TooManyBadFiles(loader.name, bad, loader.seen, loader.skipped, folder)

    @torch.no_grad()
    def outcomes(
        self, forwards: Mapping[str, Forward], dataset: str, split: str
    ) -> dict[str, Outcomes]:
        """Each of `forwards`, batch -> logits, on this process's samples, in one pass over them.

        The caller puts the network into eval mode. Raises as `scores`.
        """
        found = self._outcomes(forwards, dataset, split)
        if not len(next(iter(found.values())).loss):
            raise DataMissing(f"{dataset}: no file of the {split} split could be read")
        return found

    def _outcomes(
        self, forwards: Mapping[str, Forward], dataset: str, split: str
    ) -> dict[str, Outcomes]:
        columns: dict[str, list[Tensor]] = {label: [] for label in forwards}
        names: tuple[str, ...] = ()
        self._cut_short = False
        for batch in self._batches(dataset, split):
            if self.give_up():
                self._cut_short = True
                break
            x, y = batch.x.to(self.ranks.device, self.dtype), batch.y.to(self.ranks.device)
            self.files = batch.names
            names += batch.names
            for label, forward in forwards.items():
                logits = forward(x).float()
                best = logits.topk(min(5, logits.shape[1]), -1).indices == y[:, None]
                loss = F.cross_entropy(logits, y, reduction="none")
                columns[label].append(torch.stack([best[:, 0], best.any(1), loss]).double())
        empty = torch.empty(3, 0, dtype=torch.float64)
        found = {}
        for label, parts in columns.items():
            top1, top5, loss = torch.cat([empty.to(self.ranks.device), *parts], 1).cpu()
            found[label] = Outcomes(top1, top5, loss, names)
        return found

    @torch.no_grad()
    def scores(self, forwards: Mapping[str, Forward], dataset: str, split: str) -> dict[str, Score]:
        """Scores over all ranks' samples (each rank having its share); equal on every rank.

        Raises DataMissing when no rank could read a file of the split, TooManyBadFiles when this
        one had to leave out more than `vimnas.data.max_bad_share`; StopAsked, on all ranks, when
        one of them gave up.
        """
        found = self._outcomes(forwards, dataset, split)
        sums = torch.tensor(
            [
                [*(float(v.sum()) for v in (o.top1, o.top5, o.loss)), len(o.loss), self._cut_short]
                for o in found.values()
            ],
            dtype=torch.float64,
            device=self.ranks.device,
        )
        rows = sum_over_ranks(sums, self.ranks).tolist()
        if rows[0][4]:
            raise StopAsked
        if not rows[0][3]:
            raise DataMissing(f"{dataset}: no file of the {split} split could be read")
        return {
            label: Score(top1 / n, top5 / n, loss / n, int(n))
            for label, (top1, top5, loss, n, _) in zip(found, rows, strict=True)
        }
