"""Fronts: dominance against brute force, and searches for planted ones."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from scripts import evolve
from tests.small import small_config
from vimnas_ds.config import ConfigError, parse_config
from vimnas_ds.search.constraints import Constraints, Range
from vimnas_ds.search.evolve import Evolution, EvolutionOptions
from vimnas_ds.search.front import choose_point, draw_front, front_object, front_table, parse_pick
from vimnas_ds.search.pareto import Point, crowding, front, hypervolume, knee, survivors
from vimnas_ds.search.resources import CostModel
from vimnas_ds.space import SPACES, Arch, SearchSpace

NANO, CONFIG = SPACES["nano"], parse_config(small_config())


@dataclass(frozen=True)
class Planted:
    accuracy: float
    objective = SimpleNamespace(weights={"imagenet": 0.75, "k400": 0.25})

    @property
    def loss(self) -> float:
        return 1 - self.accuracy

    @property
    def value(self) -> float:
        return self.accuracy

    @property
    def scores(self):
        other = SimpleNamespace(top1=0.5, count=200)
        return {"imagenet": SimpleNamespace(top1=self.accuracy, count=50), "k400": other}

    @property
    def rank_key(self) -> tuple[float, float]:
        return self.accuracy, -self.loss


@dataclass
class PlantedScorer:
    worth: object
    scores: dict[Arch, Planted] = field(default_factory=dict)

    def score_all(self, what, archs, progress):
        assert not set(archs) & set(self.scores), "evaluated twice"
        self.scores |= {a: Planted(self.worth(a)) for a in archs}
        return [self.scores[a] for a in archs]

    def costs(self, arch):
        return {"imagenet": (arch.embed_dim, 0.0)}


def worth(arch: Arch) -> float:
    """More of everything helps, less and less; wide nets want few heads, deep ones small MLPs."""
    heads = sum(
        2 if (h == 2) != (arch.embed_dim > NANO.embed_dim[0]) else 1 for h in arch.num_heads
    )
    ratios = sum(3 if r == (4 if i == 0 else 2) else 1 for i, r in enumerate(arch.mlp_ratio))
    return 1 - 1 / (1 + 0.05 * heads + 0.1 * ratios + arch.embed_dim / 64)


def dominates(a: Point, b: Point) -> bool:
    return a.cost <= b.cost and a.accuracy >= b.accuracy and a != b


def some_points(seed: int, count: int = 40) -> list[Point]:
    """On a coarse grid, so that costs, accuracies and whole points coincide."""
    rng = random.Random(seed)
    return [Point(rng.randrange(12), rng.randrange(12) / 12) for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_nothing_dominates(seed):
    points = some_points(seed)
    found = front(points)
    expected = {p for p in points if not any(dominates(q, p) for q in points)}
    assert {points[i] for i in found} == expected
    assert len(found) == len(expected)  # equal points once
    assert [points[i].cost for i in found] == sorted(points[i].cost for i in found)


@pytest.mark.parametrize("seed", range(10))
def test_survivors_come_front_by_front_and_the_lonelier_first(seed):
    points = some_points(seed)
    order = survivors(points, len(points))
    assert sorted(order) == list(range(len(points)))
    assert survivors(points, 7) == order[:7]
    assert not any(dominates(points[b], points[a]) for k, a in enumerate(order) for b in order[k:])
    first = front(points)
    distance = dict(zip(first, crowding([points[i] for i in first]), strict=True))
    ranked = [distance[i] for i in order[: len(first)]]
    assert ranked == sorted(ranked, reverse=True)


def test_crowding_and_the_knee_of_a_known_front():
    points = [Point(0, 0.0), Point(1, 0.6), Point(2, 0.8), Point(10, 1.0)]
    inf = float("inf")
    assert crowding(points) == pytest.approx([inf, 0.2 + 0.8, 0.9 + 0.4, inf])
    assert knee(points) == 2  # 0.8 - 0.2 above 0.6 - 0.1
    assert [choose_point(points, p) for p in ("knee", "best", 1.9, 2)] == [2, 3, 1, 2]
    assert knee(points[:1]) == 0


@pytest.mark.parametrize("seed", range(5))
def test_hypervolume_is_the_mean_best_accuracy_within_a_budget(seed):
    points = some_points(seed, 8)
    budgets = [i * 14 / 7000 for i in range(1, 7000)]
    best = [max((p.accuracy for p in points if p.cost <= b), default=0.0) for b in budgets]
    assert hypervolume(points, 0, 14) == pytest.approx(sum(best) / len(best), abs=2e-3)


def search(space: SearchSpace, options: EvolutionOptions, seed: int, *ranges: Range, name="params"):
    scorer = PlantedScorer(worth)
    constraints = Constraints(ranges, CONFIG, space)
    against = CostModel(CONFIG, space).resource(name, "k400")
    evolution = Evolution(scorer, constraints, options, seed, against)
    list(evolution.generations(lambda: None))
    return evolution


@pytest.mark.parametrize("name", ["params", "gflops", "memory_mb"])
@pytest.mark.parametrize("limit", [None, Range("gflops", "k400", 0.002, 0.006)])
def test_half_the_evaluations_of_a_space_find_its_front(name, limit):
    options = EvolutionOptions(population=20, generations=6, crossovers=10, mutations=10)
    ranges = [limit] if limit else []
    found = search(NANO, options, 0, *ranges, name=name)
    allowed = [a for a in NANO.members() if found.constraints.allow(a)]
    assert set(found.scorer.scores) <= set(allowed)
    assert len(found.scorer.scores) <= 120 < len(allowed)
    ends = found.constraints.reach(found.against)
    points, truth = (
        [Point(found.against.value(a), worth(a)) for a in archs]
        for archs in (found.front(), allowed)
    )
    assert hypervolume(points, *ends) >= 0.99 * hypervolume(truth, *ends)
    assert not any(dominates(a, b) for a in points for b in points)
    assert points[0].cost == ends[0]


def test_enough_generations_find_the_front_exactly():
    found = search(NANO, EvolutionOptions(20, 12, 10, 12, 12), 0)
    points = [Point(found.against.value(a), worth(a)) for a in NANO.members()]
    assert {Point(found.against.value(a), worth(a)) for a in found.front()} == {
        points[i] for i in front(points)
    }


def test_320_evaluations_in_a_space_of_1e23_come_within_a_twentieth_of_the_front():
    """Planted: at a share c of the parameters' range at most 0.2 + 0.6 sqrt(c), which needs heads
    and ratio that go together in every layer; over all budgets 0.6 on average."""
    space = SPACES["vit_l"]
    against = CostModel(CONFIG, space).resource("params", "k400")
    anything = Constraints([], CONFIG, space)
    low, high = anything.reach(against)

    def planted(arch: Arch) -> float:
        share = (against.value(arch) - low) / (high - low)
        layers = zip(arch.num_heads, arch.mlp_ratio, strict=True)
        matched = sum(h - 14 == 2 * (r - 3) for h, r in layers) / arch.depth
        return (0.2 + 0.6 * share**0.5) * (0.5 + 0.5 * matched)

    def volume(archs: list[Arch]) -> float:
        return hypervolume([Point(against.value(a), planted(a)) for a in archs], low, high)

    options = EvolutionOptions(population=40, generations=8, crossovers=20, mutations=20)
    evolution = Evolution(PlantedScorer(planted), anything, options, 0, against)
    list(evolution.generations(lambda: None))
    assert len(evolution.scorer.scores) == 320
    assert volume(evolution.front()) >= 0.95 * 0.6
    rng = random.Random(0)
    assert volume([anything.sample(rng) for _ in range(320)]) < 0.7 * 0.6


def test_a_front_follows_its_seed():
    options = EvolutionOptions(population=10, generations=3, crossovers=5, mutations=5)
    visited = [list(search(NANO, options, seed).scorer.scores) for seed in (3, 3, 4)]
    assert visited[0] == visited[1] != visited[2]


def test_the_front_as_written_has_every_point_its_costs_and_the_pick():
    found = search(NANO, EvolutionOptions(20, 4, 10, 10, 10), 0)
    written = front_object(found, "best", CostModel(CONFIG, NANO), ("imagenet", "k400"))
    archs = [Arch.from_json(p["arch"]) for p in written["points"]]
    assert archs == found.front()
    assert written["picked"] == len(archs) - 1
    for arch, point in zip(archs, written["points"], strict=True):
        assert point["cost"] == point["costs"]["params"]["k400"] == found.against.value(arch)
        accuracy = point["accuracy"]
        assert accuracy == worth(arch)
        variance = 0.75**2 * accuracy * (1 - accuracy) / 50 + 0.25**2 * 0.25 / 200
        assert point["accuracy_se"] == pytest.approx(variance**0.5)
        assert set(point["costs"]) == {"params", "gflops", "memory_mb"}
    (bars,) = draw_front(found, written).axes[0].containers
    drawn = [(high - low) / 200 for (_, low), (_, high) in bars.lines[2][0].get_segments()]
    assert drawn == pytest.approx([p["accuracy_se"] for p in written["points"]])
    lines = front_table(written).splitlines()
    assert len(lines) == 2 + len(archs)
    assert [i for i, line in enumerate(lines[2:]) if " * " in line] == [written["picked"]]


def test_a_budget_below_everything_is_refused_before_the_search():
    assert parse_pick("60k", 50_000) == 60_000
    with pytest.raises(ConfigError, match="the cheapest sub-network allowed costs 50,000"):
        parse_pick("40k", 50_000)
    with pytest.raises(ConfigError, match="write knee, best or a budget"):
        parse_pick("middle", 50_000)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pareto", "--metric", "loss"], "front of accuracy: leave out --metric loss"),
        (["--pick", "best"], "--pick best chooses a point of a front: add --pareto"),
    ],
)
def test_options_that_a_front_does_not_go_with_are_refused(options, words, capsys):
    assert evolve.main([*options, "--checkpoint", "nowhere"]) == 2
    assert words in capsys.readouterr().err
