"""Evolution under resource constraints (the supplement's Algorithm 2, AutoFormer's values).

A generation is the children of the best K found so far: crossover picks each layer's block, and
the embed_dim, from either parent, also across different depths; mutation changes depth and (ours)
embed_dim with P_d and each block with P_m. Every child is checked against the constraints before
it is evaluated, and no candidate is evaluated twice. All loops are bounded. Against a cost, parents
are NSGA-II's (pareto.py) instead of the best K, and the first generation covers the cost's range.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from vimnas_ds.config import ConfigError
from vimnas_ds.search.constraints import Constraints
from vimnas_ds.search.pareto import Point, front, survivors
from vimnas_ds.search.resources import Resource
from vimnas_ds.search.scoring import ArchScorer
from vimnas_ds.space import Arch, SearchSpace


@dataclass(frozen=True)
class EvolutionOptions:
    """AutoFormer's values; the supplement gives none."""

    population: int = 50
    generations: int = 20
    top_k: int = 10
    crossovers: int = 25
    mutations: int = 25
    depth_probability: float = 0.4
    block_probability: float = 0.2
    attempts: int = 100  #: draws per child before it is given up

    def __post_init__(self) -> None:
        for name in ("population", "generations", "top_k", "attempts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("crossovers", "mutations"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name} must be at least 0, got {getattr(self, name)}")
        for name in ("depth_probability", "block_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name} must be between 0 and 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Generation:
    """One generation as evaluated: `best` is the best found so far; `values` are its members', of
    what is maximised (accuracy, or minus the loss)."""

    number: int
    members: tuple[Arch, ...]
    values: tuple[float, ...]
    best: Arch
    best_value: float


def crossover(a: Arch, b: Arch, space: SearchSpace, rng: random.Random) -> Arch:
    """A child of two parents; its depth is one parent's, and a layer only one parent has is that
    parent's (a layer neither has cannot occur)."""
    depth = rng.choice((a.depth, b.depth))
    heads, ratios = [], []
    for layer in range(depth):
        parent = rng.choice([p for p in (a, b) if layer < p.depth])
        heads.append(parent.num_heads[layer])
        ratios.append(parent.mlp_ratio[layer])
    child = Arch(rng.choice((a.embed_dim, b.embed_dim)), depth, tuple(heads), tuple(ratios))
    assert child in space
    return child


def mutate(arch: Arch, space: SearchSpace, options: EvolutionOptions, rng: random.Random) -> Arch:
    """A mutant; layers gained by a new depth are drawn at random."""
    depth, embed_dim = arch.depth, arch.embed_dim
    if rng.random() < options.depth_probability:
        depth = rng.choice(space.depth)
    if rng.random() < options.depth_probability:
        embed_dim = rng.choice(space.embed_dim)
    heads, ratios = [], []
    for layer in range(depth):
        if layer >= arch.depth or rng.random() < options.block_probability:
            heads.append(rng.choice(space.num_heads[layer]))
            ratios.append(rng.choice(space.mlp_ratio[layer]))
        else:
            heads.append(arch.num_heads[layer])
            ratios.append(arch.mlp_ratio[layer])
    return Arch(embed_dim, depth, tuple(heads), tuple(ratios))


class Evolution:
    """Algorithm 2 on a scorer; the same on any number of ranks for one seed. `against`: a cost
    whose whole front with accuracy is sought, not the most accurate sub-network alone."""

    def __init__(
        self,
        scorer: ArchScorer,
        constraints: Constraints,
        options: EvolutionOptions,
        seed: int,
        against: Resource | None = None,
    ):
        self.scorer, self.constraints, self.options = scorer, constraints, options
        self.space, self.against = constraints.space, against
        self.rng = random.Random(f"{seed}/evolution")

    def generations(self, progress: Callable[[], None]) -> Iterator[Generation]:
        """Evaluate and yield `options.generations` generations; `progress` after each candidate.

        Stops early when no new child can be found (a small or tightly constrained space).
        """
        members = self._first()
        for number in range(self.options.generations):
            self.scorer.score_all(f"generation {number}", members, progress)
            ranked = self.ranked()
            scores = self.scorer.scores
            yield Generation(
                number,
                tuple(members),
                tuple(scores[m].value for m in members),
                ranked[0],
                scores[ranked[0]].value,
            )
            members = self._children(self._choose(ranked))
            if not members:
                return

    def ranked(self) -> list[Arch]:
        """All allowed candidates evaluated so far, best first; ties by fewer parameters."""
        found = [a for a in self.scorer.scores if self.constraints.allow(a)]

        def key(arch: Arch) -> tuple[float, float, int]:
            accuracy, loss = self.scorer.scores[arch].rank_key
            return -accuracy, -loss, max(p for p, _ in self.scorer.costs(arch).values())

        return sorted(found, key=key)

    def front(self) -> list[Arch]:
        """The candidates that no other beats in accuracy and cost, cheapest first."""
        ranked = self.ranked()
        return [ranked[i] for i in front(self._points(ranked))]

    def _points(self, archs: list[Arch]) -> list[Point]:
        assert self.against is not None
        return [Point(self.against.value(a), self.scorer.scores[a].accuracy) for a in archs]

    def _first(self) -> list[Arch]:
        count, found = self.options.population, list[Arch]()
        if self.against is not None:
            found = self.constraints.sample_along(self.against, count, self.rng)
        return found + sample_distinct(self.constraints, count - len(found), found, self.rng)

    def _choose(self, ranked: list[Arch]) -> Callable[[], Arch]:
        """How a parent is drawn."""
        if self.against is None:
            best = ranked[: self.options.top_k]
            return lambda: self.rng.choice(best)
        kept = survivors(self._points(ranked), self.options.population)
        pool = [ranked[i] for i in kept]
        # a tournament of two in an ordered pool
        return lambda: pool[min(self.rng.randrange(len(pool)) for _ in range(2))]

    def _children(self, parent: Callable[[], Arch]) -> list[Arch]:
        children: dict[Arch, None] = {}

        def breed(count: int, make: Callable[[], Arch]) -> None:
            wanted = len(children) + count
            for _ in range(count * self.options.attempts):
                if len(children) == wanted:
                    return
                child = make()
                known = child in self.scorer.scores or child in children
                if not known and self.constraints.allow(child):
                    children[child] = None

        rng, options = self.rng, self.options
        breed(options.crossovers, lambda: crossover(parent(), parent(), self.space, rng))
        breed(options.mutations, lambda: mutate(parent(), self.space, options, rng))
        return list(children)


def sample_distinct(
    constraints: Constraints, count: int, exclude: Collection[Arch], rng: random.Random
) -> list[Arch]:
    """Up to `count` different random members inside the constraints and not in `exclude`; fewer if
    there are fewer."""
    if constraints.members is not None:
        left = [a for a in constraints.members if a not in exclude]
        return rng.sample(left, min(count, len(left)))
    found: dict[Arch, None] = {}
    for _ in range(100 * count):  # more members than can be listed: hardly one comes twice
        if len(found) < count and (arch := constraints.sample(rng)) not in exclude:
            found[arch] = None
    return list(found)
