"""Memory of one process in training, in closed form (no torch, no model).

What autograd keeps of one block for backward, in elements a token, with E = embed_dim, I = heads K,
F = hidden units (read off `Block.forward` with the compiled operators and a flash kernel):

    sampled     4E + 4I + F    both norms' inputs and outputs; q, k, v and attention's result; fc1's
                               result before GELU (fc2's input is computed again)
    superposed  2E + 4I + F    weights are constant: no linear layer keeps its input
    and 4 (h + 4) bytes        attention's log-sum-exp of h heads, mean and deviation of two norms
    qk_norm: 3I and 16h bytes more (normed q and k lie head by head, and so does the result, which
    is then kept twice); layer_scale: 2E more (sampled)

With checkpointing a block keeps its input alone, E, and one block at a time is computed again.
Backward goes through the layers from the last to the first; its peak is

    max_l  stem + sum_{j<=l} kept_j + transient_l + gradients_{j>l}
    transient = the larger of  2F + 3E  (MLP) and  4I + 3E - (2E + F)  (attention, MLP freed)

and the layer's own weight gradients, which are of full size. In a process without DeepSpeed all
gradients stay until the update; under ZeRO-2 they go into buckets and this rank's flat share:

    weights      s P         masters 4 P/W        moments 8 P/W        gradients 4 P/W
    moving average (vimnas.ema) 4 P/W
    buckets      s x reduce_bucket_size, twice with overlap_comm; the all-gather writes in place

with s bytes an activation's number (2 in bf16), P parameters and W processes. In float32 gradients
are flattened once more for the update. What kernels use inside is left out.

A sandwich has one loss of several passes, which all keep theirs until backward comes to them, the
last pass first; a weight's gradient waits until all passes have added to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vimnas_ds.cost import Layout, count_params
from vimnas_ds.space import Arch, SearchSpace

#: what one layer costs, of (embed_dim, num_heads, hidden_dim): affine in the last two
PerLayer = Callable[[float, float, float], float]


def expected(space: SearchSpace, layer: PerLayer, rest: Callable[[float], float]) -> float:
    """Mean of rest(e) + sum_l layer(e, h_l, F_l) over uniformly drawn sub-networks, exactly.

    Decisions are independent and `layer` is affine in heads and in hidden units, so their means can
    stand in for them; layer l counts with the share of depths above it.
    """
    total = 0.0
    for e in space.embed_dim:
        total += rest(e)
        for index, (heads, ratios) in enumerate(zip(space.num_heads, space.mlp_ratio, strict=True)):
            share = sum(d > index for d in space.depth) / len(space.depth)
            hidden = sum(int(e * r) for r in ratios) / len(ratios)
            total += share * layer(e, sum(heads) / len(heads), hidden)
    return total / len(space.embed_dim)


def supernet_params(space: SearchSpace, num_classes: dict[str, int], layout: Layout) -> int:
    """Parameters of the supernet with all heads."""
    classes, largest = sum(num_classes.values()), space.largest()
    return count_params(largest, classes, layout)


def layer_params(space: SearchSpace, layer: int, layout: Layout) -> int:
    """Parameters of one whole layer of the supernet."""
    arch = space.largest()
    one = Arch(arch.embed_dim, 1, arch.num_heads[layer : layer + 1], arch.mlp_ratio[layer:][:1])
    none = Arch(arch.embed_dim, 0, (), ())
    return count_params(one, 1, layout) - count_params(none, 1, layout)


def _layers(arch: Arch) -> list[tuple[int, int, int]]:
    """(embed_dim, num_heads, hidden_dim) of each."""
    hidden = map(arch.hidden_dim, range(arch.depth))
    return [(arch.embed_dim, h, f) for h, f in zip(arch.num_heads, hidden, strict=True)]


@dataclass(frozen=True)
class Activations:
    """What a step of `batch` inputs keeps; `frames` is None for an image, `element` the bytes of a
    number. All results are bytes of one process."""

    layout: Layout
    frames: int | None
    size: int
    batch: int
    element: int = 2
    checkpointing: bool = False

    @property
    def rows(self) -> int:
        """Tokens of the batch, B N."""
        return self.batch * self.layout.num_tokens(self.frames, self.size)

    def pixels(self) -> int:
        """Numbers of the batch."""
        return self.batch * 3 * (self.frames or 1) * self.size**2

    def patches(self) -> int:
        """Kept for the tubes' weight gradients: every token's patch."""
        tokens = self.layout.tokens
        shape = (self.frames or tokens.image_frames, self.size, self.size)
        tubes = (tokens.tubes[i] for i in tokens.active_tubes(self.frames is None))
        each = sum(math.prod(tube.grid(shape)) * 3 * math.prod(tube.kernel) for tube in tubes)
        return self.batch * each * self.element

    def layer(self, e: float, h: float, f: float) -> float:
        """Kept by one sampled block when it is not computed again."""
        inner = h * self.layout.head_dim
        numbers = 4 * e + 4 * inner + f + 3 * inner * self.layout.qk_norm
        numbers += 2 * e * self.layout.layer_scale
        return self.rows * (numbers * self.element + self._statistics(h))

    def superposed_layer(self, e: float, h: float, f: float) -> float:
        """Kept by one block of the alpha step."""
        inner = h * self.layout.head_dim
        numbers = 2 * e + 4 * inner + f + 3 * inner * self.layout.qk_norm
        return self.rows * (numbers * self.element + self._statistics(h))

    def _statistics(self, h: float) -> float:
        return 4 * (h + 4 + 4 * h * self.layout.qk_norm)

    def transient(self, e: float, h: float, f: float) -> float:
        """Most that backward through one block holds beside what was kept."""
        inner = h * self.layout.head_dim
        return self.rows * self.element * max(2 * f + 3 * e, 4 * inner + e - f)

    def kept(self, space: SearchSpace) -> float:
        """Mean over the space of what is kept for backward by a weight step, stem and last norm
        included (the blocks' inputs alone with checkpointing)."""

        def layer(e: float, h: float, f: float) -> float:
            return self._input(e) if self.checkpointing else self.layer(e, h, f)

        return expected(space, layer, lambda e: self.patches() + self._input(e))

    def _input(self, e: float) -> float:
        return self.rows * e * self.element

    def held(self, arch: Arch) -> float:
        """Kept for backward by one pass of `arch`, as `kept`."""
        return self.patches() + self._input(arch.embed_dim) + sum(self._held_layers(arch))

    def _held_layers(self, arch: Arch) -> list[float]:
        if self.checkpointing:
            return [self._input(arch.embed_dim)] * arch.depth
        return [self.layer(*one) for one in _layers(arch)]

    def weight_peak(self, arch: Arch, gradients: Callable[[int], tuple[float, float]]) -> float:
        """Most that a weight step of `arch` holds beside weights and states.

        Args:
            gradients: of a layer, bytes of its own weight gradients, and of those that stay once
                backward has left it; layer `depth` stands for the head.
        """
        kept, held = self.held(arch), self._held_layers(arch)  # the last norm's input included
        peak, stay = kept, gradients(arch.depth)[1]
        for index, one in reversed([*enumerate(_layers(arch))]):
            again = self.layer(*one) - self._input(arch.embed_dim) if self.checkpointing else 0.0
            own, left = gradients(index)
            peak = max(peak, kept + again + self.transient(*one) + stay + own)
            kept -= held[index]
            stay += left
        return max(peak, kept + stay)

    def sandwich_peak(self, archs: Sequence[Arch], gradients: Sequence[float]) -> float:
        """`weight_peak` of a step with several passes, `archs` in the order of their forward.

        Args:
            gradients: bytes of each layer's weight gradients, the head's last. From the second
                pass of backward on all are counted, though the last one lets go of them in turn.
        """
        peak = waiting = 0.0
        for number, arch in reversed([*enumerate(archs)]):
            own = [*gradients[: arch.depth], gradients[-1]]
            stay = [0.0] * len(own) if waiting else own
            here = self.weight_peak(arch, list(zip(own, stay, strict=True)).__getitem__)
            earlier = sum(self.held(one) for one in archs[:number])
            peak = max(peak, earlier + waiting + here)
            waiting = sum(gradients)
        return peak

    def alpha_peak(self, space: SearchSpace) -> float:
        """Most that an alpha step holds beside weights and states: full width, float32 mixture of
        the depths' ends."""
        arch = space.largest()
        e = arch.embed_dim
        layers = [(self.superposed_layer(*one), self.transient(*one)) for one in _layers(arch)]
        ends = 4 * self.rows * e * (1 + (len(space.depth) if self.element != 4 else 1))
        if self.checkpointing:
            return arch.depth * self._input(e) + max(k + t for k, t in layers) + ends
        return sum(k for k, _ in layers) + layers[-1][1] + ends


@dataclass(frozen=True)
class ZeroStates:
    """ZeRO-2's share of one of `processes`; all results are bytes."""

    params: int
    processes: int
    element: int = 2
    bucket: int = 500_000_000  #: elements, `reduce_bucket_size`
    overlap: bool = False  #: `overlap_comm`: a second bucket
    ema: bool = False  #: a moving average of the masters

    @property
    def share(self) -> int:
        """Elements of this process's flat parts (padded to two a process)."""
        unit = 2 * self.processes
        return math.ceil(self.params / unit) * 2

    @property
    def weights(self) -> int:
        return self.element * self.share * self.processes

    @property
    def masters(self) -> int:
        return 4 * self.share

    @property
    def moments(self) -> int:
        return 8 * self.share

    @property
    def average(self) -> int:
        return 4 * self.share * self.ema

    @property
    def gradients(self) -> int:
        """This process's reduced gradients."""
        return 4 * self.share

    @property
    def buckets(self) -> int:
        return self.element * self.bucket * (1 + self.overlap)

    def total(self) -> int:
        states = self.masters + self.moments + self.average
        return self.weights + states + self.gradients + self.buckets
