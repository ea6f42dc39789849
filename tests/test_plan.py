"""What a run will need: closed forms against models, what autograd keeps, and real files."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scripts import plan as script
from tests.conftest import ROOT, SMALL_TUBES, clip_batch, image_batch
from tests.small import small_config
from vimnas_ds.config import ConfigError, load_config, parse_config
from vimnas_ds.cost import Layout, count_macs, count_params
from vimnas_ds.gpus import GPUS
from vimnas_ds.model import attention as backends
from vimnas_ds.model import block, layers
from vimnas_ds.model.alphas import Alphas
from vimnas_ds.model.options import ModelOptions
from vimnas_ds.model.supernet import Supernet
from vimnas_ds.ops._extension import available
from vimnas_ds.ops.sliced_linear import sliced_linear_ref
from vimnas_ds.space import SPACES, Arch
from vimnas_ds.train.dry_run import model_layout
from vimnas_ds.training_cost import Input, Traffic, checkpoint_bytes, mean_params, num_alphas
from vimnas_ds.training_memory import Activations, ZeroStates, layer_params, supernet_params
from vimnas_ds.training_plan import Machines, Plan

NANO = SPACES["nano"]
LAYOUTS = [
    Layout(SMALL_TUBES, NANO.head_dim),
    Layout(SMALL_TUBES, NANO.head_dim, qk_norm=True, layer_scale=True),
]
CLASSES = {"imagenet": 7, "k400": 5}
VITL = ROOT / "ds_configs/vitl.json"
SIZES = {"imagenet": 1_217_109, "k400": 228_414, "k600": 347_706, "ssv2": 160_467}


def build(layout: Layout, checkpointing: bool = False) -> Supernet:
    torch.manual_seed(0)
    scale = 0.5 if layout.layer_scale else None
    options = ModelOptions(layout.qk_norm, scale, 0.0, checkpointing)
    return Supernet(NANO, SMALL_TUBES, CLASSES, options).train()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_are_the_supernets(layout):
    net = build(layout)
    assert supernet_params(NANO, CLASSES, layout) == sum(p.numel() for p in net.parameters())
    own = sum(p.numel() for p in net.blocks[1].parameters())
    assert layer_params(NANO, 1, layout) == own


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("frames", [None, 8])
def test_means_are_those_of_all_sub_networks(layout, frames):
    """Decisions are uniform, members are not: one of depth 3 shares its place with more others."""
    shares = {d: math.prod([1 / 4] * d) / 6 for d in NANO.depth}  # 4 choices a layer, 3 x 2 outside
    params = macs = 0.0
    for arch in NANO.members():
        params += shares[arch.depth] * count_params(arch, 7, layout)
        macs += shares[arch.depth] * count_macs(arch, 7, layout, frames=frames, size=32)
    assert sum(shares[arch.depth] for arch in NANO.members()) == pytest.approx(1)
    assert mean_params(NANO, 7, layout) == pytest.approx(params)
    assert Input(layout, frames, 32, 7).mean_macs(NANO).total == pytest.approx(macs)


def test_means_agree_with_a_large_sample():
    layout, rng, space = Layout(), random.Random(0), SPACES["vit_l"]
    sample = Input(layout, 64, 224, 400)
    step = Activations(layout, 64, 224, 4)
    drawn = [space.sample(rng) for _ in range(2000)]

    def kept(arch: Arch) -> float:
        whole = zip(arch.num_heads, map(arch.hidden_dim, range(arch.depth)), strict=True)
        stem = step.patches() + step.rows * arch.embed_dim * 2
        return stem + sum(step.layer(arch.embed_dim, h, f) for h, f in whole)

    for mean, values in (
        (mean_params(space, 400, layout), [count_params(a, 400, layout) for a in drawn]),
        (
            sample.mean_macs(space).total,
            [count_macs(a, 400, layout, frames=64, size=224) for a in drawn],
        ),
        (step.kept(space), [kept(a) for a in drawn]),
    ):
        error = statistics.stdev(values) / math.sqrt(len(values))
        assert abs(statistics.mean(values) - mean) < 4 * error
        assert error < 0.01 * mean


@pytest.mark.parametrize("frames", [None, 8])
def test_flops_are_those_of_deepspeeds_profiler(frames, monkeypatch):
    """It counts what goes through torch.nn.functional, so the references do the work here."""
    from deepspeed.profiling.flops_profiler import FlopsProfiler

    def mlp(x: Tensor, first, second, hidden: int, out: int) -> Tensor:
        (h,) = sliced_linear_ref(x, *first, hidden, gelu=True)
        return sliced_linear_ref(h, *second, out)[0]

    monkeypatch.setattr(layers, "sliced_linear", sliced_linear_ref)
    monkeypatch.setattr(block, "sliced_mlp", mlp)
    layout, arch = LAYOUTS[0], Arch(48, 3, (2, 1, 2), (4, 2, 2))
    net, x = build(layout), image_batch() if frames is None else clip_batch()
    name = "imagenet" if frames is None else "k400"
    profiler = FlopsProfiler(net)
    backends._resolved.cache_clear()  # it is to find the profiler's functions
    profiler.start_profile()
    net(x, arch, name)
    counted = profiler.get_total_macs()
    profiler.end_profile()
    backends._resolved.cache_clear()
    macs = Input(layout, frames, 32, CLASSES[name]).macs(arch)
    assert macs.total == count_macs(arch, CLASSES[name], layout, frames=frames, size=32)
    assert counted == len(x) * macs.total


@pytest.mark.parametrize("frames", [None, 8])
def test_backward_costs_the_products_that_it_does(frames, monkeypatch):
    """torch's own counter, which sees the dispatched products of forward and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(layers, "sliced_linear", sliced_linear_ref)
    monkeypatch.setattr(
        block,
        "sliced_mlp",
        lambda x, first, second, hidden, out: sliced_linear_ref(
            sliced_linear_ref(x, *first, hidden, gelu=True)[0], *second, out
        )[0],
    )
    layout, x = LAYOUTS[0], image_batch() if frames is None else clip_batch()
    net, arch, name = build(layout), NANO.largest(), "imagenet" if frames is None else "k400"
    macs, y = Input(layout, frames, 32, CLASSES[name]).macs(arch), torch.zeros(3, dtype=torch.long)
    alphas = Alphas(NANO, 1e-3, torch.Generator())
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as weights:
            F.cross_entropy(net(x, arch, name), y).backward()
        with FlopCounterMode(display=False) as architecture:
            logits = net.superposed(x, alphas.probabilities(), name)
            torch.autograd.grad(F.cross_entropy(logits, y), list(alphas))
    assert weights.get_total_flops() == 3 * macs.weight_step(False)
    # the masses are small products of their own: K x channels, forward and backward
    assert architecture.get_total_flops() == pytest.approx(3 * macs.alpha_step(False), rel=0.01)


def kept_bytes(net: nn.Module, run) -> int:
    """Bytes of the storages that autograd keeps, the parameters' left out."""
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = run()
    assert output.requires_grad
    return sum(held.values())


@pytest.mark.skipif(not available(), reason="the model is of the compiled operators")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("superposed", [False, True])
def test_activations_are_the_tensors_that_autograd_keeps(layout, superposed):
    """A layer is the difference between two depths; a mistake of one tensor is an error of 5 %."""
    net, x, step = build(layout), clip_batch(), Activations(layout, 8, 32, 3, 4)
    alphas = Alphas(NANO, 0.5, torch.Generator().manual_seed(0))

    def kept(depth: int) -> int:
        arch = Arch.uniform(64, depth, 2, 4)
        if not superposed:
            return kept_bytes(net, lambda: net(x, arch, "k400"))
        p = alphas.probabilities()
        depths = (depth,)
        return kept_bytes(
            net, lambda: net.finish(net.advance(net.start(x), p, depths, 2 * depth), p, "k400")
        )

    layer = step.superposed_layer if superposed else step.layer
    # masses and dropped branches' factors are below a percent
    assert kept(3) - kept(2) == pytest.approx(layer(64, 2, 256), rel=0.02)
    if not superposed:
        whole = step.patches() + 3 * layer(64, 2, 256) + step.rows * 64 * 4
        assert kept(3) == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_peak_is_found_layer_by_layer(depth):
    """Nothing can be larger than all kept, all gradients and the largest transient together."""
    step = Activations(LAYOUTS[0], 8, 32, 3, 4)
    arch = Arch.uniform(64, depth, 2, 4)
    kept = step.patches() + step.rows * 64 * 4 + depth * step.layer(64, 2, 256)
    first = kept + step.transient(64, 2, 256)
    assert step.weight_peak(arch, lambda layer: (0, 0)) == first
    stay = step.weight_peak(arch, lambda layer: (1e9, 1e9))
    assert stay == pytest.approx((depth + 1) * 1e9, rel=0.01)  # at the end all gradients are there
    slim = replace(step, checkpointing=True)
    assert slim.weight_peak(arch, lambda layer: (0, 0)) <= first


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_sandwich_keeps_all_of_its_passes(checkpointing):
    """And each layer's gradient waits for the last pass that adds to it."""
    step = Activations(LAYOUTS[0], 8, 32, 3, 4, checkpointing)
    large, small = NANO.largest(), NANO.smallest()
    free = [0.0] * (NANO.max_depth + 1)
    peaks = {arch: step.weight_peak(arch, lambda layer: (0, 0)) for arch in (large, small)}
    assert step.sandwich_peak([large], free) == peaks[large]
    both = step.sandwich_peak([large, small], free)
    assert both == max(step.held(large) + peaks[small], peaks[large])
    three = step.sandwich_peak([large, small, large], free)
    assert three == step.held(large) + step.held(small) + peaks[large]
    heavy = step.sandwich_peak([large, small], [1e9] * len(free))
    # the layers' own gradients once more, while the last pass makes them
    assert heavy == pytest.approx(1e9 * (len(free) + 1), rel=0.01)


@pytest.mark.skipif(not available(), reason="the model is of the compiled operators")
def test_a_sandwich_keeps_what_autograd_keeps_of_it():
    layout = LAYOUTS[0]
    net, x, step = build(layout), clip_batch(), Activations(layout, 8, 32, 3, 4)
    archs = NANO.largest(), NANO.smallest()
    kept = kept_bytes(net, lambda: net(x, archs, "k400"))
    assert kept == pytest.approx(sum(map(step.held, archs)), rel=0.02)


@pytest.mark.endurance
def test_an_unfitted_size_is_predicted_within_ten_percent():
    command = [sys.executable, str(ROOT / "scripts/bench_plan.py")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert float(done.stdout.split()[-3]) < 1.10, done.stdout


def machines(**changes) -> Machines:
    where = Machines(GPUS["a100-40"], 8, 1, 0.4, 25e9, 3e9, 2)
    return replace(where, **changes)


def vitl(*overrides: str, **changes) -> Plan:
    config = load_config(VITL, list(overrides))
    return Plan(config, model_layout(config), SIZES, machines(**changes))


def test_switches_whose_memory_is_not_modelled_have_no_plan():
    vitl("vimnas.model.class_token=true")
    with pytest.raises(ConfigError, match=r'vimnas\.model\.gelu "erf".* is not modelled'):
        vitl("vimnas.model.gelu=erf")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_largest_micro_batch_fits_and_one_more_does_not(checkpointing):
    plan = vitl()
    room = plan.where.gpu.memory - plan.where.reserve
    for dataset in plan.datasets:
        most = plan.largest_micro(dataset, checkpointing)
        totals = [plan.memory(dataset, m, checkpointing).total for m in (1, most, most + 1)]
        assert totals == sorted(totals)
        assert totals[1] <= room < totals[2]
        assert vitl(gpu=GPUS["h200"]).largest_micro(dataset, checkpointing) > most
    assert plan.largest_micro("k400", True) > plan.largest_micro("k400", False)
    assert vitl(reserve=39e9).largest_micro("k400", True) == 0


def test_more_nodes_share_the_work_and_the_states():
    one, four = vitl(), vitl(nodes=4)
    assert four.days(True) == pytest.approx(one.days(True) / 4)
    assert four.states.moments == pytest.approx(one.states.moments / 4, rel=1e-6)
    assert four.states.weights == pytest.approx(one.states.weights, rel=1e-6)
    assert four.micro == one.micro / 4
    there, here = four.step("k400", True), one.step("k400", True)
    assert there.traffic_seconds == pytest.approx(there.traffic.total / 25e9)
    assert here.traffic_seconds == pytest.approx(here.traffic.total / 300e9)
    assert there.samples_per_second == pytest.approx(4 * here.samples_per_second)


def test_the_run_is_the_sum_of_its_steps():
    plan = vitl()
    total = 0.0
    for steps, shares in plan.phases().values():
        for name, share in shares.items():
            total += steps * share * plan.step(name, True).seconds
    assert plan.days(True) == pytest.approx(total / 86400)
    assert sum(steps for steps, _ in plan.phases().values()) == plan.schedule.total_steps
    assert plan.days(True, alphas=False) == pytest.approx(
        vitl("vimnas.alpha.enabled=false").days(True)
    )
    half = vitl("vimnas.alpha.every=2")
    assert half.days(True) == pytest.approx((plan.days(True) + plan.days(True, alphas=False)) / 2)
    needed = plan.paper_efficiency(True)
    assert needed is not None
    assert vitl(efficiency=needed[1]).days(True) == pytest.approx(5)


def test_a_sandwich_costs_its_passes():
    plain, plan = vitl(), vitl('vimnas.sandwich={"random": 3}')
    data = plan.datasets["k400"]
    sample = Input(plan.layout, data.frames, data.size, data.num_classes)
    passes = [sample.macs(plan.space.largest()), sample.macs(plan.space.smallest())]
    passes += [sample.mean_macs(plan.space)] * 3
    flops = 256 * sum(one.weight_step(True) for one in passes)
    assert plan.step("k400", True).weight_flops == pytest.approx(flops)
    assert plan.step("k400", True).alpha_flops == plain.step("k400", True).alpha_flops
    assert plan.step("k400", True).traffic.gradients > plain.step("k400", True).traffic.gradients
    for checkpointing in (False, True):
        here, there = (p.memory("k400", 8, checkpointing) for p in (plan, plain))
        # one layer is computed again at a time, however many passes there are
        assert here.weight_peak > (2.5 if checkpointing else 4) * there.weight_peak
        assert here.kept > 4 * there.kept
    alone = json.dumps(json.loads(plan.space.largest().to_json()))
    assert vitl("vimnas.sandwich={}", f"vimnas.arch={alone}").passes == ((), 1)


def test_what_the_configuration_adds_is_planned():
    plain, average = vitl(), vitl("vimnas.ema={}")
    assert average.states.total() == plain.states.total() + plain.states.masters
    assert average.checkpoint_bytes > plain.checkpoint_bytes
    all_reduced = vitl("zero_optimization.reduce_scatter=false").step("k400", True).traffic
    to_owners = plain.step("k400", True).traffic
    assert plain.to_owners
    assert all_reduced.gradients == 2 * to_owners.gradients
    unguarded = vitl("vimnas.guard.enabled=false")
    assert plain.disk_bytes == unguarded.disk_bytes + 3 * plain.checkpoint_bytes


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("vimnas.schedule.epochs=60", "60 epochs instead of 500"),
        ("vimnas.alpha.every=2", "alpha steps thinned out"),
        ("vimnas.alpha.enabled=false", "alpha steps off"),
        ("vimnas.sandwich={}", "several sub-networks a step"),
    ],
)
def test_another_run_than_the_papers_reproduces_nothing(override, said, capsys):
    assert script.main(["--deepspeed_config", str(VITL), "--gpu", "h200", "--set", override]) == 0
    told = capsys.readouterr().out
    assert said in told
    assert "eproduced" not in told
    assert vitl().not_the_papers() == []
    config = load_config(VITL)
    few = Plan(config, model_layout(config), SIZES | {"k400": 1000}, machines())
    assert few.not_the_papers() == ["1,000 files of k400 instead of 240,436"]


def test_traffic_is_that_of_a_ring():
    to_owners = Traffic.of(1000, 1600, 10, 8, 2, True)
    assert (to_owners.gradients, to_owners.weights, to_owners.alphas) == (1750, 2800, 70)
    assert Traffic.of(1000, 1600, 10, 8, 2, False).gradients == 3500
    assert Traffic.of(1000, 1600, 10, 1, 2, True).total == 0
    assert to_owners.seconds(1.0, None, 8) == to_owners.total
    decisions = Alphas(NANO, 1e-3, torch.Generator())
    assert num_alphas(NANO) == sum(alpha.numel() for alpha in decisions)


@pytest.mark.slow
def test_a_checkpoint_is_as_large_as_planned(trained):
    config = load_config(trained.parent / "config.json")
    classes = {n: d.num_classes for n, d in config.vimnas.data.datasets.items()}
    params = supernet_params(config.vimnas.search_space, classes, model_layout(config))
    newest = max((trained / "checkpoints").glob("step*"))
    size = sum(file.stat().st_size for file in newest.iterdir())
    assert config.vimnas.ema is not None
    planned = checkpoint_bytes(params, ema=True)
    assert planned <= size < planned + 500_000  # update counts, random states, manifest


def test_states_add_up():
    zero = ZeroStates(1001, 8, 2, 100, True)
    assert zero.share == 126  # 1008 / 8: padded to two a process
    assert (zero.weights, zero.masters, zero.moments, zero.gradients) == (2016, 504, 1008, 504)
    assert zero.buckets == 400
    assert zero.total() == 2016 + 504 + 1008 + 504 + 400
    assert replace(zero, ema=True).total() == zero.total() + 504


STATES = """
import json, sys, torch
from tests.small import small_config
from torch.nn import functional as F
from vimnas_ds.config import parse_config
from vimnas_ds.layout import Activation
from vimnas_ds.processes import end_process
from vimnas_ds.train.engine import build_engine
from vimnas_ds.train.ranks import start_ranks

config = parse_config(small_config(bf16={"enabled": True}))
engine = build_engine(config, start_ranks())
arch = config.vimnas.search_space.largest()
logits = engine.deepspeed(torch.randn(8, 3, 32, 32, dtype=engine.dtype), arch, "imagenet")
engine.deepspeed.backward(F.cross_entropy(logits.float(), torch.zeros(8, dtype=torch.long)))
zero = engine.deepspeed.optimizer
size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
moments = [v for s in engine.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
print(json.dumps({
    "weights": size(zero.bit16_groups_flat),
    "masters": size(zero.single_partition_of_fp32_groups),
    "moments": size(moments),
    "gradients": size(g.flat_partition for g in zero.averaged_gradients.values()),
}))
end_process(0)
"""


@pytest.mark.slow
def test_states_are_those_of_deepspeeds_engine():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", STATES], env=env, check=True, capture_output=True, text=True
    )
    config = parse_config(small_config())
    layout = model_layout(config)
    classes = {n: d.num_classes for n, d in config.vimnas.data.datasets.items()}
    zero = ZeroStates(supernet_params(NANO, classes, layout), 1)
    for name, size in json.loads(done.stdout.splitlines()[-1]).items():
        # two groups, decayed and not, are padded each
        assert size == pytest.approx(getattr(zero, name), abs=64), name


def test_the_script_says_what_is_not_reproduced(tmp_path, capsys):
    file = tmp_path / "plan.json"
    command = ["--deepspeed_config", str(VITL), "--gpu", "a100-40", "--json", str(file)]
    assert script.main(command) == 0
    told, found = capsys.readouterr().out, json.loads(file.read_text())
    assert "NOT reproduced" in told
    assert "NOT measured: anything on a GPU" in told
    assert "counted at the size of their public copies" in told
    assert found["paper"]["days"] == 5
    assert f"{found['days']['with_checkpointing']:.1f} days" in told
    memory = {m["checkpointing"]: m for m in found["datasets"]["k400"]["memory"]}
    assert memory[False]["total"] > memory[True]["total"]
    assert found["phases"]["joint"]["steps"] > found["phases"]["image"]["steps"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "vimnas.data.k400.reference_files=null"], "set vimnas.data.k400.root"),
        (["--gpus", "7"], "cannot be shared evenly by 7 processes"),
        (["--network", "0"], "--network must be positive"),
        (["--reserve", "nan"], "--reserve at least 0"),
        (["--set", "bf16.enabled=false"], "bf16.enabled is false"),
        (["--json", "/dev/null/plan.json"], "/dev/null"),
        (["--set", "vimnas.space=vit_x"], "is none of"),
    ],
)
def test_what_cannot_be_planned_is_said(options, said, capsys):
    assert script.main(["--deepspeed_config", str(VITL), *options]) == 2
    assert said in capsys.readouterr().err


def test_every_gpu_and_configuration_can_be_planned(capsys):
    configs = sorted(Path(ROOT / "ds_configs").glob("vit*.json"))
    assert len(configs) == 4
    for config, gpu in itertools.product(configs, GPUS):
        assert script.main(["--deepspeed_config", str(config), "--gpu", gpu]) == 0
    assert capsys.readouterr().out.count("largest micro batch") == 4 * len(GPUS)
