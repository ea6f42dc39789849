"""Running sums between two log lines, kept on the device so that steps need no host sync."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vimnas_ds.space import Arch
from vimnas_ds.train.ranks import Ranks, gather_objects, sum_over_ranks


class Meters:
    """Loss and top-1 per dataset since the last `take`."""

    def __init__(self, names: list[str], ranks: Ranks):
        self._names, self._ranks = names, ranks
        self._sums = torch.zeros(len(names), 3, dtype=torch.float64, device=ranks.device)

    def add(self, dataset: str, loss: Tensor, correct: Tensor, count: int) -> None:
        """One rank's step: mean loss over `count` samples, and how many were correct."""
        row = self._sums[self._names.index(dataset)]
        row[0] += loss.double() * count
        row[1] += correct
        row[2] += count

    def state_dict(self) -> torch.Tensor:
        """The sums of every rank, (ranks, datasets, 3) (collective). Not their total: a resumed
        run adds up in the same order, so that not even the last bit is another."""
        return torch.stack(gather_objects(self._sums.cpu()))

    def load_state_dict(self, sums: torch.Tensor) -> None:
        """Every rank takes its own; where others saved them, rank 0 takes all."""
        if len(sums) == self._ranks.world_size:
            self._sums.copy_(sums[self._ranks.rank])
        else:
            self._sums.copy_(sums.sum(0) * self._ranks.is_main)

    def take(self) -> dict[str, tuple[float, float]]:
        """Mean (loss, top-1) of each dataset seen, over all ranks; then starts anew."""
        sums = sum_over_ranks(self._sums, self._ranks).tolist()
        self._sums.zero_()
        return {
            name: (loss / count, correct / count)
            for name, (loss, correct, count) in zip(self._names, sums, strict=True)
            if count
        }


class Interval:
    """Time spent in steps since the last `take`; evaluations and checkpoints do not count.

    A context manager around each step; `waited` adds up the seconds waited for data.
    """

    def __init__(self, samples_per_step: int):
        self._samples = samples_per_step
        self._steps = 0
        self._seconds = self._started = self.waited = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._seconds += time.perf_counter() - self._started
        self._steps += 1

    def take(self) -> tuple[float, float]:
        """(samples per second, seconds waited per step); then starts anew."""
        rate = self._steps * self._samples / max(self._seconds, 1e-9)
        waited = self.waited / max(self._steps, 1)
        self._steps, self._seconds, self.waited = 0, 0.0, 0.0
        return rate, waited


@dataclass
class ChoiceCounts:
    """How often each choice of each kind of decision was sampled, summed over layers."""

    counts: dict[str, dict[float, int]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(int))
    )

    def add(self, arch: Arch) -> None:
        self.counts["embed_dim"][arch.embed_dim] += 1
        self.counts["depth"][arch.depth] += 1
        for heads, ratio in zip(arch.num_heads, arch.mlp_ratio, strict=True):
            self.counts["num_heads"][heads] += 1
            self.counts["mlp_ratio"][ratio] += 1

    def state_dict(self) -> dict[str, dict[float, int]]:
        return {kind: dict(sorted(choices.items())) for kind, choices in self.counts.items()}

    def load_state_dict(self, state: dict[str, dict[float, int]]) -> None:
        self.counts.clear()
        for kind, choices in state.items():
            self.counts[kind].update(choices)
