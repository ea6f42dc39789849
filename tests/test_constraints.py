"""Constraints against the enumeration of whole spaces, memory against measured peaks."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.small import small_config
from vimnas_ds.config import ConfigError, load_config, parse_config
from vimnas_ds.cost import Layout, count_params
from vimnas_ds.memory import Inference
from vimnas_ds.model.options import ModelOptions
from vimnas_ds.model.subnet import SubNetwork
from vimnas_ds.search import latency
from vimnas_ds.search.constraints import Constraints, Range, format_cost, parse_about
from vimnas_ds.search.latency import LatencyTable, fit, latency_table
from vimnas_ds.search.resources import UNITS, CostModel
from vimnas_ds.search.signatures import Signatures
from vimnas_ds.space import SPACES, Arch, SearchSpace
from vimnas_ds.train.dry_run import cost_of, model_layout
from vimnas_ds.train.ranks import Ranks
from vimnas_ds.tubes import TUBEVIT, TokenGeometry, Tube

NANO, CONFIG = SPACES["nano"], parse_config(small_config())
MEMBERS = list(NANO.members())
CPU = Ranks(0, 1, torch.device("cpu"))
#: layers whose choices differ: three values of heads in all, two at most in one layer
UNEVEN = SearchSpace(
    "uneven", (32, 48), (1, 2, 3), ((1, 2), (2, 4), (1,)), ((2, 4), (2,), (1.5, 2, 3)), 16
)


def planted_table(space: SearchSpace = NANO) -> LatencyTable:
    """Any numbers, not even rising with the widths."""
    rng, parts = random.Random(5), {}
    for e in space.embed_dim:
        parts[f"stem {e}"] = rng.randrange(100_000)
        for h in (1, 2, 4):
            parts[f"attention {e} {h}"] = rng.randrange(100_000)
        for r in (1.5, 2, 3, 4):
            parts[f"mlp {e} {int(e * r)}"] = rng.randrange(100_000)
    return LatencyTable({}, parts, [])


def planted_model(space: SearchSpace = NANO) -> CostModel:
    return CostModel(CONFIG, space, 2, 4, {"k400": planted_table(space)})


def direct(resource: str, arch: Arch) -> float:
    """On k400, without the decomposition into layers that the constraints rest on."""
    data, layout = CONFIG.vimnas.data.datasets["k400"], model_layout(CONFIG)
    if resource == "latency_ms":
        return planted_table().nanoseconds(arch) / 1e6
    if resource == "memory_mb":
        run = Inference(layout, data.frames, data.size, 64, 2, 4)
        peaks = [run.attention(arch.embed_dim, h) for h in arch.num_heads]
        peaks += [run.mlp(arch.embed_dim, arch.hidden_dim(i)) for i in range(arch.depth)]
        weights = 4 * count_params(arch, data.num_classes, layout)
        return (weights + run.resident() + max(run.stem(arch.embed_dim), *peaks)) / 2**20
    params, gflops = cost_of(CONFIG, arch, "k400")
    return params if resource == "params" else gflops


COSTS = {name: [direct(name, a) for a in MEMBERS] for name in UNITS}


def test_any_ranges_hold_exactly_the_members_that_enumeration_finds():
    """And where there are none, the message has the true reach of each while the others hold."""
    rng, model = random.Random(0), planted_model()
    empty = 0
    for _ in range(150):
        names = rng.sample(list(UNITS), rng.choice((1, 2, 3, 4)))
        ranges = []
        for name in names:
            middle, width = rng.choice(COSTS[name]), rng.choice((1e-4, 0.1, 0.4, 0.6))
            low = middle * rng.uniform(1 - width, 1 + width / 4)
            ranges.append(Range(name, "k400", low, low + middle * width * rng.random()))
        holds = [[r.low <= v <= r.high for v in COSTS[r.resource]] for r in ranges]
        expected = {a for a, *held in zip(MEMBERS, *holds, strict=True) if all(held)}
        if expected:
            found = Constraints(ranges, CONFIG, NANO, model)
            assert set(found.members or ()) == expected
            assert found.size == len(expected) == len(found.members or ())
            assert {a for a in MEMBERS if found.allow(a)} == expected
            continue
        empty += 1
        with pytest.raises(ConfigError) as caught:
            Constraints(ranges, CONFIG, NANO, model)
        for i, r in enumerate(ranges):
            others = [all(h[k] for h in holds[:i] + holds[i + 1 :]) for k in range(len(MEMBERS))]
            left = [
                v for v, o in zip(COSTS[r.resource], others, strict=True) if o or not any(others)
            ]
            ends = " to ".join(format_cost(r.resource, v) for v in (min(left), max(left)))
            assert f"{r.resource} (k400) {ends}" in str(caught.value)
            below, above = [v for v in left if v < r.low], [v for v in left if v > r.high]
            if any(others) and below and above:
                held = " while the others hold" if len(ranges) > 1 else ""
                gap = " and ".join(format_cost(r.resource, v) for v in (max(below), min(above)))
                words = f"{ends}{held}, with nothing between {gap}"
                assert words in str(caught.value)
    assert 30 < empty < 120  # both cases were met often


@pytest.mark.parametrize("space", [NANO, UNEVEN], ids=lambda s: s.name)
def test_members_inside_are_drawn_uniformly(space):
    model = planted_model(space)
    resource = model.resource("latency_ms", "k400")
    values = sorted(resource.value(a) for a in space.members())
    middle = Range("latency_ms", "k400", values[len(values) // 3], values[2 * len(values) // 3])
    inside = Constraints([middle], CONFIG, space, model)
    expected = {a for a in space.members() if inside.allow(a)}
    assert set(inside.members or ()) == expected
    rng = random.Random(0)
    draws = Counter(inside.sample(rng) for _ in range(60 * len(expected)))
    assert set(draws) == expected
    assert all(25 < count < 110 for count in draws.values())  # 60 +- 4.5 standard deviations


def test_signatures_count_every_member_of_every_space_once():
    for space in (*SPACES.values(), UNEVEN):
        found = Signatures(space)
        assert found.ways.sum() == pytest.approx(space.size(), rel=1e-12)
    members = [a for i in range(len(found.ways)) for a in found.members(i)]
    assert len(members) == len(set(members)) == UNEVEN.size()
    assert set(members) == set(UNEVEN.members())


def test_narrow_ranges_on_vit_l_are_found_or_answered_with_the_neighbours():
    """One parameter wide, with FLOPs and memory as narrow: 2e23 members, no luck needed."""
    config = load_config("ds_configs/vitl.json")
    space, rng = config.vimnas.search_space, random.Random(0)
    model = CostModel(config, space)
    for _ in range(5):
        planted = space.sample(rng)
        ranges = []
        for name, dataset in (("params", "imagenet"), ("gflops", "k400"), ("memory_mb", "ssv2")):
            value = model.resource(name, dataset).value(planted)
            ranges.append(Range(name, dataset, value, value))
        inside = Constraints(ranges, config, space)
        assert all(inside.allow(inside.sample(rng)) for _ in range(5))
    gap = Range("params", "imagenet", ranges[0].low + 1, ranges[0].low + 2)
    with pytest.raises(ConfigError, match="nothing between") as caught:
        Constraints([gap], config, space)
    below, above = re.findall(r"between ([\d,]+) and ([\d,]+)", str(caught.value))[0]
    assert float(below.replace(",", "")) == ranges[0].low
    for end in (below, above):  # both exist
        value = float(end.replace(",", ""))
        Constraints([Range("params", "imagenet", value, value)], config, space)


def test_about_is_two_percent_on_either_side():
    assert parse_about("23M", ("a", "b")) == Range("params", "a", 22.54e6, 23.46e6)
    assert parse_about("b=1k", ("a", "b")).dataset == "b"
    with pytest.raises(ConfigError, match="--about big: 'big' is not a number"):
        parse_about("big", ("a",))


def measured_peak(net: SubNetwork, x: torch.Tensor) -> int:
    """Bytes that torch's CPU allocator held at most during a forward pass, above those before."""
    with torch.no_grad():
        net(x, "data")  # positions are kept from here on
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            net(x, "data")
    events = [e.nbytes() for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(events))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    ("arch", "frames"),
    [
        (Arch.uniform(192, 3, 3, 3), None),  # the MLP decides
        (Arch(192, 3, (3, 4, 3), (3, 3, 4)), None),
        (Arch.uniform(96, 2, 6, 1), None),  # attention decides
        (Arch.uniform(192, 3, 3, 3), 32),  # the tubes decide
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_memory_is_within_a_tenth_of_the_measured_peak(arch, frames, batch, qk_norm):
    """Of activations alone: weights, input and positions would only flatter the comparison."""
    net = SubNetwork(arch, 64, TUBEVIT, {"data": 10}, ModelOptions(qk_norm, 0.1), 240).eval()
    x = torch.randn(batch, 3, *(() if frames is None else (frames,)), 224, 224)
    run = Inference(Layout(TUBEVIT, 64, qk_norm=qk_norm, layer_scale=True), frames, 224, 240, batch)
    e = arch.embed_dim
    peaks = [run.attention(e, h) for h in arch.num_heads]
    peaks += [run.mlp(e, arch.hidden_dim(i)) for i in range(arch.depth)]
    predicted = max(run.stem(e), *peaks)
    assert predicted == pytest.approx(measured_peak(net, x), rel=0.1)
    kept = [x, *net._positions.values()]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert run.resident() == sum(held.values())


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    ("arch", "batch"),
    [
        (Arch.uniform(192, 3, 3, 3), 1),  # the pairs of tokens decide
        (Arch.uniform(192, 3, 3, 3), 8),
        (Arch.uniform(96, 2, 6, 1), 8),  # the scores decide
    ],
)
def test_memory_with_relative_positions_is_the_measured_peak(arch, batch, qk_norm):
    options = ModelOptions(
        qk_norm, class_token=True, positions="learned", relative_positions=14, side=14
    )
    geometry = TokenGeometry((Tube((1, 16, 16), (1, 16, 16)),), 0)
    net = SubNetwork(arch, 64, geometry, {"data": 10}, options, 240).eval()
    layout = Layout(geometry, 64, "qkv", qk_norm, False, True, 197, 7680)
    run = Inference(layout, None, 224, 240, batch)
    x = torch.randn(batch, 3, 224, 224)
    predicted = max(run.attention(arch.embed_dim, h) for h in arch.num_heads)
    assert predicted == pytest.approx(measured_peak(net, x), rel=1e-3)
    assert run.resident() == x.nbytes  # positions are parameters


def test_a_latency_table_is_scaled_to_whole_networks_and_says_its_error():
    parts = planted_table().parts
    alone = LatencyTable({}, parts, [])
    archs = random.Random(1).sample(MEMBERS, 6)
    factors = (1.2, 1.3, 9.0, 1.3, 1.0, 1.3)  # the first three set the scale: 1.3
    wholes = {a: round(f * alone.nanoseconds(a)) for a, f in zip(archs, factors, strict=True)}
    table = fit({}, parts, wholes)
    for arch in MEMBERS:
        assert table.nanoseconds(arch) == pytest.approx(1.3 * alone.nanoseconds(arch), rel=1e-4)
    assert [c["arch"]["embed_dim"] for c in table.checks] == [a.embed_dim for a in archs[3:]]
    errors = [abs(c["predicted_ms"] / c["measured_ms"] - 1) for c in table.checks]
    assert errors == pytest.approx([0, 0.3, 0], abs=1e-3)
    assert table.error == pytest.approx(0, abs=1e-3)


def test_latency_is_measured_once_and_again_when_what_it_depends_on_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "ROUNDS", 1)
    monkeypatch.setattr(latency, "TURN", 1e-9)
    run = SimpleNamespace(
        config=CONFIG, ranks=CPU, dtype=torch.float32, files=SimpleNamespace(root=tmp_path)
    )
    before = torch.get_num_threads()
    first = latency_table(run, "k400", 2, 1)
    assert torch.get_num_threads() == before
    assert all(first.nanoseconds(a) > 0 for a in MEMBERS)  # no part is missing
    assert first.conditions["threads"] == 1
    assert first.conditions["torch"] == torch.__version__
    assert latency_table(run, "k400", 2, 1) == first  # the same numbers: it was read
    path = tmp_path / "latency" / "k400_batch2.json"
    planted = json.loads(path.read_text())
    planted["parts"] = planted_table().parts
    path.write_text(json.dumps(planted))
    assert latency_table(run, "k400", 2, 1).parts == planted_table().parts
    again = latency_table(run, "k400", 2, 2)
    assert again.conditions["threads"] == 2
    assert again.parts != planted_table().parts
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"k400_batch2.json is no latency table .* delete it"):
        latency_table(run, "k400", 2, 1)


def test_latency_that_was_not_measured_is_refused():
    with pytest.raises(ConfigError, match="latency of imagenet was not measured"):
        Constraints([Range("latency_ms", "imagenet", 0, 1)], CONFIG, NANO, planted_model())


def test_a_cover_of_a_cost_has_its_ends_and_no_hole():
    model = planted_model()
    resource = model.resource("params", "k400")
    inside = Constraints([Range("latency_ms", "k400", 0.1, 0.4)], CONFIG, NANO, model)
    costs = sorted(resource.value(a) for a in MEMBERS if inside.allow(a))
    found = inside.sample_along(resource, 12, random.Random(0))
    assert len(set(found)) == len(found) <= 12
    assert all(inside.allow(a) for a in found)
    values = [resource.value(a) for a in found]
    assert (min(values), max(values)) == inside.reach(resource) == (costs[0], costs[-1])
    step = (costs[-1] - costs[0]) / 10
    for i in range(10):
        low, high = costs[0] + i * step, costs[0] + (i + 1) * step
        if any(low < c < high for c in costs):
            assert any(low <= v <= high for v in values)
