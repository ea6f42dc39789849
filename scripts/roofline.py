"""What the GPU operators cost at best, computed from their bytes and FLOPs; nothing is measured.

    python scripts/roofline.py > docs/roofline.md

For every operator: bytes that must cross the memory bus (each tensor once; what a kernel reads
twice counts twice), FLOPs, and the time of the slower of the two on an A100 40 GB:

    time = max(bytes / 1555 GB/s, FLOPs / peak)    peak 312 TFLOP/s (bf16 tensor cores) for matrix
                                                   products, 19.5 TFLOP/s (fp32) for the rest

Sub-networks are the middle of each space, inside its whole weights. Instant.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from vimnas_ds.cost import Layout, count_params
from vimnas_ds.space import SPACES, Arch, SearchSpace

BANDWIDTH, TENSOR_PEAK, VECTOR_PEAK = 1555e9, 312e12, 19.5e12
TOKENS, ROWS = 196, (1568, 12544)
NAMES = ("vit_s", "vit_b", "vit_l")
BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Cost:
    """One operator's call."""

    name: str
    bytes: float
    tensor_flops: float = 0.0
    vector_flops: float = 0.0

    @property
    def memory_seconds(self) -> float:
        return self.bytes / BANDWIDTH

    @property
    def compute_seconds(self) -> float:
        return max(self.tensor_flops / TENSOR_PEAK, self.vector_flops / VECTOR_PEAK)

    @property
    def seconds(self) -> float:
        return max(self.memory_seconds, self.compute_seconds)

    def row(self, *first: str) -> str:
        bound = "memory" if self.memory_seconds >= self.compute_seconds else "compute"
        flops = (self.tensor_flops + self.vector_flops) / 1e9
        numbers = (f"{self.bytes / 1e6:.1f}", f"{flops:.2f}", f"{self.seconds * 1e6:.1f}", bound)
        return "| " + " | ".join((*first, self.name, *numbers)) + " |"


def middle(space: SearchSpace) -> Arch:
    """The middle of every choice."""

    def pick(choices: tuple[int, ...]) -> int:
        return choices[len(choices) // 2]

    ratios = space.mlp_ratio[0]
    return Arch.uniform(
        pick(space.embed_dim), pick(space.depth), pick(space.num_heads[0]), ratios[len(ratios) // 2]
    )


def linear(
    name: str, rows: int, groups: int, out: int, width: int, whole: int, gelu: bool = False
) -> list[Cost]:
    """`sliced_linear` and its backward; `whole`: elements of the full weight."""
    x, y, w, b = rows * width, groups * rows * out, groups * out * width, groups * out
    product = 2.0 * rows * groups * out * width
    forward = BF16 * (x + w + b + y * (2 if gelu else 1))  # with GELU both sides are written
    found = [Cost(f"{name} forward" + " + GELU" * gelu, forward, product, 12.0 * y * gelu)]
    if gelu:  # backward makes it again: the block keeps the pre-activations alone
        found.append(Cost(f"{name} GELU again", BF16 * 2 * y, vector_flops=12.0 * y))
        # one pass: dy and the pre-activation in, their product out, db on the way
        found.append(Cost(f"{name} dGELU + db", BF16 * 3 * y + FP32 * b, vector_flops=20.0 * y))
    else:
        found.append(Cost(f"{name} db", BF16 * y + FP32 * b, vector_flops=1.0 * y))
    found.append(Cost(f"{name} dx", BF16 * (y + w + x), product))
    found.append(Cost(f"{name} dW (and zeros around it)", BF16 * (y + x + whole), product))
    return found


def elementwise(name: str, rows: int, width: int, forward: float, backward: float) -> list[Cost]:
    """bf16 in and out, then dy and x in and dx out; a float32 vector of its own gradients."""
    size, vector = rows * width, FP32 * width
    return [
        Cost(f"{name} forward", BF16 * 2 * size + vector, vector_flops=forward * size),
        Cost(f"{name} backward", BF16 * 3 * size + 2 * vector, vector_flops=backward * size),
    ]


def attention(rows: int, inner: int) -> list[Cost]:
    """A flash kernel on sequences of TOKENS: q, k, v, y and no score leaves the chip."""
    size, product = rows * inner, 4.0 * rows * TOKENS * inner
    return [
        Cost("attention forward", BF16 * 4 * size, product),
        Cost("attention backward", BF16 * 8 * size, 2.5 * product),
    ]


def block(space: SearchSpace, arch: Arch, rows: int) -> list[Cost]:
    """One transformer block's training step, without residual additions."""
    e, inner, f = arch.embed_dim, arch.num_heads[0] * space.head_dim, arch.hidden_dim(0)
    whole_e, whole_f = space.max_embed_dim, space.hidden_dims(0)[-1]
    whole_inner = space.num_heads[0][-1] * space.head_dim
    norm = elementwise("layer norm", rows, e, 8, 14)
    return [
        *norm,
        *linear("qkv", rows, 3, inner, e, 3 * whole_inner * whole_e),
        *attention(rows, inner),
        *linear("proj", rows, 1, e, inner, whole_inner * whole_e),
        *norm,
        *linear("fc1", rows, 1, f, e, whole_f * whole_e, gelu=True),
        *linear("fc2", rows, 1, e, f, whole_f * whole_e),
    ]


def gates(space: SearchSpace, rows: int) -> list[Cost]:
    """The alpha step's own operators, at full width."""
    inner = space.num_heads[0][-1] * space.head_dim
    return [
        *elementwise("gated_norm", rows, space.max_embed_dim, 10, 25),
        *elementwise("gated_gelu", rows, space.hidden_dims(0)[-1], 13, 22),
        *elementwise("head_gate", rows, inner, 1, 3),
    ]


def adamw(space: SearchSpace, arch: Arch) -> Cost:
    """28 bytes an element: w, g, m, v in, w, m, v out, all float32."""
    size = count_params(arch, 1000, Layout())
    name = f"sliced_adamw_, {size / 1e6:.1f} M elements, one process"
    return Cost(name, 28.0 * size, vector_flops=14.0 * size)


def lines() -> Iterator[str]:
    head = "| MB | GFLOP | µs | bound |"
    rule = "|---:|---:|---:|---|"
    yield "# Roofline: computed, not measured\n"
    yield (
        "This file is the output of `python scripts/roofline.py > docs/roofline.md`. No number in "
        "it was taken on a GPU: they are lower bounds from bytes and FLOPs on an A100 40 GB "
        "(1555 GB/s; 312 TFLOP/s in bf16 for matrix products, 19.5 TFLOP/s in fp32 for the rest), "
        "without launch time (a few µs a kernel), without caches (40 MB of L2 can keep a small "
        "tensor from crossing the bus) and at full use of the tensor cores, of which real matrix "
        "products reach 50 to 80 %.\n"
    )
    yield "To measure on a GPU, every bench of the repository in one command:\n"
    yield "```\npython scripts/bench_all.py --device cuda\n```\n"
    yield (
        "It runs both sides of every claim interleaved in bf16 with float32 master weights, "
        "synchronises around every run, and ends with one table of ratios and goals; "
        "`VIMNAS_ATTENTION=flash_attn` (or `fa3`, `fa4`) in front of it chooses the attention "
        "kernel.\n"
    )
    yield (
        "Rows are batch x 196 tokens: 1568 is 8 images, 12544 is 64. The sub-network is the middle "
        "of its space, inside the whole weights.\n"
    )
    for name in NAMES:
        space = SPACES[name]
        arch = middle(space)
        e, h, r = arch.embed_dim, arch.num_heads[0], arch.mlp_ratio[0]
        yield f"## {name}: depth {arch.depth}, embed_dim {e}, {h} heads, MLP ratio {r:g}\n"
        yield f"| rows | operator {head}\n|---:|---{rule}"
        update = adamw(space, arch)
        for rows in ROWS:
            costs = block(space, arch, rows)
            for cost in [*dict.fromkeys(costs), *gates(space, rows)]:
                yield cost.row(str(rows))
            layer = sum(cost.seconds for cost in costs)
            yield (
                f"| {rows} | **all blocks, forward and backward** | | "
                f"| **{layer * arch.depth * 1e6:.0f}** | |"
            )
        yield update.row("") + "\n"
    yield "## What follows\n"
    yield from conclusions()


def conclusions() -> Iterator[str]:
    """Sentences whose numbers are computed, too."""
    for name in NAMES:
        space = SPACES[name]
        arch = middle(space)
        total = [arch.depth * sum(c.seconds for c in block(space, arch, rows)) for rows in ROWS]
        costs = block(space, arch, ROWS[-1])
        bound = sum(c.seconds for c in costs if c.compute_seconds > c.memory_seconds)
        share = bound / sum(c.seconds for c in costs)
        update = adamw(space, arch).seconds
        yield (
            f"- {name}: {share:.0%} of a block's time at {ROWS[-1]} rows is bound by compute; the "
            f"update of all its elements on one process is {update / (total[0] + update):.0%} of a "
            f"step at {ROWS[0]} rows, {update / (total[1] + update):.0%} at {ROWS[1]} (ZeRO-2 "
            "divides it by the number of processes)."
        )


def main() -> int:
    print("\n".join(lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
