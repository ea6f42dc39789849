"""Resource constraints as ranges, checked before any evaluation; any combination.

Every signature's costs are known (signatures.py), so whether ranges can hold together, what each
resource reaches while the others hold, and how many members are inside are found exactly, and
members inside are drawn uniformly.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vimnas_ds.config import ConfigError, RunConfig
from vimnas_ds.search.resources import CostModel, Resource
from vimnas_ds.search.signatures import signatures_of, weighted
from vimnas_ds.space import Arch, SearchSpace

#: up to this many members inside the ranges are listed, so that none is drawn twice or missed
LISTED = 20_000
#: `about` N parameters: within this share of them
ABOUT = 0.02


@dataclass(frozen=True)
class Range:
    """low <= value <= high of a resource (see resources.py) on a dataset's input."""

    resource: str
    dataset: str
    low: float
    high: float

    def __str__(self) -> str:
        name, ends = self.resource, (format_cost(self.resource, v) for v in (self.low, self.high))
        return f"{name} ({self.dataset}) in [{', '.join(ends)}]"


def format_cost(resource: str, value: float) -> str:
    whole = resource == "params" and math.isfinite(value)
    return f"{value:,.0f}" if whole else f"{value:,.6g}"


def parse_range(resource: str, text: str, datasets: Sequence[str]) -> Range:
    """`HIGH`, `LOW:HIGH`, either with a dataset before: `k400=LOW:HIGH`. Suffixes k, M, G.

    Without a dataset, parameters count with the first dataset's head, the others on its input.
    Raises ConfigError in words.
    """
    option = f"--{resource} {text}"
    dataset, rest = split_dataset(option, text, datasets)
    low, colon, high = rest.partition(":")
    if not colon:
        low, high = "0", rest
    try:
        ends = [parse_number(low or "0"), parse_number(high or "inf")]
    except ValueError as err:
        raise ConfigError(f"{option}: {err}; write HIGH or LOW:HIGH") from err
    if not ends[0] <= ends[1]:
        raise ConfigError(f"{option}: the range is empty")
    return Range(resource, dataset, ends[0], ends[1])


def parse_about(text: str, datasets: Sequence[str]) -> Range:
    """`[DATASET=]N`: parameters within 2 % of N."""
    dataset, rest = split_dataset(f"--about {text}", text, datasets)
    try:
        wanted = parse_number(rest)
    except ValueError as err:
        raise ConfigError(f"--about {text}: {err}") from err
    return Range("params", dataset, (1 - ABOUT) * wanted, (1 + ABOUT) * wanted)


def split_dataset(option: str, text: str, datasets: Sequence[str]) -> tuple[str, str]:
    """`DATASET=REST` or `REST`, which means the first of `datasets`."""
    dataset, equals, rest = text.rpartition("=")
    if equals and dataset not in datasets:
        raise ConfigError(f"{option}: {dataset!r} is none of {', '.join(datasets)}")
    return dataset or datasets[0], rest


def parse_number(text: str) -> float:
    """With a suffix k, M or G if need be. Raises ValueError."""
    if text == "inf":
        return math.inf
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[-+]?[0-9]+)?)([kKMG]?)", text)
    if match is None:
        raise ValueError(f"{text!r} is not a number")
    return float(match[1]) * {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]]


class Constraints:
    """A conjunction of ranges over a space. Raises ConfigError, with what each resource reaches
    while the other ranges hold, when no member is inside all of them."""

    def __init__(
        self,
        ranges: Sequence[Range],
        config: RunConfig,
        space: SearchSpace,
        costs: CostModel | None = None,
    ):
        self.ranges, self.space = tuple(ranges), space
        model = costs or CostModel(config, space)
        self._resources = [model.resource(r.resource, r.dataset) for r in ranges]
        self._signatures = signatures_of(space)
        values = [self._signatures.values(resource) for resource in self._resources]
        holds = [(r.low <= v) & (v <= r.high) for r, v in zip(ranges, values, strict=True)]
        every = np.ones(len(self._signatures.ways), bool)
        self._inside = np.flatnonzero(np.logical_and.reduce([every, *holds]))
        if not len(self._inside):
            raise ConfigError(self._unreachable(values, holds))
        self._ways = self._signatures.ways[self._inside]

    def _unreachable(
        self, values: list[NDArray[np.float64]], holds: list[NDArray[np.bool_]]
    ) -> str:
        every = np.ones(len(self._signatures.ways), bool)
        found = []
        for i, r in enumerate(self.ranges):
            others = np.logical_and.reduce([every, *holds[:i], *holds[i + 1 :]])
            left = values[i][others] if others.any() else values[i]
            words = " to ".join(format_cost(r.resource, v) for v in (left.min(), left.max()))
            if len(self.ranges) > 1:
                words += " while the others hold" if others.any() else " (no other range regarded)"
            below, above = left[left < r.low], left[left > r.high]
            if others.any() and len(below) and len(above):
                ends = (format_cost(r.resource, v) for v in (below.max(), above.min()))
                words += f", with nothing between {' and '.join(ends)}"
            found.append(f"{r.resource} ({r.dataset}) {words}")
        return (
            f"{' and '.join(map(str, self.ranges))} cannot be reached: sub-networks of "
            f"{self.space.name} have {'; '.join(found)}"
        )

    def allow(self, arch: Arch) -> bool:
        return all(
            r.low <= resource.value(arch) <= r.high
            for r, resource in zip(self.ranges, self._resources, strict=True)
        )

    @property
    def size(self) -> float:
        """Number of members inside, to a float's precision."""
        return float(self._ways.sum())

    def reach(self, resource: Resource) -> tuple[float, float]:
        """What the resource costs at least and at most inside the ranges."""
        values = self._signatures.values(resource)[self._inside]
        return float(values.min()), float(values.max())

    @cached_property
    def members(self) -> list[Arch] | None:
        """Every member inside, where there are few enough to list; else None."""
        if self.size > LISTED:
            return None
        return [arch for i in self._inside for arch in self._signatures.members(int(i))]

    def sample(self, rng: random.Random) -> Arch:
        """A member inside, each as likely."""
        return self._signatures.draw(int(self._inside[weighted(self._ways, rng)]), rng)

    def sample_along(self, resource: Resource, count: int, rng: random.Random) -> list[Arch]:
        """Up to `count` different members inside that cover what `resource` can cost: one of the
        cheapest, one of the dearest, and one of each of equal slices between."""
        values = self._signatures.values(resource)[self._inside]
        num_slices = max(1, count - 2)
        ends = np.linspace(values.min(), values.max(), num_slices + 1)
        slices = np.digitize(values, ends[1:-1])
        groups = [values == values.min(), values == values.max()]
        groups += [slices == i for i in range(num_slices)]
        found: dict[Arch, None] = {}
        for group in map(np.flatnonzero, groups):
            if len(group):
                place = int(group[weighted(self._ways[group], rng)])
                found[self._signatures.draw(int(self._inside[place]), rng)] = None
        return list(found)[:count]
