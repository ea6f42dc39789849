"""Searches on planted truths: supernets built so that the right answer is known."""

from __future__ import annotations

import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch

from scripts.evolve import spread
from tests.small import small_config
from vimnas_ds.config import ConfigError, parse_config
from vimnas_ds.data.listing import Sample
from vimnas_ds.data.loader import Batch
from vimnas_ds.model.alphas import Alphas, decisions
from vimnas_ds.search.constraints import Constraints, Range, parse_range
from vimnas_ds.search.evolve import (
    Evolution,
    EvolutionOptions,
    crossover,
    mutate,
    sample_distinct,
)
from vimnas_ds.search.objective import parse_objective
from vimnas_ds.search.perturb import Decision, Margin, OpenChoices, PerturbationSearch
from vimnas_ds.search.scoring import (
    ArchScorer,
    EvaluationLog,
    Evaluations,
    Scored,
    paired_difference,
)
from vimnas_ds.space import SPACES, Arch
from vimnas_ds.train.dry_run import cost_of
from vimnas_ds.train.evaluate import Evaluator, Outcomes
from vimnas_ds.train.ranks import Ranks

NANO = SPACES["nano"]
CPU = Ranks(0, 1, torch.device("cpu"))
SAMPLES = 400


class MemoryEvaluator(Evaluator):
    """The real evaluator on samples in memory: sample i is a threshold, its label is 1."""

    def _batches(self, dataset: str, split: str):
        assert split == "select", "searches read the select split only"
        x = (torch.arange(SAMPLES) + 0.5) / SAMPLES
        for part in x.split(64):
            names = tuple(f"{float(value):.6f}" for value in part)
            yield Batch(part, torch.ones(len(part), dtype=torch.int64), names)


class PlantedNet(torch.nn.Module):
    """Right on the share of samples that `worth` gives; counts its forward passes."""

    def __init__(self, space=NANO, planted: Arch | None = None, worth=None):
        super().__init__()
        self.space, self.planted, self.worth, self.passes = space, planted, worth, 0

    def _logits(self, x: torch.Tensor, share: float) -> torch.Tensor:
        self.passes += 1
        return torch.stack([x, torch.full_like(x, share)], 1) * 5

    def forward(self, x: torch.Tensor, arch: Arch, dataset: str) -> torch.Tensor:
        return self._logits(x, self.worth(arch))

    def superposed(self, x: torch.Tensor, probabilities, dataset: str) -> torch.Tensor:
        """Accuracy is the mean mass of the planted choices, weighted so that they differ."""
        share = 0.0
        names = list(decisions(self.space))
        for i, (name, choices) in enumerate(decisions(self.space).items()):
            layer = int(name[name.index("[") + 1 : -1]) if "[" in name else None
            if layer is not None and layer >= self.planted.depth:
                continue
            wanted = getattr(self.planted, name.split("[")[0])
            wanted = wanted if layer is None else wanted[layer]
            share += float(probabilities[name][choices.index(wanted)]) * (1 + i / 10)
        return self._logits(x, share / (2 * len(names)))


DATASETS = ("imagenet", "k400")


def open_planted(net: PlantedNet, folder, cache=None, objective=None) -> Evaluations:
    config = parse_config(small_config())
    evaluator = MemoryEvaluator(SimpleNamespace(world_size=1), CPU, torch.float32, 64, 0)
    names = [f"{(i + 0.5) / SAMPLES:.6f}" for i in range(SAMPLES)]
    splits = {name: {"select": [Sample(n, 1) for n in names]} for name in DATASETS}
    run = SimpleNamespace(
        config=config,
        net=net.eval(),
        evaluator=evaluator,
        ranks=CPU,
        datasets=DATASETS,
        data=SimpleNamespace(splits=splits),
        identity=lambda dataset: dataset,
        weights="w",
        map_over_ranks=lambda f, items: list(f(items)),
        left_out=dict,
    )
    objective = objective or EQUAL
    log = EvaluationLog(folder / "evaluations.csv", objective.datasets, True)
    return Evaluations(run, log, objective, cache)


EQUAL = parse_objective(None, DATASETS)
PLANTS = [NANO.smallest(), NANO.largest(), Arch(48, 3, (1, 2, 1), (4, 2, 4))]


@pytest.mark.parametrize("rule", ["keep", "eliminate"])
@pytest.mark.parametrize("order", ["as_listed", "from_the_input", "random"])
@pytest.mark.parametrize("planted", PLANTS, ids=str)
def test_perturbation_finds_the_planted_choices(tmp_path, planted, rule, order):
    evaluations = open_planted(PlantedNet(planted=planted), tmp_path)
    misled = Alphas(NANO, 0.3, torch.Generator().manual_seed(1)).state_dict()
    search = PerturbationSearch(evaluations, misled, rule, order)
    most = search.num_evaluations()
    made = list(search.decide_all(lambda: None))
    assert search.state.arch() == planted
    unused = [f"{kind}[{layer}]" for kind in ("num_heads", "mlp_ratio")
              for layer in range(planted.depth, NANO.max_depth)]  # fmt: skip
    # losers may tie in an early elimination, the kept choice with nobody
    assert all(d.rounds[-1].value > 0 for d in made if d.name not in unused)
    rows = evaluations.log.path.read_text().splitlines()
    assert len(rows) - 1 <= most


def test_the_report_says_drops_margins_and_noise(tmp_path):
    evaluations = open_planted(PlantedNet(planted=PLANTS[2]), tmp_path)
    first = next(PerturbationSearch(evaluations, None).decide_all(lambda: None))
    assert (first.name, first.kept) == ("embed_dim", 48)
    assert first.drop[48] > 0 > first.drop[32]  # without a rival the planted one gains mass
    assert first.margin.value == pytest.approx(min(first.accuracy[32], first.accuracy[64])
                                         - first.accuracy[48])  # fmt: skip
    assert not first.in_noise
    assert first.margin.se > 0


def test_a_coin_flip_in_an_early_elimination_is_noise(tmp_path):
    """Widths 32 and 64 are equally useless: which goes first is chance, that 48 stays is not."""

    class Flip(PlantedNet):
        def superposed(self, x, probabilities, dataset):
            return self._logits(x, 0.1 + 0.6 * float(probabilities["embed_dim"][1]))

    evaluations = open_planted(Flip(), tmp_path)
    search = PerturbationSearch(evaluations, None, "eliminate")
    first = next(search.decide_all(lambda: None))
    assert (first.name, first.kept, len(first.rounds)) == ("embed_dim", 48, 2)
    assert [m.in_noise for m in first.rounds] == [True, False]
    assert first.rounds[1].value > 0.5
    assert first.in_noise
    assert first.margin == first.rounds[0]
    assert Decision.from_json(first.to_json()) == first


def test_a_margin_of_which_nothing_is_known_is_noise():
    nan, inf = float("nan"), float("inf")
    unknown = [Margin(nan, 0.1), Margin(0.5, inf), Margin(nan, nan), Margin(0, 0), Margin(0.2, 0.1)]
    assert all(m.in_noise for m in unknown)
    firm = [Margin(0.21, 0.1), Margin(0.1, 0)]
    assert not any(m.in_noise for m in firm)
    for one in unknown:
        assert min([*firm, one], key=lambda m: m.certainty) is one


def test_ties_go_by_loss(tmp_path):
    class Tied(PlantedNet):
        def superposed(self, x, probabilities, dataset):
            mass = float(probabilities["depth"][0])
            return torch.stack([torch.zeros_like(x), torch.full_like(x, 1 + mass)], 1)

    evaluations = open_planted(Tied(), tmp_path)
    search = PerturbationSearch(evaluations, None)
    made = {d.name: d for d in search.decide_all(lambda: None)}
    assert made["depth"].tied
    assert made["depth"].kept == NANO.depth[0]
    assert made["depth"].margin.value == 0.0


def test_probabilities_are_renormalised_exactly_over_what_remains():
    alphas = Alphas(SPACES["vit_t"], 1.0, torch.Generator().manual_seed(0))
    state = OpenChoices(alphas.space, alphas.state_dict())
    full = alphas.probabilities()
    for name, p in state.probabilities(("embed_dim", 1)).items():
        expected = full[name].detach().clone()
        if name == "embed_dim":
            expected[1] = 0
            expected /= 1 - full[name][1].detach()
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=0)
    state.eliminate("embed_dim", 1)
    torch.testing.assert_close(
        state.probabilities(("embed_dim", 0))["embed_dim"], torch.tensor([0.0, 0.0, 1.0])
    )
    state.decide("embed_dim", 2)
    with pytest.raises(ValueError, match="last open choice"):
        state.probabilities(("embed_dim", 2))


def test_the_space_left_for_tuning_has_only_open_choices():
    state = OpenChoices(NANO, None)
    state.decide("embed_dim", 1)
    state.decide("depth", 0)
    state.decide("num_heads[1]", 1)
    left = state.restricted_space()
    assert (left.embed_dim, left.depth, left.num_heads) == ((48,), (2,), ((1, 2), (2,)))
    rng = random.Random(0)
    assert all(left.sample(rng) in NANO for _ in range(50))


def worth(arch: Arch) -> float:
    """Likes width 48 and alternating layers: neither the largest nor the smallest."""
    pattern = sum(h == 1 + i % 2 for i, h in enumerate(arch.num_heads)) / 3
    ratios = sum(r == (4.0, 2.0, 4.0)[i] for i, r in enumerate(arch.mlp_ratio)) / 3
    return 0.1 + 0.2 * (arch.embed_dim == 48) + 0.3 * pattern + 0.3 * ratios


def all_members() -> list[Arch]:
    found = []
    for e, d in itertools.product(NANO.embed_dim, NANO.depth):
        for heads in itertools.product((1, 2), repeat=d):
            for ratios in itertools.product((2.0, 4.0), repeat=d):
                found.append(Arch(e, d, heads, ratios))
    return found


@pytest.mark.parametrize("budget", ["100k", "80k", "70k:90k", None])
def test_evolution_finds_the_known_optimum_under_a_budget(tmp_path, budget):
    evaluations = open_planted(PlantedNet(worth=worth), tmp_path)
    ranges = [] if budget is None else [parse_range("params", budget, DATASETS)]
    constraints = Constraints(ranges, evaluations.run.config, NANO)
    allowed = [a for a in all_members() if constraints.allow(a)]
    best = max(worth(a) for a in allowed)
    assert len(all_members()) == NANO.size()
    assert budget is None or len(allowed) < NANO.size() / 2
    scorer = ArchScorer(evaluations)
    options = EvolutionOptions(population=20, generations=8, crossovers=10, mutations=10)
    evolution = Evolution(scorer, constraints, options, seed=0)
    history = list(evolution.generations(lambda: None))
    found = evolution.ranked()[0]
    assert worth(found) == pytest.approx(best)
    assert all(constraints.allow(a) for a in scorer.scores)
    members = [m for g in history for m in g.members]
    assert len(members) == len(set(members)) == len(scorer.scores)  # nobody twice
    batches = -(-SAMPLES // 64)
    assert evaluations.run.net.passes == len(members) * batches * len(DATASETS)
    assert [g.best_value for g in history] == sorted(g.best_value for g in history)


def test_by_the_loss_the_best_so_far_is_the_lowest_loss_though_its_accuracy_be_worse(tmp_path):
    class Sure(PlantedNet):
        """The more often right, the surer where wrong."""

        def forward(self, x, arch, dataset):
            logits = self._logits(x, worth(arch))
            wrong = logits[:, :1] > logits[:, 1:]
            return torch.where(wrong, logits / (1 - worth(arch)) ** 4, logits)

    objective = parse_objective(None, DATASETS, "loss")
    evaluations = open_planted(Sure(), tmp_path, objective=objective)
    scorer = ArchScorer(evaluations)
    anything = Constraints([], evaluations.run.config, NANO)
    options = EvolutionOptions(population=4, generations=6, crossovers=4, mutations=4)
    history = list(Evolution(scorer, anything, options, 0).generations(lambda: None))
    shown = [spread(g, "loss")["best"] for g in history]
    assert shown == sorted(shown, reverse=True)
    assert shown[-1] == min(s.loss for s in scorer.scores.values())
    assert spread(history[0], "loss")["worst"] == max(
        scorer.scores[m].loss for m in history[0].members
    )
    accuracies = [scorer.scores[g.best].accuracy for g in history]
    assert accuracies != sorted(accuracies)


def test_evolution_beats_random_search_where_the_space_cannot_be_exhausted(tmp_path):
    """vit_t, 2e14 members, 300 evaluations under a budget: planted optimum in sight."""
    space, config = SPACES["vit_t"], parse_config(small_config())
    planted = space.sample(random.Random(5))

    def likeness(arch: Arch) -> float:
        layers = range(min(arch.depth, planted.depth))
        same = sum(arch.num_heads[i] == planted.num_heads[i] for i in layers)
        same += sum(arch.mlp_ratio[i] == planted.mlp_ratio[i] for i in layers)
        return 0.05 + 0.9 * same / (2 * planted.depth)

    evaluations = open_planted(PlantedNet(space, worth=likeness), tmp_path)
    budget = cost_of(config, planted, "imagenet")[0]
    limit = Constraints([Range("params", "imagenet", 0.8 * budget, budget)], config, space)
    scorer = ArchScorer(evaluations)
    options = EvolutionOptions(population=50, generations=6)
    evolution = Evolution(scorer, limit, options, seed=0)
    list(evolution.generations(lambda: None))
    assert len(scorer.scores) == 50 + 5 * 50
    assert all(limit.allow(a) for a in scorer.scores)
    found = likeness(evolution.ranked()[0])
    rng = random.Random(1)
    by_chance = max(likeness(limit.sample(rng)) for _ in range(300))
    assert found >= by_chance + 0.1


def test_perturbation_of_a_real_supernet_finds_the_network_that_labels_the_samples(
    tmp_path, build_supernet
):
    """Labels are the planted sub-network's own answers, so removing its choices costs most."""
    right = total = 0
    for planted in (NANO.smallest(), NANO.largest()):
        net = build_supernet()
        x = torch.randn(256, 3, 32, 32, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            y = net(x, planted, "imagenet").argmax(-1)
        evaluations = open_planted(net, tmp_path, objective=parse_objective(["imagenet"], DATASETS))
        names = tuple(s.path for s in evaluations.run.data.splits["imagenet"]["select"][:256])
        evaluations.run.evaluator._batches = lambda dataset, split, x=x, y=y, names=names: iter(
            [Batch(x, y, names)]
        )
        search = PerturbationSearch(evaluations, None)
        made = list(search.decide_all(lambda: None))
        for d in made:
            name, _, layer = d.name.partition("[")
            wanted = getattr(planted, name)
            right += d.kept == (wanted[int(layer[:-1])] if layer else wanted)
        total += len(made)
    assert right >= total - 2, f"{right} of {total}"


def test_evolution_is_repeatable_and_follows_its_seed(tmp_path):
    def visited(seed: int) -> list[Arch]:
        evaluations = open_planted(PlantedNet(worth=worth), tmp_path)
        scorer = ArchScorer(evaluations)
        options = EvolutionOptions(population=10, generations=3, crossovers=5, mutations=5)
        anything = Constraints([], evaluations.run.config, NANO)
        list(Evolution(scorer, anything, options, seed).generations(lambda: None))
        return list(scorer.scores)

    assert visited(3) == visited(3) != visited(4)


def test_children_of_any_parents_are_members():
    space, rng = SPACES["vit_t"], random.Random(0)
    options = EvolutionOptions()
    depths, dims = set(), set()
    for _ in range(500):
        a, b = space.sample(rng), space.sample(rng)
        child = crossover(a, b, space, rng)
        assert child in space
        assert child.embed_dim in (a.embed_dim, b.embed_dim)
        for layer in range(child.depth):
            parents = [p for p in (a, b) if layer < p.depth]
            blocks = [(p.num_heads[layer], p.mlp_ratio[layer]) for p in parents]
            assert (child.num_heads[layer], child.mlp_ratio[layer]) in blocks
        if a.depth != b.depth:
            depths.add(child.depth - min(a.depth, b.depth))
        mutant = mutate(a, space, options, rng)
        assert mutant in space
        dims.add(mutant.embed_dim != a.embed_dim)
    assert 0 in depths
    assert max(depths) > 0  # children take the deeper parent's depth as well
    assert dims == {True, False}


@pytest.mark.parametrize(
    ("resource", "text", "words"),
    [
        ("params", "1k", r"cannot be reached: .* params \(imagenet\) 44,\d+ to 187,\d+"),
        ("params", "5M:6M", "cannot be reached"),
        ("gflops", "k400=0.000001", "gflops .k400. .* to "),
        ("params", "100001:100002", "to 187,.*, with nothing between .* and "),
        ("params", "many", "'many' is not a number"),
        ("params", "9k:1k", "the range is empty"),
        ("params", "k700=9k", "'k700' is none of imagenet, k400"),
    ],
)
def test_an_infeasible_constraint_names_the_reachable_range(resource, text, words):
    config = parse_config(small_config())

    def draw() -> Arch:
        ranges = [parse_range(resource, text, ("imagenet", "k400"))]
        return Constraints(ranges, config, NANO).sample(random.Random(0))

    with pytest.raises(ConfigError, match=words):
        draw()


def test_tight_ranges_are_reached_and_several_hold_together():
    config = parse_config(small_config())
    rng = random.Random(0)
    tight = Constraints([Range("params", "imagenet", 0, 45_500)], config, NANO)
    assert tight.allow(tight.sample(rng))  # random draws alone would hardly meet it
    both = Constraints(
        [Range("params", "k400", 70e3, 100e3), Range("gflops", "k400", 0, 0.004)], config, NANO
    )
    for arch in sample_distinct(both, 5, [NANO.smallest()], rng):
        params, gflops = cost_of(config, arch, "k400")
        assert 70e3 <= params <= 100e3
        assert gflops <= 0.004


def test_the_paired_error_is_that_of_the_difference():
    a = torch.tensor([1.0, 1, 1, 0, 1, 0, 1, 1], dtype=torch.float64)
    b = torch.tensor([1.0, 0, 1, 0, 1, 0, 0, 1], dtype=torch.float64)
    zero = torch.zeros(8, dtype=torch.float64)
    names, only = tuple("abcdefgh"), parse_objective(["k400"], ["k400"])
    first, second = (Scored({"k400": Outcomes(v, v, zero, names)}, only) for v in (a, b))
    mean, error = paired_difference(first, second)
    difference = a - b
    assert mean == pytest.approx(0.25)
    assert error == pytest.approx(float(difference.std()) / 8**0.5)
    assert paired_difference(first, first) == (0.0, 0.0)
    # a file that could not be read the second time leaves the others in their pairs
    less = Scored({"k400": Outcomes(b[1:], b[1:], zero[1:], names[1:])}, only)
    mean, error = paired_difference(first, less)
    assert mean == pytest.approx(float(difference[1:].mean()))
    assert error == pytest.approx(float(difference[1:].std()) / 7**0.5)
    # one common sample has no variance that could be known
    one = Scored({"k400": Outcomes(b[1:2], b[1:2], zero[1:2], names[1:2])}, only)
    assert paired_difference(first, one) == (1.0, math.inf)
