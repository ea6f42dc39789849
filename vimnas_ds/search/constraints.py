"""Resource constraints as ranges, checked before any evaluation; any combination.

Parameters and FLOPs grow with every choice, so the reachable range of each is exactly what the
smallest and the largest member cost; a constraint outside it is refused with that range.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vimnas_ds.config import ConfigError, RunConfig
from vimnas_ds.space import Arch, SearchSpace
from vimnas_ds.train.dry_run import cost_of

#: random draws before a sub-network is led into the range step by step
RANDOM_TRIES = 200


@dataclass(frozen=True)
class Range:
    """low <= value <= high of one resource: "params", or "gflops" of a dataset's input."""

    resource: str
    dataset: str
    low: float
    high: float

    def value(self, config: RunConfig, arch: Arch) -> float:
        params, gflops = cost_of(config, arch, self.dataset)
        return params if self.resource == "params" else gflops

    def excess(self, value: float) -> float:
        """How far outside the range, relative to its nearer end; 0 inside."""
        if value < self.low:
            return (self.low - value) / self.low
        return (value - self.high) / max(self.high, 1e-12) if value > self.high else 0.0

    def __str__(self) -> str:
        return f"{self.resource} ({self.dataset}) in [{self.low:g}, {self.high:g}]"


def parse_range(resource: str, text: str, datasets: Sequence[str]) -> Range:
    """`HIGH`, `LOW:HIGH`, either with a dataset before: `k400=LOW:HIGH`. Suffixes k, M, G.

    Without a dataset, parameters count with the first dataset's head, FLOPs on its input.
    Raises ConfigError in words.
    """
    dataset, equals, rest = text.rpartition("=")
    if equals and dataset not in datasets:
        raise ConfigError(f"--{resource} {text}: {dataset!r} is none of {', '.join(datasets)}")
    low, colon, high = rest.partition(":")
    if not colon:
        low, high = "0", rest
    try:
        ends = [_number(low or "0"), _number(high or "inf")]
    except ValueError as err:
        raise ConfigError(f"--{resource} {text}: {err}; write HIGH or LOW:HIGH") from err
    if not 0 <= ends[0] <= ends[1]:
        raise ConfigError(f"--{resource} {text}: the range is empty")
    return Range(resource, dataset or datasets[0], ends[0], ends[1])


def _number(text: str) -> float:
    if text == "inf":
        return math.inf
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)([kMG]?)", text)
    if match is None:
        raise ValueError(f"{text!r} is not a number")
    return float(match[1]) * {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]]


class Constraints:
    """A conjunction of ranges over a space."""

    def __init__(self, ranges: Sequence[Range], config: RunConfig, space: SearchSpace):
        self.ranges, self.config, self.space = tuple(ranges), config, space
        for r in ranges:
            least, most = (r.value(config, a) for a in (space.smallest(), space.largest()))
            if r.high < least or r.low > most:
                raise ConfigError(
                    f"{r} cannot be reached: sub-networks of {space.name} have {r.resource} "
                    f"{least:,.6g} to {most:,.6g} ({r.dataset})"
                )

    def excess(self, arch: Arch) -> float:
        """Sum of the relative violations; 0 when all ranges hold."""
        return sum(r.excess(r.value(self.config, arch)) for r in self.ranges)

    def allow(self, arch: Arch) -> bool:
        return self.excess(arch) == 0.0

    def costs(self, arch: Arch) -> Mapping[str, float]:
        return {f"{r.resource}/{r.dataset}": r.value(self.config, arch) for r in self.ranges}

    def sample(self, rng: random.Random) -> Arch:
        """A random member inside all ranges; after many draws, one led there step by step.

        Raises ConfigError, naming the nearest costs met, when none is found.
        """
        best: Arch | None = None
        for _ in range(RANDOM_TRIES):
            arch = self.space.sample(rng)
            if self.allow(arch):
                return arch
            if best is None or self.excess(arch) < self.excess(best):
                best = arch
        assert best is not None
        return self._lead(best, rng)

    def _lead(self, arch: Arch, rng: random.Random) -> Arch:
        while not self.allow(arch):
            near = list(self.space.neighbours(arch))
            rng.shuffle(near)  # among equals, not always the first
            nearest = min(near, key=self.excess)
            if self.excess(nearest) >= self.excess(arch):
                near_costs = ", ".join(f"{k} {v:,.6g}" for k, v in self.costs(arch).items())
                ends = "; ".join(
                    f"{r.resource} {r.value(self.config, self.space.smallest()):,.6g} to "
                    f"{r.value(self.config, self.space.largest()):,.6g} ({r.dataset})"
                    for r in self.ranges
                )
                raise ConfigError(
                    f"no sub-network satisfies {'; '.join(map(str, self.ranges))} together; the "
                    f"nearest found has {near_costs}; each alone reaches {ends}"
                )
            arch = nearest
        return arch
