"""What a sub-network costs, as whole numbers that are known from its widths layer by layer.

    params       one named head, as in cost.py                                            computed
    gflops       1e9 MACs of one input, as in cost.py                                     computed
    latency_ms   one forward pass of a batch: a sum over a table of this device (latency.py)
                                                                                          measured
    memory_mb    peak of one forward pass of a batch, 2^20 bytes (memory.py)              computed

For one embed_dim each is  fixed + sum_l (heads[h_l] + ratios[r_l]) + max(floor, peaks of the
choices taken): whole numbers, so the order of summation cannot matter and comparisons with the
ends of a range are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from vimnas_ds.config import ConfigError, RunConfig
from vimnas_ds.cost import count_macs, count_params
from vimnas_ds.memory import Inference
from vimnas_ds.search.latency import LatencyTable
from vimnas_ds.space import Arch, SearchSpace
from vimnas_ds.train.dry_run import model_layout

Number = TypeVar("Number", bound=float)

#: resource -> the whole numbers (parameters, MACs, nanoseconds, bytes) in one of it
UNITS = {"params": 1, "gflops": 10**9, "latency_ms": 10**6, "memory_mb": 2**20}


@dataclass(frozen=True)
class WidthCosts:
    """One resource at one embed_dim."""

    fixed: int
    heads: Mapping[int, int]
    ratios: Mapping[float, int]
    floor: int = 0
    head_peaks: Mapping[int, int] = field(default_factory=dict)
    ratio_peaks: Mapping[float, int] = field(default_factory=dict)

    def total(self, arch: Arch) -> int:
        layers = sum(self.heads[h] for h in arch.num_heads)
        layers += sum(self.ratios[r] for r in arch.mlp_ratio)
        peaks = [self.head_peaks.get(h, 0) for h in arch.num_heads]
        peaks += [self.ratio_peaks.get(r, 0) for r in arch.mlp_ratio]
        return self.fixed + layers + max(self.floor, *peaks)


@dataclass(frozen=True)
class Resource:
    """One resource on a dataset's input, for all members of a space."""

    name: str
    dataset: str
    widths: Mapping[int, WidthCosts]

    @property
    def unit(self) -> int:
        return UNITS[self.name]

    def value(self, arch: Arch) -> float:
        """In the resource's own unit: parameters, 1e9 MACs, ms, MiB."""
        return self.widths[arch.embed_dim].total(arch) / self.unit

    def __str__(self) -> str:
        return f"{self.name} ({self.dataset})"


def separate(count: Callable[[Arch], int], space: SearchSpace, embed_dim: int) -> WidthCosts:
    """The parts of a `count` that is a sum over layers, each the sum of what its heads and its
    ratio cost: read off networks of no layer and of one."""
    heads, ratios = choices(space.num_heads), choices(space.mlp_ratio)
    fixed = count(Arch(embed_dim, 0, (), ()))

    def layer(num_heads: int, mlp_ratio: float) -> int:
        return count(Arch(embed_dim, 1, (num_heads,), (mlp_ratio,))) - fixed

    first = layer(heads[0], ratios[0])
    return WidthCosts(
        fixed,
        {h: layer(h, ratios[0]) for h in heads},
        {r: layer(heads[0], r) - first for r in ratios},
    )


def choices(layers: Sequence[Sequence[Number]]) -> list[Number]:
    """All values that any layer can take, ascending."""
    return sorted({value for layer in layers for value in layer})


class CostModel:
    """Every resource of a space's members in a configured run: of `batch` inputs, of `element`
    bytes a number, where it depends on them. `latencies` holds the tables of the datasets whose
    latency is asked for."""

    def __init__(
        self,
        config: RunConfig,
        space: SearchSpace,
        batch: int = 1,
        element: int = 4,
        latencies: Mapping[str, LatencyTable] | None = None,
    ):
        self.config, self.space, self.batch, self.element = config, space, batch, element
        self.latencies = dict(latencies or {})

    def resource(self, name: str, dataset: str) -> Resource:
        """Raises ConfigError when the latency of `dataset` was not measured."""
        space = self.space
        data, layout = self.config.vimnas.data.datasets[dataset], model_layout(self.config)

        def params(arch: Arch) -> int:
            return count_params(arch, data.num_classes, layout)

        def macs(arch: Arch) -> int:
            return count_macs(arch, data.num_classes, layout, frames=data.frames, size=data.size)

        if name == "memory_mb":
            return Resource(name, dataset, {e: self._memory(e, dataset) for e in space.embed_dim})
        if name == "latency_ms":
            if dataset not in self.latencies:
                raise ConfigError(f"the latency of {dataset} was not measured")
            count = self.latencies[dataset].nanoseconds
        else:
            count = {"params": params, "gflops": macs}[name]
        return Resource(name, dataset, {e: separate(count, space, e) for e in space.embed_dim})

    def _memory(self, embed_dim: int, dataset: str) -> WidthCosts:
        section = self.config.vimnas
        data, layout = section.data.datasets[dataset], model_layout(self.config)
        pass_ = Inference(
            layout, data.frames, data.size, section.position_dim, self.batch, self.element
        )
        weights = separate(
            lambda arch: self.element * count_params(arch, data.num_classes, layout),
            self.space,
            embed_dim,
        )
        return WidthCosts(
            weights.fixed + pass_.resident(),
            weights.heads,
            weights.ratios,
            pass_.stem(embed_dim),
            {h: pass_.attention(embed_dim, h) for h in weights.heads},
            {r: pass_.mlp(embed_dim, int(embed_dim * r)) for r in weights.ratios},
        )

    def costs(self, arch: Arch, datasets: Sequence[str]) -> dict[str, dict[str, float]]:
        """Everything known of `arch`: resource -> dataset -> value."""
        found: dict[str, dict[str, float]] = {}
        for name in UNITS:
            known = [d for d in datasets if name != "latency_ms" or d in self.latencies]
            if known:
                found[name] = {d: self.resource(name, d).value(arch) for d in known}
        return found
