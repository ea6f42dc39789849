"""What a search maximises: a weighted mean over datasets of the accuracy, or of minus the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vimnas_ds.config import ConfigError

Metric = Literal["top1", "loss"]

#: how the weighted mean over datasets is called; no dataset can be
MEAN = "mean of datasets"


@dataclass(frozen=True)
class Objective:
    """`weights` by dataset, summing to one; `metric` decides, the other one breaks ties."""

    weights: Mapping[str, float]
    metric: Metric = "top1"

    @property
    def datasets(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {w:.3g}" for name, w in self.weights.items())
        return f"{self.metric} ({parts})"


def parse_objective(
    texts: Sequence[str] | None, known: Sequence[str], metric: Metric = "top1"
) -> Objective:
    """`NAME` or `NAME=WEIGHT` for each dataset (equal weights by default, all of `known` for None).

    Raises ConfigError for a dataset the run does not have, one named twice, or no positive weight.
    """
    weights: dict[str, float] = {}
    for text in texts or known:
        name, equals, number = text.partition("=")
        if name not in known:
            raise ConfigError(f"--datasets {text}: this run has {', '.join(known)}")
        if name in weights:
            raise ConfigError(f"--datasets names {name} twice")
        try:
            weights[name] = float(number) if equals else 1.0
        except ValueError as error:
            raise ConfigError(f"--datasets {text}: {number!r} is not a weight") from error
        if not 0 < weights[name] < math.inf:
            raise ConfigError(f"--datasets {text}: a weight must be above 0")
    total = sum(weights.values())
    return Objective({name: w / total for name, w in weights.items()}, metric)
