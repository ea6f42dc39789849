"""The one evaluator: accuracy of any forward function on a split, summed over ranks.

Batches of a `select` split are decoded once and kept while they fit the memory allowed, so that
repeated evaluations cost the network's time alone. Every sample counts once, whatever the world
size; a broken file is left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vimnas_ds.data.joint import Loaders
from vimnas_ds.data.loader import Batch
from vimnas_ds.train.ranks import Ranks, sum_over_ranks


@dataclass(frozen=True)
class Score:
    """Accuracies as fractions, mean cross-entropy, samples counted."""

    top1: float
    top5: float
    loss: float
    count: int


class Evaluator:
    """Evaluates on the `select` and `test` splits of all datasets."""

    def __init__(
        self, loaders: Loaders, ranks: Ranks, dtype: torch.dtype, batch: int, cache_mb: int
    ):
        self.loaders, self.ranks, self.dtype, self.batch = loaders, ranks, dtype, batch
        self._room = cache_mb * 2**20
        self._kept: dict[tuple[str, str], list[Batch]] = {}
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
                yield batch
        finally:
            self.skipped.setdefault(dataset, {}).update(loader.skipped)
            loader.close()
        if kept is not None:
            self._room -= used
            self._kept[key] = kept

    @torch.no_grad()
    def score(self, forward: Callable[[Tensor], Tensor], dataset: str, split: str) -> Score:
        """Score `forward`, batch -> logits, on a split; the same value on every rank.

        The caller puts the network into eval mode. Raises ValueError when no file was usable.
        """
        totals = torch.zeros(4, dtype=torch.float64, device=self.ranks.device)
        for batch in self._batches(dataset, split):
            y = batch.y.to(self.ranks.device)
            logits = forward(batch.x.to(self.ranks.device, self.dtype)).float()
            best = logits.topk(min(5, logits.shape[1]), -1).indices == y[:, None]
            totals[0] += best[:, 0].sum()
            totals[1] += best.sum()
            totals[2] += F.cross_entropy(logits, y, reduction="sum").double()
            totals[3] += len(y)
        sum_over_ranks(totals, self.ranks)
        top1, top5, loss, count = totals.tolist()
        if count == 0:
            raise ValueError(f"{dataset}: no file of the {split} split could be read")
        return Score(top1 / count, top5 / count, loss / count, int(count))
