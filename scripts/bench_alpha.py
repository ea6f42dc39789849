"""The alpha step: gates on activations / weights mixed from padded slices.

    python scripts/bench_alpha.py

Forward of the superposed vit_s network, cross-entropy, backward to the alphas only, on 1 and on 8
images of 196 tokens (called 200 and 1568 rows). Theirs is the public way (TangleNAS): before every
layer W_mix = sum_k p_k PAD(W[:o_k, :i_k]) over its choices (two decisions meet in a weight: 9 terms
each, for q, k, v together), likewise biases and norms, then plain layers at full width. Weights are
frozen on both sides, so both give gradients of the alphas alone.

Floor: the forward pass and the gradient of the activations, 4 of a training step's 6 FLOPs a
weight and row: 27 and 212 GFLOP at full width (33.7 M weights). Theirs does these as well, forms
dW_mix in addition (2 more) and moves about 9 x 33.7 M weights several times whatever the rows are.
Two minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from bench_common import Place, arguments, interleave, ratio_line, start
from torch import Tensor
from torch.nn import functional as F

from vimnas_ds.model.alphas import Alphas, Probabilities
from vimnas_ds.model.attention import attention, merge_heads, split_heads
from vimnas_ds.model.block import Block
from vimnas_ds.model.layers import EntangledNorm
from vimnas_ds.model.options import NORM_EPS
from vimnas_ds.model.supernet import Supernet
from vimnas_ds.space import SPACES
from vimnas_ds.tubes import TUBEVIT

GOALS = {1: ("alpha_200_rows", 0.5), 8: ("alpha_1568_rows", 0.85)}
SPACE = SPACES["vit_s"]
#: one choice of a block: its probability and the leading rows and columns it keeps
Choice = tuple[Tensor, int, int]


def mix(weight: Tensor, choices: Iterable[Choice]) -> Tensor:
    """sum_k p_k PAD(weight[..., :o_k, :i_k])"""
    total: Tensor | None = None
    for p, rows, columns in choices:
        part = weight[..., :rows, :columns]
        short = (weight.shape[-1] - columns, weight.shape[-2] - rows)
        part = p * F.pad(part, (0, short[0], 0, short[1]))
        total = part if total is None else total + part
    assert total is not None
    return total


def mix_vector(vector: Tensor, choices: Iterable[tuple[Tensor, int]]) -> Tensor:
    """sum_k p_k PAD(vector[..., :o_k])"""
    return mix(vector[..., None], [(p, size, 1) for p, size in choices])[..., 0]


class MixedWeights:
    """The public way, written out on the supernet's own weights."""

    def __init__(self, net: Supernet):
        self.net = net.requires_grad_(False)

    def norm(self, x: Tensor, norm: EntangledNorm, embed: list[tuple[Tensor, int]]) -> Tensor:
        weight, bias = mix_vector(norm.weight, embed), mix_vector(norm.bias, embed)
        return F.layer_norm(x, x.shape[-1:], weight, bias, NORM_EPS)

    def block(self, x: Tensor, block: Block, layer: int, p: Probabilities) -> Tensor:
        k, d = block.attn.head_dim, x.shape[-1]
        embed = list(zip(p["embed_dim"].to(x.dtype), SPACE.embed_dim, strict=True))
        counts = zip(p[f"num_heads[{layer}]"].to(x.dtype), SPACE.num_heads[layer], strict=True)
        heads = [(q, h * k) for q, h in counts]
        ratios = list(
            zip(p[f"mlp_ratio[{layer}]"].to(x.dtype), SPACE.mlp_ratio[layer], strict=True)
        )
        hidden = [(a * b, int(e * r), e) for a, e in embed for b, r in ratios]
        inner = [(a * b, h, e) for a, e in embed for b, h in heads]
        attn, mlp = block.attn, block.mlp

        weight = mix(attn.qkv.weight.view(3, -1, d), inner).flatten(0, 1)
        bias = mix_vector(attn.qkv.bias.view(3, -1), heads).flatten()
        qkv = F.linear(self.norm(x, block.norm1, embed), weight, bias)
        y = attention(*(split_heads(part, k) for part in qkv.chunk(3, -1)))
        weight = mix(attn.proj.weight, [(q, e, h) for q, h, e in inner])
        x = x + F.linear(merge_heads(y), weight, mix_vector(attn.proj.bias, embed))

        weight = mix(mlp.fc1.weight, hidden)
        bias = mix_vector(mlp.fc1.bias, [(q, f) for q, f, _ in hidden])
        y = F.gelu(F.linear(self.norm(x, block.norm2, embed), weight, bias), approximate="tanh")
        weight = mix(mlp.fc2.weight, [(q, e, f) for q, f, e in hidden])
        return x + F.linear(y, weight, mix_vector(mlp.fc2.bias, embed))

    def __call__(self, x: Tensor, p: Probabilities, dataset: str) -> Tensor:
        net = self.net
        embed = list(zip(p["embed_dim"].to(x.dtype), SPACE.embed_dim, strict=True))
        x = net.tokens(x, SPACE.max_embed_dim, frozen=True)
        mixed = torch.zeros_like(x)
        for layer, block in enumerate(net.blocks):
            x = self.block(x, block, layer, p)
            if layer + 1 in SPACE.depth:
                mixed = mixed + p["depth"][SPACE.depth.index(layer + 1)].to(x.dtype) * x
        head = net.heads[dataset]
        weight = mix(head.weight, [(q, head.weight.shape[0], e) for q, e in embed])
        return F.linear(self.norm(mixed, net.norm, embed).mean(1), weight, head.bias)


def main(argv: list[str] | None = None) -> int:
    args = arguments(__doc__).parse_args(argv)
    place = start(args)
    net = Supernet(SPACE, TUBEVIT, {"imagenet": 1000}).to(place.device, place.dtype)
    alphas = Alphas(SPACE, 1e-3, torch.Generator().manual_seed(0)).to(place.device)
    ways = {"gates": net.superposed, "mixed weights": MixedWeights(net)}
    lines = []
    for images, (name, goal) in GOALS.items():
        print(f"{images} x 196 tokens")
        sides = {way: _Step(forward, alphas, images, place).run for way, forward in ways.items()}
        medians = interleave(sides, place)
        lines.append(ratio_line(name, medians["gates"] / medians["mixed weights"], goal))
    print("\n".join(lines))
    return 0


class _Step:
    """One alpha step without its update."""

    def __init__(self, forward: object, alphas: Alphas, images: int, place: Place):
        assert callable(forward)
        self.forward, self.alphas = forward, alphas
        self.x = torch.randn(images, 3, 224, 224).to(place.device, place.dtype)
        self.y = torch.randint(1000, (images,)).to(place.device)

    def run(self) -> tuple[Tensor, ...]:
        logits = self.forward(self.x, self.alphas.probabilities(), "imagenet")
        return torch.autograd.grad(F.cross_entropy(logits.float(), self.y), list(self.alphas))


if __name__ == "__main__":
    sys.exit(main())
