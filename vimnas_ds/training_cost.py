"""FLOPs, traffic and disk of training, in closed form (no torch, no model).

A multiply-accumulate is 2 FLOPs, backward costs what its products cost (no kernel's recomputation):

    weight step  2 (2 stem + 3 blocks + 3 head) MACs, + 2 blocks with checkpointing (pixels have no
                 gradient, so the tubes' backward is one product)
    alpha step   2 (stem + 2 linear + 3 attention + head) MACs at full width, + 2 blocks likewise:
                 weights are constant, so linear layers have one product in backward

DeepSpeed's flops profiler counts the same multiply-accumulates (tested); its FLOPs add norms and
GELU, which are not counted here.

Traffic of a step, bytes that each of W processes sends (ring algorithms), s = 2 in bf16:

    gradients    s P' (W-1)/W where use_multi_rank_bucket_allreduce is false (one reduction to each
                 owner), else twice that; P' = whole parameters of the sampled layers
    weights      s P (W-1)/W, the all-gather of the whole model
    alphas       8 (number of alphas) (W-1)/W, an all-reduce in float32
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vimnas_ds.cost import Layout, count_params
from vimnas_ds.space import Arch, SearchSpace
from vimnas_ds.training_memory import expected, layer_params


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one input's forward pass, by what backward makes of them."""

    stem: float
    linear: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.stem + self.linear + self.attention + self.head

    def weight_step(self, checkpointing: bool) -> float:
        """FLOPs of one sample in a weight step."""
        blocks = self.linear + self.attention
        return 2 * (2 * self.stem + (3 + checkpointing) * blocks + 3 * self.head)

    def alpha_step(self, checkpointing: bool) -> float:
        """FLOPs of one sample in an alpha step, when these are the largest sub-network's."""
        linear, attention = (2 + checkpointing) * self.linear, (3 + checkpointing) * self.attention
        return 2 * (self.stem + linear + attention + 2 * self.head)


@dataclass(frozen=True)
class Input:
    """One sample of a dataset; `frames` is None for an image."""

    layout: Layout
    frames: int | None
    size: int
    num_classes: int

    def mean_macs(self, space: SearchSpace) -> Macs:
        """Mean over uniformly drawn sub-networks, exactly."""
        tokens, k = self.layout.tokens, self.layout.head_dim
        n = self.layout.num_tokens(self.frames, self.size)
        shape = (self.frames or tokens.image_frames, self.size, self.size)
        tubes = (tokens.tubes[i] for i in tokens.active_tubes(self.frames is None))
        patches = sum(math.prod(t.grid(shape)) * 3 * math.prod(t.kernel) for t in tubes)

        def nothing(e: float) -> float:
            return 0.0

        return Macs(
            expected(space, lambda e, h, f: 0.0, lambda e: patches * e),
            expected(space, lambda e, h, f: n * (4 * e * h * k + 2 * e * f), nothing),
            expected(space, lambda e, h, f: 2 * n * n * h * k, nothing),
            expected(space, lambda e, h, f: 0.0, lambda e: e * self.num_classes),
        )

    def macs(self, arch: Arch) -> Macs:
        """Of one sub-network."""
        return self.mean_macs(SearchSpace.single(arch, self.layout.head_dim))


def mean_params(space: SearchSpace, num_classes: int, layout: Layout) -> float:
    """Mean parameters of uniformly drawn sub-networks with one head, exactly."""

    def rest(e: float) -> float:
        return count_params(Arch(int(e), 0, (), ()), num_classes, layout)

    k, gains = layout.head_dim, 4 * layout.head_dim * layout.qk_norm

    def layer(e: float, h: float, f: float) -> float:
        inner = h * k
        linear = 4 * e * inner + len(layout.qkv_bias) * inner + 2 * e * f + f
        vectors = 6 * e + gains + 2 * e * layout.layer_scale
        return linear + vectors + layout.relative_position_params

    return expected(space, layer, rest)


def reduced_params(space: SearchSpace, num_classes: int, layout: Layout) -> float:
    """Mean elements whose gradients are reduced: whole parameters of the sampled layers."""
    whole = float(count_params(Arch(space.max_embed_dim, 0, (), ()), num_classes, layout))
    for layer in range(space.max_depth):
        share = sum(d > layer for d in space.depth) / len(space.depth)
        whole += share * layer_params(space, layer, layout)
    return whole


def num_alphas(space: SearchSpace) -> int:
    """Architecture parameters, one a choice."""
    layers = sum(map(len, (*space.num_heads, *space.mlp_ratio)))
    return len(space.embed_dim) + len(space.depth) + layers


@dataclass(frozen=True)
class Traffic:
    """Bytes that each process sends in one step."""

    gradients: float
    weights: float
    alphas: float

    @property
    def total(self) -> float:
        return self.gradients + self.weights + self.alphas

    @classmethod
    def of(
        cls, reduced: float, params: int, alphas: int, processes: int, element: int, to_owners: bool
    ) -> Traffic:
        """`reduced` elements of gradients, `params` of weights, `alphas` of architecture."""
        share = (processes - 1) / processes
        rounds = 1 if to_owners else 2
        return cls(rounds * element * reduced * share, element * params * share, 8 * alphas * share)

    def seconds(self, link: float, network: float | None, gpus: int) -> float:
        """Time without overlap: the slower of the links inside a node (`link` bytes/s a GPU) and
        between nodes (`network` bytes/s a node, None for one node; every ring crosses it once)."""
        return max(self.total / link, self.total / network if network else 0.0) if gpus > 1 else 0.0


def checkpoint_bytes(params: int, ema: bool) -> int:
    """A checkpoint's masters and two moments, in float32, and the moving average twice (in parts
    for its ranks, and whole); the rest is kilobytes."""
    return (20 if ema else 12) * params
