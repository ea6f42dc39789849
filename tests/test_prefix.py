"""Prefix caching changes nothing but the work, and a killed tuned search ends as another does."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import SMALL_TUBES, clip_batch, image_batch, randomise
from tests.small import small_config
from vimnas_ds.config import ConfigError, parse_config
from vimnas_ds.data.listing import Sample
from vimnas_ds.data.loader import Batch
from vimnas_ds.model.alphas import Alphas
from vimnas_ds.model.block import Block, ModelOptions
from vimnas_ds.model.supernet import Supernet
from vimnas_ds.search.objective import parse_objective
from vimnas_ds.search.perturb import OpenChoices, PerturbationSearch
from vimnas_ds.search.prefix import PrefixCache
from vimnas_ds.search.scoring import EvaluationLog, Evaluations
from vimnas_ds.search.stages import TuningStages
from vimnas_ds.space import SearchSpace
from vimnas_ds.train.evaluate import Evaluator
from vimnas_ds.train.ranks import Ranks
from vimnas_ds.train.run_files import CheckpointError

CPU = Ranks(0, 1, torch.device("cpu"))
SPACE = SearchSpace.uniform("test", (16, 24, 32), (2, 3, 4), (1, 2), (1, 2, 3), head_dim=8)
DEEP = SearchSpace.uniform("deep", (8, 12, 16), (12, 13, 14), (1, 2), (1, 1.5, 2), head_dim=8)
DATASETS = ("imagenet", "k400")
SIZES = (5, 3, 4)  #: samples per batch
FULL = 2**40


class MemoryEvaluator(Evaluator):
    """The real evaluator on images and clips in memory; in every `lossy`-th pass a file of the
    first batch cannot be read."""

    def __init__(self, sizes: tuple[int, ...], lossy: int):
        super().__init__(SimpleNamespace(world_size=1), CPU, torch.float32, 5, 0)
        self.sizes, self.lossy, self.passes = sizes, lossy, 0
        generator = torch.Generator().manual_seed(9)
        self.labels = [torch.randint(5, (n,), generator=generator) for n in sizes]

    def _batches(self, dataset, split):
        assert split == "select"
        self.passes += 1
        for i, (size, y) in enumerate(zip(self.sizes, self.labels, strict=True)):
            x = image_batch(i, size) if dataset == "imagenet" else clip_batch(i, size)
            names = tuple(f"{i}/{n}" for n in range(size))
            gone = self.lossy and i == 0 and self.passes % self.lossy == 0
            yield Batch(x[1:], y[1:], names[1:]) if gone else Batch(x, y, names)


class FullLog(EvaluationLog):
    """Keeps every sample's loss as it came."""

    def __init__(self, path):
        super().__init__(path, DATASETS, True)
        self.losses: list[torch.Tensor] = []

    def add(self, what, candidate, scored, costs):
        super().add(what, candidate, scored, costs)
        self.losses += [o.loss for o in scored.outcomes.values()]


class Forgetful(Evaluations):
    """Evaluates again what it has evaluated before."""

    def score_all(self, *args):
        self.forget()
        return super().score_all(*args)


def build_net(space: SearchSpace = SPACE) -> Supernet:
    torch.manual_seed(0)
    options = ModelOptions(qk_norm=True, layer_scale=0.5)
    net = Supernet(space, SMALL_TUBES, {"imagenet": 7, "k400": 5}, options)
    randomise(net)
    return net.eval().requires_grad_(False)


def build_search(folder, budget: int | None, net: Supernet, sizes=SIZES, lossy=0, **options):
    """A search whose CSV goes to `folder`; budget None: without a cache."""
    samples = [Sample(f"{i}/{n}", 0) for i, size in enumerate(sizes) for n in range(size)]
    run = SimpleNamespace(
        config=parse_config(small_config()),
        net=net,
        evaluator=MemoryEvaluator(sizes, lossy),
        ranks=CPU,
        data=SimpleNamespace(splits={name: {"select": samples} for name in DATASETS}),
        map_over_ranks=lambda f, items: list(f(items)),
    )
    cache = None if budget is None else PrefixCache(run, budget)
    alphas = Alphas(net.space, 0.3, torch.Generator().manual_seed(1)).state_dict()
    evaluations = Forgetful(
        run, FullLog(folder / "evaluations.csv"), parse_objective(None, DATASETS)
    )
    return PerturbationSearch(evaluations, alphas, prefixes=cache, **options)


def search_all(folder, budget: int | None, net=None, **options):
    """All decisions, every sample's losses, and the cache."""
    search = build_search(folder, budget, net or build_net(), **options)
    log = search.evaluations.log
    return list(search.decide_all(lambda: None)), log.losses, search.prefixes


def assert_same(one, other) -> None:
    assert one[0] == other[0]
    assert len(one[1]) == len(other[1])
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("rule", ["keep", "eliminate"])
@pytest.mark.parametrize("order", ["as_listed", "from_the_input", "random"])
def test_caching_changes_no_bit_whatever_the_memory(tmp_path, order, rule):
    how = {"order": order, "rule": rule, "seed": 2}
    plain = search_all(tmp_path, None, **how)
    assert len({loss.sum().item() for loss in plain[1]}) > 0.8 * len(plain[1])
    full = search_all(tmp_path, FULL, **how)
    assert_same(plain, full)
    part = search_all(tmp_path, full[2]._used // 4, **how)
    assert_same(plain, part)
    assert 0 < len(part[2]._kept) < len(full[2]._kept) == len(SIZES) * len(DATASETS)
    assert part[2]._used <= part[2].budget
    assert_same(plain, search_all(tmp_path, 0, **how))


def test_any_evaluation_may_follow_any_other():
    """As on a rank without a share in some decisions: whatever changed, no stale state is used."""
    net, rng = build_net(), random.Random(0)
    run = SimpleNamespace(net=net, ranks=CPU, evaluator=SimpleNamespace(files=("a",)))
    cache, x = PrefixCache(run, FULL), image_batch()
    alphas = Alphas(SPACE, 0.3, torch.Generator().manual_seed(1)).state_dict()
    for _ in range(300):
        state = OpenChoices(SPACE, alphas)
        changed = ["depth"] if rng.random() < 0.7 else rng.sample(list(state.choices), 2)
        for name in changed:
            state.eliminate(name, rng.choice(state.open[name]))
        name = rng.choice([n for n in state.choices if len(state.open[n]) > 1])
        after = state.probabilities((name, rng.choice(state.open[name])))
        with torch.no_grad():
            found = cache.forward(name, state.probabilities(), after)(x, dataset="imagenet")
            assert torch.equal(found, net.superposed(x, after, "imagenet"))


def test_a_batch_that_lost_a_file_is_another_batch(tmp_path):
    plain = search_all(tmp_path, None, lossy=3)
    assert_same(plain, search_all(tmp_path, FULL, lossy=3))


def test_tuning_forgets_the_activations(tmp_path):
    def tuned(budget):
        net = build_net()

        def tune(space, made):
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(1.01)

        return search_all(tmp_path, budget, net, tune=tune)

    assert_same(tuned(None), tuned(FULL))


def count_branches(monkeypatch, tmp_path, budget) -> tuple[int, int]:
    """Branches computed per batch in the whole search of a deep net, and the depth it kept."""
    calls = []
    for name in ("superposed_attention", "superposed_mlp"):
        original = getattr(Block, name)

        def counted(self, *args, original=original):
            calls.append(self)
            return original(self, *args)

        monkeypatch.setattr(Block, name, counted)
    made, *_ = search_all(tmp_path, budget, build_net(DEEP), sizes=(2,))
    monkeypatch.undo()
    assert len(calls) % len(DATASETS) == 0  # one batch of each
    depth = next(d.kept for d in made if d.name == "depth")
    return len(calls) // len(DATASETS), int(depth)


def test_the_work_falls_to_the_branches_behind_the_decision(tmp_path, monkeypatch):
    plain, depth = count_branches(monkeypatch, tmp_path, None)
    cached, _ = count_branches(monkeypatch, tmp_path, FULL)
    short, _ = count_branches(monkeypatch, tmp_path, 0)
    # a decision of c choices is c + 1 evaluations: 3 of a layer's heads, 4 of its ratio
    top, last = 2 * DEEP.max_depth, 2 * depth
    reached = top + top + top + (top - 2)  # with all depths, without 12, without 13, without 14
    assert plain == 4 * top + reached + depth * (3 + 4) * last
    behind = sum(3 * (last - 2 * i) + 4 * (last - 2 * i - 1) for i in range(depth))
    advances = last - 1  # the kept states go on by one branch from decision to decision
    assert cached == 4 * top + top + behind + advances
    assert cached < 0.56 * plain
    assert cached < short < 0.75 * plain


def test_layers_that_no_open_depth_reaches_are_not_computed(monkeypatch):
    net, seen = build_net(), []
    original = Block.superposed_mlp
    monkeypatch.setattr(
        Block, "superposed_mlp", lambda self, *a: seen.append(self) or original(self, *a)
    )
    p = Alphas(SPACE, 0.3, torch.Generator().manual_seed(1)).probabilities()
    p["depth"] = torch.tensor([0.4, 0.6, 0.0])
    with torch.no_grad():
        short = net.superposed(image_batch(), p, "imagenet")
    assert len(seen) == 3
    p["depth"].requires_grad_()
    full = net.superposed(image_batch(), p, "imagenet")
    assert len(seen) == 3 + 4
    assert torch.equal(short, full)
    (gradient,) = torch.autograd.grad(full.square().sum(), p["depth"])
    assert gradient[2] != 0


class Killed(Exception):
    """What a kill is to a test."""


class FakeTuner:
    """A tuner whose weights and place in the data decide what it does next, as the real one's."""

    def __init__(self, net: Supernet, kill_at: int | None = None):
        data = SimpleNamespace(fingerprint=lambda: 5)
        config = parse_config(small_config())
        self.run = SimpleNamespace(ranks=CPU, weights="digest", data=data, config=config)
        self.net, self.kill_at, self.position = net, kill_at, {"cursor": 7}

    def __call__(self, space: SearchSpace) -> None:
        if self.position["cursor"] == self.kill_at:
            raise Killed
        generator = torch.Generator().manual_seed(self.position["cursor"] + space.size())
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        self.position["cursor"] += 1

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.net.named_parameters()}

    def restore(self, weights, position) -> None:
        self.net.load_state_dict(weights)
        self.position = dict(position)


def test_no_more_tunings_than_foretold(tmp_path):
    done = []
    search = build_search(tmp_path, None, build_net(), tune=lambda space, made: done.append(space))
    most = search.num_tunings()
    list(search.decide_all(lambda: None))
    unused = 2 * (SPACE.max_depth - search.state.arch().depth)
    assert len(done) == most - unused
    assert search.num_tunings() == max(unused - 1, 0)


def staged(folder: Path, resume=False, kill_at=None, keep=2, **how):
    """The decisions of a tuned search in `folder`."""
    net = build_net()
    log = folder / "evaluations.csv"
    stages = TuningStages(folder / "decisions", FakeTuner(net, kill_at), how, keep, log)
    search = build_search(folder, FULL, net, tune=stages, **how)
    if resume:
        search.go_on_from(stages.resume())
    list(search.decide_all(lambda: None))
    return search.made


@pytest.mark.parametrize("order", ["as_listed", "random"])
def test_a_killed_tuned_search_ends_as_an_uninterrupted_one(tmp_path, order):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    expected = staged(whole, order=order, rule="eliminate")
    assert len({d.accuracy_before for d in expected}) > 3  # tuning matters
    for kill_at in (9, 10):  # twice
        with pytest.raises(Killed):
            staged(killed, kill_at > 9, kill_at, order=order, rule="eliminate")
    names = [f"{i:02d}-{d.name}" for i, d in enumerate(expected, 1)]
    assert sorted(p.name for p in (killed / "decisions").iterdir()) == names[1:3]
    found = staged(killed, True, order=order, rule="eliminate")
    assert found == expected
    a, b = ((folder / "evaluations.csv").read_text() for folder in (whole, killed))
    assert a == b


def test_a_stage_of_another_search_is_not_gone_on_from(tmp_path):
    with pytest.raises(CheckpointError, match="start without --resume"):
        staged(tmp_path, True)
    with pytest.raises(Killed):
        staged(tmp_path, kill_at=9, rule="keep")
    with pytest.raises(ConfigError, match="made with rule keep, now eliminate"):
        staged(tmp_path, True, rule="eliminate")
    latest = max((tmp_path / "decisions").iterdir())
    (latest / "weights.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=f"{latest.name} cannot be used"):
        staged(tmp_path, True, rule="keep")
    with pytest.raises(Killed):  # another search, from its start: its stages alone stay
        staged(tmp_path, kill_at=8, rule="eliminate")
    assert [p.name for p in (tmp_path / "decisions").iterdir()] == ["01-embed_dim"]
