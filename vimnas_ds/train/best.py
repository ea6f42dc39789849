"""Which step has scored best so far."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Best:
    """By the mean of the datasets' scores. With another dataset the comparison starts anew, as
    means over other datasets cannot be compared."""

    step: int = 0
    score: float = -1.0
    datasets: tuple[str, ...] = ()

    def improves(self, step: int, scores: Mapping[str, float]) -> bool:
        """Take in the scores at `step`; whether they are the best so far."""
        score, datasets = statistics.fmean(scores.values()), tuple(sorted(scores))
        better = datasets != self.datasets or score > self.score
        if better:
            self.step, self.score, self.datasets = step, score, datasets
        return better

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.score, self.datasets = state["step"], state["score"], state["datasets"]
