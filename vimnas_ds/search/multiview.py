"""Reported numbers: several views of every test sample, softmax averaged over them.

    p(sample) = mean over views of softmax(logits(view))

Kinetics takes 4 clips x 3 crops, SSV2 2 x 3, images one centre crop (METHOD.md section 6); where
they lie is `data.views`. A process has whole samples with all their views, each sample exactly
once, so only integer counts are summed over the processes: results depend neither on their number
nor on the batch size (but for the rounding of the network itself).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vimnas_ds.config import ConfigError
from vimnas_ds.confusion import Confusion
from vimnas_ds.data.bad import DataMissing
from vimnas_ds.data.capacity import decoding_threads, plan_ahead
from vimnas_ds.data.footprint import sample_bytes
from vimnas_ds.data.readers import Readers
from vimnas_ds.data.view_loader import ViewBatch, ViewLoader
from vimnas_ds.data.views import Placement, ViewPlan
from vimnas_ds.search.run import SearchRun
from vimnas_ds.train.ranks import gather_objects, sum_over_ranks
from vimnas_ds.train.run_files import CheckpointError

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ViewScore:
    """Counts over all samples, each seen as `plan` says; accuracies are fractions."""

    confusion: Confusion
    plan: ViewPlan

    @property
    def top1(self) -> float:
        return self.confusion.top1

    @property
    def top5(self) -> float:
        return self.confusion.top5

    @property
    def count(self) -> int:
        return self.confusion.count

    @property
    def views(self) -> int:
        return len(self.plan)


class MultiViewEvaluator:
    """Scores forward functions on whole splits of a run, samples shared among its ranks.

    Args:
        run: the data, the ranks and the precision.
        single_view: one central clip and crop instead of the datasets' own numbers.
        placement, stride: see `ViewPlan`.

    Attributes:
        skipped: dataset -> file that is not scored -> reason, of all ranks, sorted by file: those
            that could not be read, those that the index says are unusable, those not on the disk.
    """

    def __init__(
        self,
        run: SearchRun,
        single_view: bool = False,
        placement: Placement = "even",
        stride: float | None = None,
    ):
        self.run = run
        self.skipped: dict[str, dict[str, str]] = {}
        self._plans: dict[str, ViewPlan] = {}
        for name, section in run.config.vimnas.data.datasets.items():
            clips, crops = (1, 1) if single_view else section.views
            try:
                self._plans[name] = ViewPlan(clips, crops, placement, stride)
            except ValueError as err:
                raise ConfigError(str(err)) from err
        data = run.config.vimnas.data
        self._workers = decoding_threads(data, run.ranks.world_size)
        self._pool = Readers(self._workers, data.file_timeout)

    def plan(self, dataset: str) -> ViewPlan:
        return self._plans[dataset]

    def num_files(self, dataset: str, split: str) -> int:
        """Files that are read."""
        return len(self.run.data.splits[dataset][split])

    def num_samples(self, dataset: str, split: str) -> int:
        """Files of the split's list: of the official one for "test", on the disk or not."""
        return self.num_files(dataset, split) + len(self._unread(dataset, split))

    def _unread(self, dataset: str, split: str) -> dict[str, str]:
        """Files of the split's list that are not even tried, and why."""
        return self.run.data.untested[dataset] if split == "test" else {}

    @torch.no_grad()
    def scores(
        self,
        forwards: Mapping[str, Forward],
        dataset: str,
        split: str,
        progress: Callable[[int], None],
    ) -> dict[str, ViewScore]:
        """Score several networks, batch -> logits (B, num_classes); every file is decoded once for
        all of them.

        `progress` is given the number of samples that this rank has done since the last call.
        Raises DataMissing when no rank could read a file, CheckpointError for logits that are not
        finite.
        """
        run, plan = self.run, self._plans[dataset]
        section, batch = run.config.vimnas.data.datasets[dataset], run.config.vimnas.log.eval_batch
        loader = ViewLoader(
            dataset,
            section,
            run.data.splits[dataset][split],
            plan,
            run.ranks.rank,
            run.ranks.world_size,
            max(1, batch // len(plan)),
            run.ranks.device,
            self._pool,
            ahead=self._ahead(dataset, split),
            threads=self._workers,
        )
        found = {label: Confusion.empty(section.num_classes) for label in forwards}
        done = 0
        try:
            for views in loader:
                for label, forward in forwards.items():
                    probabilities = self._mean_softmax(forward, views, batch, label)
                    for row, target in zip(probabilities, views.labels, strict=True):
                        found[label].add(row, target)
                progress(loader.seen - done)
                done = loader.seen
        finally:
            loader.close()
        progress(loader.seen - done)
        self._gather_skipped(dataset, self._unread(dataset, split) | loader.skipped)
        for confusion in found.values():
            self._sum(confusion)
        if not next(iter(found.values())).count:
            raise DataMissing(f"{dataset}: no file of the {split} split could be read")
        expected, skipped = self.num_samples(dataset, split), len(self.skipped[dataset])
        assert all(c.count + skipped == expected for c in found.values())
        return {label: ViewScore(confusion, plan) for label, confusion in found.items()}

    def _ahead(self, dataset: str, split: str) -> int:
        """Samples decoded ahead: one a thread, fewer where memory is short. Only clips that are
        decoded here take room for every view."""
        run, data = self.run, self.run.config.vimnas.data
        section, gpu = data.datasets[dataset], run.ranks.device.type == "cuda"
        each = sample_bytes(dataset, section, run.data.splits[dataset][split], gpu, self._pool)
        each *= 1 if section.is_image or gpu else len(self._plans[dataset])
        return plan_ahead(max(self._workers, data.prefetch), each, run.ranks.world_size)

    def _mean_softmax(self, forward: Forward, views: ViewBatch, batch: int, label: str) -> Tensor:
        """Probabilities averaged over views: float64 (B, C) on the CPU. The network gets at most
        `batch` views at a time."""
        run, (count, per_sample) = self.run, views.x.shape[:2]
        rows = [
            forward(x.to(run.ranks.device, run.dtype)).float()
            for x in views.x.flatten(0, 1).split(batch)
        ]
        logits = torch.cat(rows).cpu().unflatten(0, (count, per_sample))  # (B, V, C)
        finite = logits.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            name = views.names[finite.index(False)]
            raise CheckpointError(f"{run.checkpoint}: {label}: logits of {name} are not finite")
        return logits.double().softmax(-1).mean(1)

    def _sum(self, confusion: Confusion) -> None:
        """Replaces this rank's counts by those of all ranks."""
        for counts in (confusion.counts, confusion.top5_hits):
            counts.copy_(sum_over_ranks(counts.to(self.run.ranks.device), self.run.ranks))

    def _gather_skipped(self, dataset: str, mine: dict[str, str]) -> None:
        parts = gather_objects(mine) if self.run.ranks.world_size > 1 else [mine]
        self.skipped[dataset] = dict(sorted(item for part in parts for item in part.items()))

    def close(self) -> None:
        self._pool.shutdown()
