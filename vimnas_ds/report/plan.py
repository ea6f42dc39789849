"""A plan in words and numbers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vimnas_ds.report.table import format_table
from vimnas_ds.training_plan import BF16, DAY, FLOAT, PAPER_GPU, PAPER_GPUS, Plan

GB = 1e9


def describe(plan: Plan, notes: str) -> str:
    """The whole page. `notes` says where the datasets' sizes are from."""
    parts = [_machines(plan), _states(plan), _activations(plan), _steps(plan), _run(plan, notes)]
    return "\n\n".join([*parts, _paper(plan), _basis(plan)])


def _machines(plan: Plan) -> str:
    where, gpu = plan.where, plan.where.gpu
    return (
        f"{plan.space.name} on {where.nodes} x {where.gpus} {gpu.name}: peak "
        f"{gpu.peak / 1e12:.0f} TFLOP/s (bf16, dense), {gpu.memory / GB:.0f} GB, link "
        f"{gpu.link / GB:.0f} GB/s a direction ({gpu.source})\n"
        f"supernet {plan.params / 1e6:,.1f} M parameters with all heads; a drawn sub-network has "
        f"{plan.mean_params / 1e6:,.1f} M on average\n"
        f"global batch {plan.config.global_batch}: {plan.micro} samples per GPU and step"
        f"{_sandwich(plan)}"
    )


def _sandwich(plan: Plan) -> str:
    fixed, drawn = plan.passes
    if not fixed:
        return ""
    return (
        f"\na sandwich: each step trains the largest, the smallest and {drawn} drawn sub-networks"
    )


def _states(plan: Plan) -> str:
    zero = plan.states
    parts: list[tuple[str, int]] = [
        ("weights, bf16, whole", zero.weights),
        ("masters, float32, 1/W", zero.masters),
        ("moments, float32, 1/W", zero.moments),
        ("gradients, float32, 1/W", zero.gradients),
        (f"{1 + zero.overlap} reduce bucket(s) of {zero.bucket:,} in bf16", zero.buckets),
        *([("moving average, float32, 1/W", zero.average)] if zero.ema else []),
        ("together", zero.total()),
    ]
    table = format_table(["ZeRO-2, one GPU", "GB"], [[n, f"{b / GB:.2f}"] for n, b in parts])
    return f"{table}\nthe all-gather writes into the weights: it takes no buffer of its own"


def _activations(plan: Plan) -> str:
    room = plan.where.gpu.memory - plan.where.reserve
    head = [
        "dataset", "checkpointing", "kept, mean", "weight step, largest", "alpha step",
        "inputs", "total", "fits", "largest micro batch",
    ]  # fmt: skip
    rows = []
    for name in plan.datasets:
        for checkpointing in (False, True):
            found = plan.memory(name, plan.micro, checkpointing)
            parts = (found.kept, found.weight_peak, found.alpha_peak, found.inputs, found.total)
            fits = "yes" if found.total <= room else "no"
            most = str(plan.largest_micro(name, checkpointing))
            switch = "on" if checkpointing else "off"
            rows.append([name, switch, *(f"{b / GB:.2f}" for b in parts), fits, most])
    own = "on" if plan.config.vimnas.model.activation_checkpointing else "off"
    return (
        f"memory of one GPU with {plan.micro} samples, GB (of {plan.where.gpu.memory / GB:.0f}, "
        f"{plan.where.reserve / GB:g} kept back); this configuration has checkpointing {own}\n"
        f"{format_table(head, rows)}\n"
        f"{_most(plan)}"
    )


def _most(plan: Plan) -> str:
    """One sentence: with which switch the recipe's micro batch fits."""
    most = {c: min(plan.largest_micro(n, c) for n in plan.datasets) for c in (False, True)}
    able = [("without", False), ("with", True)]
    return "; ".join(
        f"{word} checkpointing at most {most[c]} samples fit for every dataset, "
        f"{'enough' if most[c] >= plan.micro else f'not the {plan.micro} of the recipe'}"
        for word, c in able
    )


def _steps(plan: Plan) -> str:
    checkpointing = plan.config.vimnas.model.activation_checkpointing
    head = [
        "dataset", "weight TFLOP", "alpha TFLOP", "s/step", "without alpha", "loader samples/s",
        "a node", "sent GB", "its time, s",
    ]  # fmt: skip
    rows = []
    for name in plan.datasets:
        cost = plan.step(name, checkpointing)
        rows.append(
            [
                name,
                f"{cost.weight_flops / 1e12:,.1f}",
                f"{cost.alpha_flops / 1e12:,.1f}",
                f"{cost.seconds:.3f}",
                f"{cost.seconds_without_alpha:.3f}",
                f"{cost.samples_per_second:,.0f}",
                f"{cost.samples_per_second / plan.where.nodes:,.0f}",
                f"{cost.traffic.total / GB:.3f}",
                f"{cost.traffic_seconds:.4f}",
            ]
        )
    owners = "to its owner" if plan.to_owners else "to all (all-reduce)"
    return (
        f"a step at {plan.where.efficiency:.0%} of peak, mean over sub-networks, all processes "
        f"together (traffic: of each GPU; gradients are reduced {owners})\n"
        f"{format_table(head, rows)}"
    )


def _run(plan: Plan, notes: str) -> str:
    checkpointing = plan.config.vimnas.model.activation_checkpointing
    lines = [f"the run{notes}"]
    for name, (steps, shares) in plan.phases().items():
        for_each = {n: plan.step(n, checkpointing) for n in shares}
        seconds = sum(share * for_each[n].seconds for n, share in shares.items())
        bare = sum(share * for_each[n].seconds_without_alpha for n, share in shares.items())
        mixture = ", ".join(f"{n} {share:.1%}" for n, share in shares.items())
        lines.append(
            f"  {name} phase: {steps:,} steps of {seconds:.3f} s on average, "
            f"{steps * seconds / DAY:.1f} days (without alpha steps {bare:.3f} s, "
            f"{steps * bare / DAY:.1f} days; {mixture})"
        )
    for switch in (checkpointing, not checkpointing):
        word = "with" if switch else "without"
        lines.append(
            f"  {word} checkpointing: {plan.days(switch):.1f} days, "
            f"{plan.days(switch, alphas=False):.1f} without alpha steps"
        )
    traffic = plan.step(next(iter(plan.datasets)), checkpointing).traffic
    gather = traffic.weights / traffic.total if traffic.total else 0.0
    lines.append(
        f"  communication adds up to {plan.traffic_days(checkpointing):.2f} days where none of it "
        f"hides behind computing; {gather:.0%} of it, the all-gather after the update, never does"
    )
    lines.append(
        f"  a checkpoint takes {plan.checkpoint_bytes / GB:.2f} GB, all of the run's at most "
        f"{plan.disk_bytes / GB:.1f} GB at once"
    )
    return "\n".join(lines)


def _paper(plan: Plan) -> str:
    checkpointing = plan.config.vimnas.model.activation_checkpointing
    machine = f"{PAPER_GPUS} {PAPER_GPU.name}"
    found = plan.paper_efficiency(checkpointing)
    if found is None:
        return f"paper: 1 to 5 days on {machine}, by size; it gives no number for this run"
    days, needed = found
    if differs := plan.not_the_papers():
        return (
            f"paper: {days:g} day(s) on {machine}, searching and training, of a run that this one "
            f"is not: {'; '.join(differs)}. No comparison is made"
        )
    assumed, whole = plan.where.efficiency, plan.flops(checkpointing)
    told = "reproduced" if needed <= assumed else "NOT reproduced"
    verdict = f"{'no GPU gives' if needed > 1 else 'they need'} the {needed:.0%} of peak"
    variants = ", ".join(
        f"{needed * plan.flops(c, alphas) / whole:.0%} {'with' if c else 'without'} checkpointing "
        f"{'and with' if alphas else 'and without'} alpha steps"
        for c in (True, False)
        for alphas in (True, False)
    )
    return (
        f"paper: {days:g} day(s) on {machine}, searching and training. {told} under these "
        f"assumptions: on those {PAPER_GPUS} GPUs, at {assumed:.0%} of peak, this configuration "
        f"takes {days * needed / assumed:.1f} days; {verdict} that {days:g} would take.\n"
        f"Share of peak that {days:g} day(s) need there: {variants}"
    )


def _basis(plan: Plan) -> str:
    alpha, where = plan.config.vimnas.alpha, plan.where
    steps = f"every {alpha.every} steps" if alpha.enabled else "off"
    return (
        "computed: parameters, activations, FLOPs, traffic, steps, disk, in closed form\n"
        "measured: the activation model, on a CPU in float32 (python scripts/bench_plan.py)\n"
        "NOT measured: anything on a GPU. No GPU was at hand.\n"
        f"assumed: efficiency {where.efficiency:.0%} (--efficiency; loading, normalisation, "
        f"updates are in it), {where.reserve / GB:g} GB kept back (--reserve), network "
        f"{where.network / GB:g} GB/s a node (--network), flash attention and the compiled "
        f"operators (without them fc2's input is kept as well), {where.ready} finished "
        f"float32 batches on the GPU, alpha steps {steps}; evaluations, checkpoints, restarts and "
        "searches take no time. Steps of a few milliseconds (small spaces) are bound by kernel "
        "launches and loading, of which a constant efficiency knows nothing"
    )


#: JSON keys of activation checkpointing, by whether it is on.
SWITCH = {False: "without_checkpointing", True: "with_checkpointing"}


def numbers(plan: Plan) -> dict[str, Any]:
    """Everything that `describe` shows, as JSON: bytes, seconds, FLOPs."""
    own = plan.config.vimnas.model.activation_checkpointing
    found: dict[str, Any] = {
        "machines": asdict(plan.where),
        "space": plan.space.name,
        "params": plan.params,
        "mean_params": plan.mean_params,
        "micro_batch": plan.micro,
        "activation_checkpointing": own,
        "element_bytes": {"activations": BF16, "states": FLOAT},
        "states": {
            name: getattr(plan.states, name)
            for name in ("weights", "masters", "moments", "average", "gradients", "buckets")
        },
        "datasets": {},
        "phases": {n: {"steps": s, "shares": dict(p)} for n, (s, p) in plan.phases().items()},
        "days": {key: plan.days(c) for c, key in SWITCH.items()},
        "days_without_alpha": {key: plan.days(c, alphas=False) for c, key in SWITCH.items()},
        "traffic_days": plan.traffic_days(own),
        "checkpoint_bytes": plan.checkpoint_bytes,
        "disk_bytes": plan.disk_bytes,
        "measured_on_a_gpu": False,
    }
    for name in plan.datasets:
        found["datasets"][name] = {
            "step": asdict(plan.step(name, own)),
            "memory": [
                {**asdict(m), "total": m.total, "largest_micro": plan.largest_micro(name, c)}
                for c in (False, True)
                for m in [plan.memory(name, plan.micro, c)]
            ],
        }
    if (paper := plan.paper_efficiency(own)) is not None:
        differs = plan.not_the_papers()
        found["paper"] = {"days": paper[0], "efficiency_needed": paper[1], "differences": differs}
    return found
