"""What a configuration costs on given machines, before anybody rents them (no torch).

Computed: memory (`training_memory`), FLOPs and traffic (`training_cost`), steps (`Schedule`).
Assumed: the efficiency (FLOPs done / peak, everything that a step does besides included), what
CUDA, NCCL, cuBLAS, DALI and fragmentation take, the network. Measured: the memory model's
activations on a CPU (scripts/bench_plan.py); nothing on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vimnas_ds.config import ConfigError, RunConfig
from vimnas_ds.cost import Layout
from vimnas_ds.gpus import GPUS, Gpu
from vimnas_ds.space import Arch, SearchSpace
from vimnas_ds.train.schedule import Schedule
from vimnas_ds.training_cost import (
    Input,
    Macs,
    Traffic,
    checkpoint_bytes,
    mean_params,
    num_alphas,
    reduced_params,
)
from vimnas_ds.training_memory import Activations, ZeroStates, layer_params, supernet_params

DAY = 86400
#: The paper's machine, and its days for the spaces whose days it gives ("from 1 day for the
#: smallest model to 5 days for the largest", searches included).
PAPER_GPU, PAPER_GPUS = GPUS["a100-40"], 8
PAPER_DAYS = {"vit_t": 1.0, "vit_l": 5.0}
PAPER_EPOCHS, PAPER_DATASETS = 500, ("imagenet", "k400", "k600", "ssv2")
BF16, FLOAT = 2, 4


@dataclass(frozen=True)
class Machines:
    """`nodes` machines of `gpus` each; `network` bytes/s a node and direction, `reserve` bytes of a
    GPU for what is not computed, `ready` finished float32 batches that wait on it."""

    gpu: Gpu
    gpus: int
    nodes: int
    efficiency: float
    network: float
    reserve: float
    ready: int

    @property
    def processes(self) -> int:
        return self.gpus * self.nodes

    @property
    def flops(self) -> float:
        """FLOP/s of all, at the stated efficiency."""
        return self.processes * self.gpu.peak * self.efficiency


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU with a micro batch of one dataset."""

    micro: int
    checkpointing: bool
    kept: float  #: activations, mean over sub-networks (of a sandwich, all of its passes)
    weight_peak: float  #: activations and what backward holds, largest sub-network(s)
    alpha_peak: float
    inputs: float
    states: int

    @property
    def total(self) -> float:
        """At the highest point of a step."""
        return self.states + self.inputs + max(self.weight_peak, self.alpha_peak)


@dataclass(frozen=True)
class StepCost:
    """One step that draws a dataset; FLOPs of all processes, seconds at the stated efficiency."""

    weight_flops: float
    alpha_flops: float
    seconds: float
    seconds_without_alpha: float
    samples_per_second: float  #: that the loaders must give together, alpha batches included
    traffic: Traffic
    traffic_seconds: float


def _check_modelled(config: RunConfig) -> None:
    """Raise ConfigError for switches whose training memory `training_memory` does not know."""
    model = config.vimnas.model
    switches = {
        'gelu "erf"': model.gelu == "erf",
        f"relative_positions {model.relative_positions}": model.relative_positions is not None,
        "packed_qkv_bias true": model.packed_qkv_bias,
    }
    if found := [f"vimnas.model.{switch}" for switch, on in switches.items() if on]:
        raise ConfigError(
            f"{', '.join(found)}: what training keeps of such layers is not modelled, so there is "
            "no plan; scripts/train.py --dry_run says the rest"
        )


class Plan:
    """A configuration on machines; `sizes` are training files per dataset.

    Raises ConfigError for switches of the model that are not modelled, and for one in float32: the
    GPUs' figures are of bf16.
    """

    def __init__(self, config: RunConfig, layout: Layout, sizes: dict[str, int], where: Machines):
        _check_modelled(config)
        self.config, self.layout, self.where = config, layout, where
        if not config.bf16(has_gpu=True):
            raise ConfigError(
                "bf16.enabled is false: plans are of bf16 training, as the GPUs' peaks are; "
                "--set bf16.enabled=auto (or true)"
            )
        self.space: SearchSpace = config.vimnas.search_space
        self.datasets = config.vimnas.data.datasets
        self.schedule = Schedule.build(config, sizes)
        self.classes = {name: data.num_classes for name, data in self.datasets.items()}
        self.params = supernet_params(self.space, self.classes, layout)
        zero = config.deepspeed["zero_optimization"]
        self.states = ZeroStates(
            self.params,
            where.processes,
            BF16,
            int(zero.get("reduce_bucket_size", 500_000_000)),
            bool(zero.get("overlap_comm", False)),
            config.vimnas.ema is not None,
        )
        self.to_owners = bool(zero.get("reduce_scatter", True)) and not zero.get(
            "use_multi_rank_bucket_allreduce", True
        )

    @property
    def alpha_share(self) -> float:
        """Alpha steps per weight step."""
        alpha = self.config.vimnas.alpha
        return 1 / alpha.every if alpha.enabled else 0.0

    @property
    def micro(self) -> int:
        """The recipe's samples per process. Raises ConfigError if they cannot be shared evenly."""
        return self.config.micro_batch(self.where.processes)

    @property
    def passes(self) -> tuple[tuple[Arch, ...], int]:
        """Of a weight step: the sub-networks that are always trained, and how many drawn ones."""
        sandwich, space = self.config.vimnas.sandwich, self.space
        if sandwich is None or space.size() == 1:
            return (), 1
        return (space.largest(), space.smallest()), sandwich.random

    # -- memory ---------------------------------------------------------------------------------

    def memory(self, dataset: str, micro: int, checkpointing: bool) -> Memory:
        """Of one GPU. The alpha batch grows with the training batch, as the recipe has them."""
        data = self.datasets[dataset]
        shape = (self.layout, data.frames, data.size)
        step = Activations(*shape, micro, BF16, checkpointing)
        ratio = self.config.alpha_batch / self.config.global_batch
        alpha = Activations(*shape, max(1, round(micro * ratio)), BF16, checkpointing)
        own = [BF16 * layer_params(self.space, i, self.layout) for i in range(self.space.max_depth)]
        own.append(BF16 * data.num_classes * self.space.max_embed_dim)
        inputs = step.pixels() * (BF16 + FLOAT * self.where.ready)
        fixed, drawn = self.passes
        largest = self.space.largest()
        if fixed:
            peak = step.sandwich_peak([*fixed, *[largest] * drawn], own)
        else:
            peak = step.weight_peak(largest, lambda layer: (own[layer], 0.0))
        return Memory(
            micro,
            checkpointing,
            sum(map(step.held, fixed)) + drawn * step.kept(self.space),
            peak,
            alpha.alpha_peak(self.space) if self.alpha_share else 0.0,
            inputs,
            self.states.total(),
        )

    def largest_micro(self, dataset: str, checkpointing: bool) -> int:
        """The most samples per process that fit; 0 if none does."""
        room = self.where.gpu.memory - self.where.reserve

        def fits(micro: int) -> bool:
            return self.memory(dataset, micro, checkpointing).total <= room

        low, high = 0, 1
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    # -- time -----------------------------------------------------------------------------------

    def step(self, dataset: str, checkpointing: bool) -> StepCost:
        """A mean step that draws `dataset`."""
        data, where = self.datasets[dataset], self.where
        sample = Input(self.layout, data.frames, data.size, data.num_classes)
        batch, alpha_batch = self.config.global_batch, self.config.alpha_batch * self.alpha_share
        fixed, drawn = self.passes
        macs: list[Macs] = [*map(sample.macs, fixed), *[sample.mean_macs(self.space)] * drawn]
        weight = batch * sum(one.weight_step(checkpointing) for one in macs)
        alpha = alpha_batch * sample.macs(self.space.largest()).alpha_step(checkpointing)
        seconds = (weight + alpha) / where.flops
        traffic = Traffic.of(
            reduced_params(
                SearchSpace.single(fixed[0], self.layout.head_dim) if fixed else self.space,
                data.num_classes,
                self.layout,
            ),
            self.params,
            round(num_alphas(self.space) * self.alpha_share),
            where.processes,
            BF16,
            self.to_owners,
        )
        network = where.network if where.nodes > 1 else None
        return StepCost(
            weight,
            alpha,
            seconds,
            weight / where.flops,
            (batch + alpha_batch) / seconds,
            traffic,
            traffic.seconds(where.gpu.link, network, where.processes),
        )

    def phases(self) -> dict[str, tuple[int, Mapping[str, float]]]:
        """Steps of each phase, and the share of them that draws each dataset."""
        plan, total = self.schedule, sum(self.schedule.sizes.values())
        joint = {name: size / total for name, size in plan.sizes.items()}
        found: dict[str, tuple[int, Mapping[str, float]]] = {}
        if plan.image_dataset is not None and plan.image_steps:
            found["image"] = (plan.image_steps, {plan.image_dataset: 1.0})
        found["joint"] = (plan.total_steps - plan.image_steps, joint)
        return found

    def flops(self, checkpointing: bool, alphas: bool = True) -> float:
        """Of the whole run."""
        costs = {name: self.step(name, checkpointing) for name in self.datasets}
        return sum(
            steps * share * (costs[name].weight_flops + alphas * costs[name].alpha_flops)
            for steps, shares in self.phases().values()
            for name, share in shares.items()
        )

    def traffic_days(self, checkpointing: bool) -> float:
        """What communication adds to a run if nothing of it is hidden behind computing."""
        return sum(
            steps * share * self.step(name, checkpointing).traffic_seconds / DAY
            for steps, shares in self.phases().values()
            for name, share in shares.items()
        )

    def days(self, checkpointing: bool, alphas: bool = True) -> float:
        """Of computing, at the stated efficiency."""
        return self.flops(checkpointing, alphas) / self.where.flops / DAY

    def not_the_papers(self) -> list[str]:
        """In words, in what the run differs from the paper's whose days are known."""
        section, found = self.config.vimnas, []
        if section.schedule.epochs != PAPER_EPOCHS:
            found.append(f"{section.schedule.epochs} epochs instead of {PAPER_EPOCHS}")
        if missing := [name for name in PAPER_DATASETS if name not in self.datasets]:
            found.append(f"without {', '.join(missing)}")
        for name in PAPER_DATASETS:
            public = self.datasets[name].reference_files if name in self.datasets else None
            if public and self.schedule.sizes.get(name, public) < 0.8 * public:
                found.append(f"{self.schedule.sizes[name]:,} files of {name} instead of {public:,}")
        if self.alpha_share != 1:
            found.append("alpha steps " + ("thinned out" if self.alpha_share else "off"))
        if self.passes[0]:
            found.append("several sub-networks a step")
        return found

    def paper_efficiency(self, checkpointing: bool) -> tuple[float, float] | None:
        """The paper's days for this space, and the efficiency that this configuration would need to
        take them on its machine; None where it gives no days (one sub-network alone, too)."""
        section = self.config.vimnas
        days = PAPER_DAYS.get(section.space)
        if days is None or section.arch is not None:
            return None
        able = PAPER_GPUS * PAPER_GPU.peak * days * DAY
        return days, self.flops(checkpointing) / able

    # -- disk -----------------------------------------------------------------------------------

    @property
    def checkpoint_bytes(self) -> int:
        return checkpoint_bytes(self.params, self.config.vimnas.ema is not None)

    @property
    def disk_bytes(self) -> int:
        """The most that a run's checkpoints take: those kept, the best, those of the collapse guard
        and one being written."""
        section = self.config.vimnas
        keeping = section.checkpoint
        return self.checkpoint_bytes * (keeping.keep + keeping.keep_best + 3 * section.guarded + 1)

    @property
    def mean_params(self) -> float:
        """Of a drawn sub-network with the largest head."""
        return mean_params(self.space, max(self.classes.values()), self.layout)
