"""All members of a space, grouped by what they cost.

No resource depends on which layer takes a choice, only on how many do (resources.py). A signature
is an embed_dim, a depth and two histograms, of heads and of ratios; its members are the ways to
arrange those over its layers, counted and drawn by dynamic programming,

    ways_d(n) = sum_v ways_{d-1}(n - 1_v)      over the choices v of layer d

vit_l has 2e23 members and 705,486 signatures: few enough to know the costs of every one of them.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from vimnas_ds.config import ConfigError
from vimnas_ds.search.resources import Number, Resource, choices
from vimnas_ds.space import Arch, SearchSpace

Counts = tuple[int, ...]
#: more signatures would not fit into memory beside one another (some 30 bytes each)
MOST = 50_000_000


class Histograms(Generic[Number]):
    """How many of the first d layers take each of `values`: `ways[d]` maps every such histogram to
    its number of arrangements."""

    def __init__(self, layers: Sequence[Sequence[Number]]):
        self.layers, self.values = layers, choices(layers)
        self.ways: list[dict[Counts, int]] = [{(0,) * len(self.values): 1}]
        for options in layers:
            counts: dict[Counts, int] = {}
            for before, ways in self.ways[-1].items():
                for value in options:
                    now = self._step(before, value, 1)
                    counts[now] = counts.get(now, 0) + ways
            self.ways.append(counts)

    def _step(self, counts: Counts, value: Number, by: int) -> Counts:
        i = self.values.index(value)
        return (*counts[:i], counts[i] + by, *counts[i + 1 :])

    def _last(self, depth: int, counts: Counts) -> Iterator[tuple[Number, Counts]]:
        """What layer `depth` may take, with what is then left for the layers before it."""
        for value in self.layers[depth - 1]:
            left = self._step(counts, value, -1)
            if left in self.ways[depth - 1]:
                yield value, left

    def draw(self, depth: int, counts: Counts, rng: random.Random) -> tuple[Number, ...]:
        """One of the arrangements of `counts`, each as likely."""
        taken: list[Number] = []
        for layer in range(depth, 0, -1):
            options = list(self._last(layer, counts))
            weights = [self.ways[layer - 1][left] for _, left in options]
            ((value, counts),) = rng.choices(options, weights)
            taken.append(value)
        return tuple(reversed(taken))

    def arrangements(self, depth: int, counts: Counts) -> Iterator[tuple[Number, ...]]:
        """All of them."""
        if depth == 0:
            yield ()
            return
        for value, left in self._last(depth, counts):
            for first in self.arrangements(depth - 1, left):
                yield (*first, value)


class Signatures:
    """The signatures of a space, numbered; vectors over them are in that order.

    Raises ConfigError for a space that has too many of them.
    """

    def __init__(self, space: SearchSpace):
        self.heads, self.ratios = Histograms(space.num_heads), Histograms(space.mlp_ratio)
        self.groups = [(e, d) for e in space.embed_dim for d in space.depth]
        sizes = [len(self.heads.ways[d]) * len(self.ratios.ways[d]) for _, d in self.groups]
        if sum(sizes) > MOST:
            raise ConfigError(
                f"{space.name} has {sum(sizes):,} combinations of costs, constraints can be told "
                f"exactly for at most {MOST:,}: give its layers fewer choices"
            )
        self.starts = [0, *accumulate(sizes)]
        self._heads = {d: list(self.heads.ways[d]) for d in space.depth}
        self._ratios = {d: list(self.ratios.ways[d]) for d in space.depth}
        parts = []
        for _, d in self.groups:
            ways = [
                np.array(list(h.ways[d].values()), np.float64) for h in (self.heads, self.ratios)
            ]
            parts.append(np.outer(*ways).ravel())
        self.ways: NDArray[np.float64] = np.concatenate(parts)  #: members of each

    def values(self, resource: Resource) -> NDArray[np.float64]:
        """The resource's value for the members of each signature, as `Resource.value` has it."""
        parts = []
        for embed_dim, depth in self.groups:
            costs = resource.widths[embed_dim]
            heads, head_peaks = _over(self.heads, self._heads[depth], costs.heads, costs.head_peaks)
            ratios, ratio_peaks = _over(
                self.ratios, self._ratios[depth], costs.ratios, costs.ratio_peaks
            )
            total = costs.fixed + np.add.outer(heads, ratios)
            total += np.maximum(np.maximum.outer(head_peaks, ratio_peaks), costs.floor)
            parts.append(total.ravel() / resource.unit)
        return np.concatenate(parts)

    def _find(self, index: int) -> tuple[int, int, Counts, Counts]:
        group = bisect_right(self.starts, index) - 1
        embed_dim, depth = self.groups[group]
        row, column = divmod(index - self.starts[group], len(self._ratios[depth]))
        return embed_dim, depth, self._heads[depth][row], self._ratios[depth][column]

    def draw(self, index: int, rng: random.Random) -> Arch:
        """A member of signature `index`, each as likely."""
        embed_dim, depth, heads, ratios = self._find(index)
        return Arch(
            embed_dim,
            depth,
            self.heads.draw(depth, heads, rng),
            self.ratios.draw(depth, ratios, rng),
        )

    def members(self, index: int) -> Iterator[Arch]:
        """All members of signature `index`."""
        embed_dim, depth, heads, ratios = self._find(index)
        for h in self.heads.arrangements(depth, heads):
            for r in self.ratios.arrangements(depth, ratios):
                yield Arch(embed_dim, depth, h, r)


def _over(
    histograms: Histograms[Number],
    rows: list[Counts],
    each: Mapping[Number, int],
    peaks: Mapping[Number, int],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of every histogram in `rows`: the sum over its layers, and the highest peak among them."""
    counts = np.array(rows, np.int64)  # (histograms, values)
    costs = np.array([each[v] for v in histograms.values], np.int64)
    highest = np.array([peaks.get(v, 0) for v in histograms.values], np.int64)
    return counts @ costs, np.where(counts > 0, highest, 0).max(1)


@lru_cache(maxsize=4)
def signatures_of(space: SearchSpace) -> Signatures:
    """The same object for the same space: making it takes most of a second for vit_l."""
    return Signatures(space)


def weighted(weights: NDArray[np.float64], rng: random.Random) -> int:
    """An index drawn in proportion to `weights`, all positive."""
    sums = np.cumsum(weights)
    place = int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))
    return min(place, len(sums) - 1)
