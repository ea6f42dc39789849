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
from functools import cached_property

from vimnas_ds.config import ConfigError, RunConfig
from vimnas_ds.space import Arch, SearchSpace
from vimnas_ds.train.dry_run import cost_of

#: spaces up to this size are listed, so that what is inside the ranges is known exactly
LISTED = 20_000
#: in larger ones, random draws before the nearest STARTS of them are led into the ranges
RANDOM_TRIES, STARTS = 200, 8


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
    if not ends[0] <= ends[1]:
        raise ConfigError(f"--{resource} {text}: the range is empty")
    return Range(resource, dataset or datasets[0], ends[0], ends[1])


def _number(text: str) -> float:
    if text == "inf":
        return math.inf
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[-+]?[0-9]+)?)([kKMG]?)", text)
    if match is None:
        raise ValueError(f"{text!r} is not a number")
    return float(match[1]) * {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]]


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

    @cached_property
    def members(self) -> list[Arch] | None:
        """Every member inside all ranges, where the space is small enough to list; else None."""
        if self.space.size() > LISTED:
            return None
        return [arch for arch in self.space.members() if self.allow(arch)]

    def sample(self, rng: random.Random) -> Arch:
        """A random member inside all ranges: uniform where members can be listed; else one of many
        random draws, and failing those one led into the ranges step by step.

        Raises ConfigError, naming the nearest costs met, when none is found.
        """
        if self.members is not None:
            if not self.members:
                nearest = min(self.space.members(), key=self.excess)
                raise self._none("there is no sub-network with", nearest)
            return rng.choice(self.members)
        draws = [self.space.sample(rng) for _ in range(RANDOM_TRIES)]
        for arch in draws:
            if self.allow(arch):
                return arch
        led = [self._lead(a, rng) for a in sorted(draws, key=self.excess)[:STARTS]]
        best = min(led, key=self.excess)
        if not self.allow(best):
            raise self._none(
                f"none was found in {RANDOM_TRIES} draws and {STARTS} descents with", best
            )
        return best

    def _none(self, what: str, nearest: Arch) -> ConfigError:
        costs = ", ".join(f"{k} {v:,.6g}" for k, v in self.costs(nearest).items())
        ends = "; ".join(
            f"{r.resource} {r.value(self.config, self.space.smallest()):,.6g} to "
            f"{r.value(self.config, self.space.largest()):,.6g} ({r.dataset})"
            for r in self.ranges
        )
        return ConfigError(
            f"{what} {' and '.join(map(str, self.ranges))}; the nearest has {costs}; each alone "
            f"reaches {ends}"
        )

    def _lead(self, arch: Arch, rng: random.Random) -> Arch:
        """Walk towards the ranges: the best change of one decision, or where none helps of two."""
        while not self.allow(arch):
            near = list(self.space.neighbours(arch))
            rng.shuffle(near)  # among equals, not always the first
            best = min(near, key=self.excess)
            if self.excess(best) >= self.excess(arch):
                second = [n for a in near[:16] for n in self.space.neighbours(a)]
                best = min(second, key=self.excess)
                if self.excess(best) >= self.excess(arch):
                    return arch
            arch = best
        return arch
