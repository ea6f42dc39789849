"""Run by the launcher on 2 ranks: what ZeRO-2 does to sampled and unsampled values, in numbers.

Every case prints one line `RESULT name {json}` on rank 0; the claims are checked by pytest.
"""

from __future__ import annotations

import copy
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
)
from torch.func import functional_call
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.conftest import randomise
from tests.small import small_config
from vimnas_ds.config import parse_config
from vimnas_ds.layout import Activation, ParamGrids
from vimnas_ds.ops._extension import available
from vimnas_ds.processes import end_process
from vimnas_ds.seeds import derive_seed
from vimnas_ds.train.alpha_step import AlphaLearner
from vimnas_ds.train.engine import Engine, build_engine, build_supernet
from vimnas_ds.train.ranks import RanksDisagree, check_agreement, start_ranks
from vimnas_ds.train.schedule import Drawer, Schedule
from vimnas_ds.train.step import WeightStepper

LR, STEPS = 1e-2, 8
ranks = start_ranks()
torch.set_num_threads(1)


def report(name: str, **values: object) -> None:
    if ranks.is_main:
        print("RESULT", name, json.dumps(values), flush=True)


def config_for(bf16: bool, clipping: float = 0.0, zero: dict | None = None):
    settings = {"bf16": {"enabled": bf16}, "gradient_clipping": clipping}
    if zero is not None:
        settings["zero_optimization"] = zero
    return parse_config(small_config(**settings))


def reference_zero() -> dict:
    """The reference runs' ZeRO settings, with buckets small enough that there are several."""
    text = (Path(__file__).resolve().parents[2] / "ds_configs" / "vitl.json").read_text()
    return {**json.loads(text)["zero_optimization"], "reduce_bucket_size": 5000}


def cell_slices(grids: ParamGrids, name: str) -> list[tuple[slice, ...]]:
    """Index expressions of all cells in the parameter's block view."""
    grid = grids.grids[name]
    return [
        tuple(slice(lo, hi) for lo, hi in zip(low, high, strict=True))
        for low, high in zip(grid.lows, grid.highs, strict=True)
    ]


def sampled_mask(name: str, shape: tuple[int, ...], activation: Activation) -> torch.Tensor:
    """What the step samples of a parameter, from its name alone: knows no layout of ours."""
    arch, mask = activation.archs[0], torch.zeros(shape, dtype=torch.bool)
    e, parts = arch.embed_dim, name.split(".")
    if parts[0] == "heads":
        if parts[1] == activation.dataset:
            mask[..., : (e if parts[-1] == "weight" else None)] = True
    elif parts[0] == "tokens":
        if not activation.is_image or parts[2] == "1":  # the image tube
            mask[:e] = True
    elif parts[0] == "norm":
        mask[:e] = True
    else:
        layer = int(parts[1])
        if layer < arch.depth:
            inner, hidden = 16 * arch.num_heads[layer], arch.hidden_dim(layer)
            kind = ".".join(parts[2:])
            blocks = {
                "attn.qkv.weight": (slice(None), slice(inner), slice(e)),
                "attn.qkv.bias": (slice(None), slice(inner)),
                "attn.proj.weight": (slice(e), slice(inner)),
                "mlp.fc1.weight": (slice(hidden), slice(e)),
                "mlp.fc1.bias": (slice(hidden),),
                "mlp.fc2.weight": (slice(e), slice(hidden)),
            }
            whole = kind.split(".")[1] in ("q_norm", "k_norm")
            mask[blocks.get(kind, (slice(None if whole else e),))] = True
    return mask


def batch(step: int, dataset: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + ranks.rank)
    shape = (4, 3, 32, 32) if dataset == "imagenet" else (4, 3, 8, 32, 32)
    classes = 7 if dataset == "imagenet" else 5
    x = torch.randn(shape, generator=generator).to(dtype)
    return x, torch.randint(0, classes, (4,), generator=generator)


def activation_of(step: int, engine: Engine) -> Activation:
    rng = random.Random(step)
    dataset = ("imagenet", "k400")[step % 2]
    return Activation((engine.net.space.sample(rng),), dataset, dataset == "imagenet")


def backward(engine: Engine, step: int, activation: Activation, scale: float = 1.0) -> None:
    x, y = batch(step, activation.dataset, engine.dtype)
    torch.manual_seed(1000 * step + ranks.rank)  # drop path
    logits = engine.deepspeed(x, activation.archs[0], activation.dataset)
    engine.deepspeed.backward(F.cross_entropy(logits.float(), y) * scale)


def snapshot(engine: Engine, fresh: bool = False) -> dict[str, dict[str, torch.Tensor]]:
    """Full weights, moments and counts by name, gathered over ranks. DeepSpeed links the moments
    at the first step: before it (`fresh`) they are zero."""
    found = {}
    for name, p in engine.net.named_parameters():
        found[name] = {"w": safe_get_full_fp32_param(p).clone()}
        for key in ("exp_avg", "exp_avg_sq"):
            full = None if fresh else safe_get_full_optimizer_state(p, key)
            found[name][key] = torch.zeros_like(found[name]["w"]) if fresh else full.clone()
        found[name]["count"] = torch.from_numpy(engine.optimizer.counts[name].copy())
    return found


def build(bf16: bool, clipping: float = 0.0, zero: dict | None = None) -> Engine:
    config = config_for(bf16, clipping, zero)
    net = build_supernet(config)
    randomise(net)
    return build_engine(config, ranks, net)


def differing(ours: torch.Tensor, reference: torch.Tensor, fused: bool) -> int:
    """Elements that differ: by a bit, or for the fused update by more than rounding."""
    if fused:
        # a weight of magnitude 1 that an update takes across zero keeps its rounding: 6e-8
        return int((~torch.isclose(ours, reference, rtol=1e-5, atol=1e-7)).sum())
    return int((ours != reference).sum())


def sampled_only(bf16: bool, fused: bool) -> None:
    """Frozen bits, and equality with torch.optim.AdamW run on every cell by itself."""
    engine = build(bf16, zero=reference_zero())
    engine.optimizer.fused = fused
    grids, net = engine.optimizer.grids, engine.net
    layouts = net.layouts()
    cells: dict[str, list[torch.nn.Parameter]] = {}
    groups = []
    for name, p in net.named_parameters():
        block = safe_get_full_fp32_param(p).view(layouts[name].shape)
        cells[name] = [torch.nn.Parameter(block[s].clone()) for s in cell_slices(grids, name)]
        groups.append({"params": cells[name], "name": name})
    reference = torch.optim.AdamW(groups, lr=LR, foreach=False)
    totals = dict.fromkeys(
        ("frozen", "frozen_changed", "sampled", "sampled_moved", "differ_w", "differ_m"), 0
    )
    totals["frozen_counts_changed"] = totals["idle_parameters"] = totals["count_wrong"] = 0
    before = snapshot(engine, fresh=True)
    for step in range(STEPS):
        activation = activation_of(step, engine)
        decay = 0.05 if activation.is_image else 0.01
        backward(engine, step, activation)
        gradients = {n: safe_get_full_grad(p).clone() for n, p in net.named_parameters()}
        engine.optimizer.activate(activation, LR, decay)
        engine.deepspeed.step()
        engine.optimizer.deactivate()
        after = snapshot(engine)
        for group in reference.param_groups:
            group["weight_decay"] = decay if layouts[group["name"]].decay else 0.0
        masks = {}
        for name in grids.grids:
            shape = layouts[name].shape
            masks[name] = sampled_mask(name, shape, activation)
            totals["idle_parameters"] += not masks[name].any()
            for i, s in enumerate(cell_slices(grids, name)):
                grad, on = gradients[name].view(shape)[s], masks[name][s]
                assert on.all() == on.any(), f"{name}: a cell is sampled in part"
                cells[name][i].grad = grad.clone().float() if on.all() else None
        reference.step()
        for name in grids.grids:
            shape, mask = layouts[name].shape, masks[name]
            on = [bool(mask[s].all()) for s in cell_slices(grids, name)]
            for key in ("w", "exp_avg", "exp_avg_sq"):
                a, b = before[name][key].view(shape), after[name][key].view(shape)
                totals["frozen_changed"] += int((a[~mask] != b[~mask]).sum())
                totals["frozen"] += int((~mask).sum())
            totals["sampled_moved"] += int(
                (before[name]["w"].view(shape)[mask] != after[name]["w"].view(shape)[mask]).sum()
            )
            grown = after[name]["count"] - before[name]["count"]
            totals["frozen_counts_changed"] += int((grown != torch.tensor(on).long()).sum())
            for i, s in enumerate(cell_slices(grids, name)):
                ours = after[name]
                totals["differ_w"] += differing(ours["w"].view(shape)[s], cells[name][i], fused)
                state = reference.state.get(cells[name][i])
                if on[i]:
                    totals["sampled"] += cells[name][i].numel()
                if state:
                    for key in ("exp_avg", "exp_avg_sq"):
                        totals["differ_m"] += differing(ours[key].view(shape)[s], state[key], fused)
                    totals["count_wrong"] += int(ours["count"][i]) != int(state["step"])
        before = after
    name = f"sampled_only_{'bf16' if bf16 else 'fp32'}"
    report(f"{name}_fused" if fused else name, **totals)


def stock_adamw() -> None:
    """The control: a stock AdamW under ZeRO-2 moves what was not sampled."""
    import deepspeed

    config = config_for(False)
    net = build_supernet(config)
    randomise(net)
    stock = torch.optim.AdamW(net.parameters(), lr=LR)
    settings = config.deepspeed_dict(ranks.world_size, has_gpu=False)
    raw, *_ = deepspeed.initialize(model=net, optimizer=stock, config=settings)
    engine = Engine(raw, raw.module, stock, torch.float32)  # type: ignore[arg-type]
    grids = ParamGrids(net.layouts(), net.space)
    changed = 0
    for step in range(4):
        activation = activation_of(step, engine)
        backward(engine, step, activation)
        before = {n: safe_get_full_fp32_param(p).clone() for n, p in net.named_parameters()}
        raw.step()
        for name, p in net.named_parameters():
            shape = grids.grids[name].layout.shape
            frozen = ~sampled_mask(name, shape, activation)
            after = safe_get_full_fp32_param(p).view(shape)
            changed += int((before[name].view(shape)[frozen] != after[frozen]).sum())
    report("stock_adamw", frozen_changed=changed)


def alpha_and_skip(bf16: bool) -> None:
    """An alpha step moves alphas, equally on all ranks, and no weight; a NaN moves nothing."""
    engine = build(bf16)
    learner = AlphaLearner(engine.net.space, config_for(bf16).vimnas.alpha, 0, ranks)
    for step in range(2):
        activation = activation_of(step, engine)
        backward(engine, step, activation)
        engine.optimizer.activate(activation, LR, 0.05)
        engine.deepspeed.step()
    before, old = snapshot(engine), learner.alphas.state_dict()
    for step in range(2):
        dataset = ("imagenet", "k400")[step % 2]
        learner.step(engine.net, *batch(50 + step, dataset, engine.dtype), dataset)
    after = snapshot(engine)
    moved = sum(int((before[n][k] != after[n][k]).sum()) for n in before for k in before[n])
    alphas = torch.cat([a.detach() for a in learner.alphas])
    gathered = [torch.empty_like(alphas) for _ in range(ranks.world_size)]
    dist.all_gather(gathered, alphas)
    alphas_moved = sum(int((old[n] != v).sum()) for n, v in learner.alphas.values.items())
    weights = {id(p) for g in engine.optimizer.param_groups for p in g["params"]}
    # the next weight step must be what it would have been: no validation gradient left behind
    activation = activation_of(2, engine)
    backward(engine, 2, activation)
    leftovers = {n: safe_get_full_grad(p).clone() for n, p in engine.net.named_parameters()}
    engine.optimizer.activate(activation, LR, 0.05)
    engine.deepspeed.step()
    twin = build(bf16)
    for step in range(2):
        activation = activation_of(step, twin)
        backward(twin, step, activation)
        twin.optimizer.activate(activation, LR, 0.05)
        twin.deepspeed.step()
    backward(twin, 2, activation_of(2, twin))
    different = sum(
        int((safe_get_full_grad(p) != leftovers[n]).sum()) for n, p in twin.net.named_parameters()
    )
    twin.optimizer.activate(activation_of(2, twin), LR, 0.05)
    twin.deepspeed.step()
    # a NaN on one rank only: the step is skipped on all, counts included
    before = snapshot(twin)
    backward(twin, 3, activation_of(3, twin), scale=float("nan") if ranks.rank == 1 else 1.0)
    twin.optimizer.activate(activation_of(3, twin), LR, 0.05)
    twin.deepspeed.step()
    after = snapshot(twin)
    report(
        f"alpha_{'bf16' if bf16 else 'fp32'}",
        weights_moved=moved,
        alphas_moved=alphas_moved,
        alphas=alphas.numel(),
        same_on_ranks=torch.equal(gathered[0], gathered[1]),
        alpha_in_weight_optimizer=any(id(a) in weights for a in learner.alphas),
        alpha_dtype=str(alphas.dtype),
        next_gradient_differs=different,
        nan_applied=twin.was_applied,
        nan_moved=sum(int((before[n][k] != after[n][k]).sum()) for n in before for k in before[n]),
    )


def clipped() -> None:
    """The update is AdamW's on the gradient of the active part, scaled to the clip norm."""
    engine = build(False, clipping=0.1)
    layouts, activation = engine.net.layouts(), activation_of(1, engine)
    backward(engine, 1, activation)
    active = {}
    for name, p in engine.net.named_parameters():
        mask = sampled_mask(name, layouts[name].shape, activation).view(p.shape)
        active[name] = safe_get_full_grad(p).clone() * mask
    before = snapshot(engine, fresh=True)
    engine.optimizer.activate(activation, LR, 0.0)
    engine.deepspeed.step()
    after = snapshot(engine)
    norm = float(sum(g.double().square().sum() for g in active.values()) ** 0.5)
    wrong = frozen_moved = 0
    for name, gradient in active.items():
        g = gradient * (0.1 / norm)
        update = LR * g / (g.abs() + 1e-8)  # AdamW's first
        expected = {"exp_avg": 0.1 * g, "w": before[name]["w"] - update}
        mask = sampled_mask(name, layouts[name].shape, activation).view(g.shape)
        for key, value in expected.items():
            close = torch.isclose(after[name][key], value, rtol=1e-4, atol=1e-7)
            # where a gradient is near AdamW's eps its direction is all in the rounding
            wrong += int((~close & mask & ((g.abs() > 1e-6) | (key != "w"))).sum())
            frozen_moved += int((after[name][key] != before[name][key])[~mask].sum())
    report(
        "clipped",
        norm=float(engine.deepspeed.get_global_grad_norm()),
        active_norm=norm,
        wrong=wrong,
        frozen_moved=frozen_moved,
    )


def sandwich(bf16: bool, distill: bool) -> None:
    """A whole weight step of four sub-networks against dense gradients: each sub-network's own
    forward and backward in plain torch, the gradients added up and averaged over ranks."""
    raw = small_config(bf16={"enabled": bf16})
    raw["vimnas"]["sandwich"] = {"random": 2, "distill": distill}
    raw["vimnas"]["model"] |= {"drop_path": 0.5, "activation_checkpointing": not distill}
    config = parse_config(raw)
    net = build_supernet(config)
    randomise(net)
    dense = copy.deepcopy(net)
    if bf16:  # the weights that the network has, the arithmetic exact
        dense = dense.bfloat16().float()
    engine = build_engine(config, ranks, net)
    schedule = Schedule.build(config, {"imagenet": 8, "k400": 8})
    context = Drawer(schedule, net.space, {"imagenet": True, "k400": False}, 0, None, 2).draw()
    x, y = batch(0, context.dataset, torch.float32)
    loaders = SimpleNamespace(
        batch=lambda *_: SimpleNamespace(x=x.clone(), y=y), give_up=lambda: False
    )
    stepper = WeightStepper(config, engine, loaders, ranks)  # type: ignore[arg-type]
    result = stepper.step(context, LR)

    largest, *others = context.archs
    if bf16:
        x = x.bfloat16().float()
    torch.manual_seed(derive_seed("step", 0, context.cursor, ranks.rank))
    teacher = dense.train()(x, largest, context.dataset)
    first = F.cross_entropy(teacher, y)
    first.backward()
    alone = {n: p.grad.clone() for n, p in dense.named_parameters() if p.grad is not None}
    soft = teacher.detach().softmax(-1)
    dense.eval()  # no drop path
    for arch in others:
        log_p = dense(x, arch, context.dataset).log_softmax(-1)
        loss = -(soft * log_p).sum(-1).mean() if distill else F.nll_loss(log_p, y)
        loss.backward()
    square = {"error": 0.0, "error_of_largest_alone": 0.0, "all": 0.0}
    untouched = 0
    for (name, ours), p in zip(net.named_parameters(), dense.parameters(), strict=True):
        moment = safe_get_full_optimizer_state(ours, "exp_avg")
        if p.grad is None:
            untouched += int((moment != 0).sum())
            continue
        dist.all_reduce(p.grad)
        dist.all_reduce(alone[name])
        expected, ours_found = p.grad / ranks.world_size, moment / 0.1  # a first moment
        square["error"] += float((ours_found - expected).square().sum())
        square["error_of_largest_alone"] += float(
            (alone[name] / ranks.world_size - expected).square().sum()
        )
        square["all"] += float(expected.square().sum())
    report(
        f"sandwich_{'bf16' if bf16 else 'fp32'}_{'distilled' if distill else 'labels'}",
        archs=len(context.archs),
        error=(square["error"] / square["all"]) ** 0.5,
        error_of_largest_alone=(square["error_of_largest_alone"] / square["all"]) ** 0.5,
        untouched_moved=untouched,
        loss_differs=abs(float(result.loss) - float(first)),
        correct=int(result.correct) == int((teacher.argmax(-1) == y).sum()),
    )


def moving_average(bf16: bool) -> None:
    """The average of every cell against its definition; frozen cells keep their bits; evaluating
    with it leaves no trace."""
    engine, decay = build(bf16), 0.3
    engine.optimizer.start_ema(decay)
    grids, net = engine.optimizer.grids, engine.net
    layouts = net.layouts()
    expected = {n: w["w"] for n, w in snapshot(engine, fresh=True).items()}
    found = engine.ema_weights(keep=True)
    totals = {"start_differs": sum(int((found[n] != expected[n]).sum()) for n in found)}
    totals |= dict.fromkeys(("frozen_changed", "moved", "wrong"), 0)
    counts = {name: [0] * len(grid) for name, grid in grids.grids.items()}
    for step in range(6):
        activation = activation_of(step, engine)
        backward(engine, step, activation)
        engine.optimizer.activate(activation, LR, 0.05)
        engine.deepspeed.step()
        before, found, weights = found, engine.ema_weights(keep=True), engine.weights(keep=True)
        for name in grids.grids:
            shape = layouts[name].shape
            mask = sampled_mask(name, shape, activation)
            old, new, w = (t[name].view(shape) for t in (before, found, weights))
            reference = expected[name].view(shape)
            totals["frozen_changed"] += int((old != new)[~mask].sum())
            totals["moved"] += int((old != new)[mask].sum())
            for i, s in enumerate(cell_slices(grids, name)):
                if mask[s].all():
                    counts[name][i] += 1
                    n = counts[name][i]
                    d = min(decay, (1 + n) / (10 + n))
                    reference[s] = d * reference[s] + (1 - d) * w[s]
            totals["wrong"] += int((~torch.isclose(new, reference, rtol=1e-5, atol=1e-7)).sum())
    x, _ = batch(99, "k400", engine.dtype)
    arch, own = net.space.largest(), {n: p.clone() for n, p in net.named_parameters()}
    net.eval()
    cast = {name: average.to(engine.dtype) for name, average in found.items()}
    with torch.no_grad():
        by_hand = functional_call(net, cast, (x, arch, "k400"))
        with engine.averaged():
            inside = net(x, arch, "k400")
        outside = net(x, arch, "k400")
    net.train()
    masters = engine.weights(keep=True)
    totals["masters_changed"] = sum(int((masters[n] != weights[n]).sum()) for n in masters)
    totals["own_changed"] = sum(int((p != own[n]).sum()) for n, p in net.named_parameters())
    backward(engine, 6, activation_of(6, engine), float("nan") if ranks.rank == 1 else 1.0)
    engine.optimizer.activate(activation_of(6, engine), LR, 0.05)
    engine.deepspeed.step()
    after = engine.ema_weights(keep=True)
    totals["moved_by_nan"] = sum(int((after[n] != found[n]).sum()) for n in found)
    report(
        f"ema_{'bf16' if bf16 else 'fp32'}",
        **totals,
        evaluated_with_it=torch.equal(inside, by_hand) and not torch.equal(inside, outside),
        kept_by_others=len(engine.ema_weights(keep=False)),
    )


def agreement() -> None:
    caught = ""
    check_agreement(7, "same", ranks)
    try:
        check_agreement(7 + ranks.rank, "step 3", ranks)
    except RanksDisagree as err:
        caught = str(err)
    report("agreement", caught=caught)


if __name__ == "__main__":
    for bf16 in (False, True):
        sampled_only(bf16, fused=False)
        if available():
            sampled_only(bf16, fused=True)
        alpha_and_skip(bf16)
        sandwich(bf16, distill=True)
        sandwich(bf16, distill=False)
        moving_average(bf16)
    clipped()
    stock_adamw()
    agreement()
    dist.barrier()  # or the first to leave takes the store from the others
    end_process(0)
