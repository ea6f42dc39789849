"""Running sums between two log lines, kept on the device so that steps need no host sync."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vimnas_ds.space import Arch
from vimnas_ds.train.ranks import Ranks, sum_over_ranks


class Meters:
    """Loss and top-1 per dataset since the last `take`."""

    def __init__(self, names: list[str], ranks: Ranks):
        self._names, self._ranks = names, ranks
        self._sums = torch.zeros(len(names), 3, dtype=torch.float64, device=ranks.device)

    def add(self, dataset: str, loss: Tensor, correct: Tensor, count: int) -> None:
        """One rank's step: mean loss over `count` samples, and how many were correct."""
        row = self._sums[self._names.index(dataset)]
        row += torch.stack([loss.double() * count, correct.double(), row.new_tensor(count)])

    def take(self) -> dict[str, tuple[float, float]]:
        """Mean (loss, top-1) of each dataset seen, over all ranks; then starts anew."""
        sums = sum_over_ranks(self._sums, self._ranks).tolist()
        self._sums.zero_()
        return {
            name: (loss / count, correct / count)
            for name, (loss, correct, count) in zip(self._names, sums, strict=True)
            if count
        }


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
        for kind, choices in state.items():
            self.counts[kind].update(choices)
