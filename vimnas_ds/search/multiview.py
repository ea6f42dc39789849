"""Reported numbers: several views of every test sample, softmax averaged over them.

Kinetics takes 4 clips x 3 crops, SSV2 2 x 3, images one centre crop (METHOD.md section 6). Clips
are evenly placed from the video's start to its end, crops along the longer side. Samples are
shared among the ranks and each counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vimnas_ds.data.bad import DataMissing
from vimnas_ds.data.joint import Loaders
from vimnas_ds.data.prepare import View
from vimnas_ds.search.run import SearchRun
from vimnas_ds.train.ranks import sum_over_ranks


@dataclass(frozen=True)
class ViewScore:
    """Accuracies as fractions over `count` samples, each seen `views` times."""

    top1: float
    top5: float
    count: int
    views: int


def place_views(clips: int, crops: int) -> list[View]:
    """Evenly placed clips and crops; a single one is central."""
    starts, places = ([i / (n - 1) for i in range(n)] if n > 1 else [0.5] for n in (clips, crops))
    return [View(start, crop) for start in starts for crop in places]


class MultiViewEvaluator:
    """Scores forward functions on whole splits of a run, samples shared among its ranks."""

    def __init__(self, run: SearchRun, single_view: bool = False):
        self.run, self.single_view = run, single_view
        ranks = run.ranks
        seed = run.config.vimnas.seed
        self.loaders = Loaders(run.data, seed, ranks.rank, ranks.world_size, ranks.device)
        self.skipped: dict[str, dict[str, str]] = {}

    def views(self, dataset: str) -> list[View]:
        clips, crops = self.run.config.vimnas.data.datasets[dataset].views
        return [View()] if self.single_view else place_views(clips, crops)

    @torch.no_grad()
    def scores(
        self,
        forwards: Mapping[str, Callable[[Tensor], Tensor]],
        dataset: str,
        split: str,
        progress: Callable[[], None],
    ) -> dict[str, ViewScore]:
        """Score several networks, batch -> logits; every view is decoded once for all of them.

        `progress` is called after each view. Raises DataMissing when no rank could read a file.
        """
        views = self.views(dataset)
        # network -> path -> (summed probabilities, label)
        sums: dict[str, dict[str, tuple[Tensor, int]]] = {label: {} for label in forwards}
        for view in views:
            self._add_view(forwards, dataset, split, view, sums)
            progress()
        totals = torch.zeros(len(forwards), 3, dtype=torch.float64)
        for row, found in zip(totals, sums.values(), strict=True):
            for probabilities, label in found.values():
                best = probabilities.topk(min(5, len(probabilities))).indices.tolist()
                row += row.new_tensor([best[0] == label, label in best, 1])
        rows = sum_over_ranks(totals.to(self.run.ranks.device), self.run.ranks).tolist()
        if not rows[0][2]:
            raise DataMissing(f"{dataset}: no file of the {split} split could be read")
        return {
            label: ViewScore(top1 / n, top5 / n, int(n), len(views))
            for label, (top1, top5, n) in zip(forwards, rows, strict=True)
        }

    def _add_view(
        self,
        forwards: Mapping[str, Callable[[Tensor], Tensor]],
        dataset: str,
        split: str,
        view: View,
        sums: Mapping[str, dict[str, tuple[Tensor, int]]],
    ) -> None:
        batch_size = self.run.config.vimnas.log.eval_batch
        loader = self.loaders.evaluation(dataset, split, batch_size, view)
        try:
            for batch in loader:
                x, labels = batch.x.to(self.run.ranks.device, self.run.dtype), batch.y.tolist()
                for key, forward in forwards.items():
                    rows, found = forward(x).float().softmax(-1).cpu(), sums[key]
                    for name, row, label in zip(batch.names, rows, labels, strict=True):
                        found[name] = (found[name][0] + row if name in found else row, label)
        finally:
            self.skipped.setdefault(dataset, {}).update(loader.skipped)
            loader.close()

    def close(self) -> None:
        self.loaders.close()
