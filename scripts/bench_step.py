"""One training step of a sampled sub-network / of the same network in timm.

    python scripts/bench_step.py                               vit_s, 8 images of 224 x 224
    python scripts/bench_step.py --space vit_b --smallest      vit_b's smallest, 4 images
    python scripts/bench_step.py --video                       vit_s, one clip of 32 frames
    python scripts/bench_step.py --profile                     where both steps' CPU time goes

A step is forward, cross-entropy, backward, zero_grad(set_to_none=True) and the update.
Ours: the supernet of the whole space with SampledAdamW, sub-network d13 e384 h6 r3.5 (or the
smallest). Theirs: timm's VisionTransformer of exactly that size, separate weights, with
torch.optim.AdamW(fused=True): 196 tokens, no class token, fixed positions, the norm before the mean
over tokens as ours, heads 64 wide as ours (so q, k, v have h * 64 channels), and timm's own GELU,
the erf form, where ours is the tanh form. For a clip both get 539 tokens from the same tube
patches, theirs through one nn.Linear for each tube, then timm's blocks.

Floor: the same FLOPs (220 GFLOP for the first case: 3 x 2 x 4.57 GMAC x 8), so 1.0 is parity; the
supernet's whole-size gradients cost one write of zeros (32.2 - 21.8 M elements, 41 MB).
About two minutes on two cores. On a GPU: bf16 with float32 master weights on both sides.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bench_common import Masters, Place, arguments, interleave, ratio_line, start
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from vimnas_ds.layout import Activation, ParamGrids
from vimnas_ds.model.supernet import Supernet
from vimnas_ds.model.tokens import tube_patches
from vimnas_ds.space import SPACES, Arch, SearchSpace
from vimnas_ds.train.optimizer import SampledAdamW
from vimnas_ds.tubes import TUBEVIT

HEAD_DIM, CLASSES, LR, DECAY = 64, 1000, 1e-3, 0.05
DATASET = "imagenet"  # the head's name, for clips too
REFERENCE = Arch.uniform(384, 13, 6, 3.5)


@dataclass(frozen=True)
class Case:
    """What is trained on what."""

    name: str
    space: SearchSpace
    arch: Arch
    batch: int
    frames: int | None
    goal: float

    @property
    def tokens(self) -> int:
        return TUBEVIT.num_tokens(self.frames, 224)

    def inputs(self, place: Place) -> tuple[Tensor, Tensor]:
        frames = () if self.frames is None else (self.frames,)
        x = torch.randn(self.batch, 3, *frames, 224, 224).to(place.device, place.dtype)
        return x, torch.randint(CLASSES, (self.batch,)).to(place.device)


IMAGES = Case("step_vit_s", SPACES["vit_s"], REFERENCE, 8, None, 1.00)


class TimmAttention(Attention):
    """timm's attention with our head width, whatever embed_dim / num_heads is."""

    def __init__(self, dim: int, num_heads: int, **rest: Any):
        super().__init__(dim, num_heads, attn_head_dim=HEAD_DIM, **rest)


class TimmVideo(nn.Module):
    """timm's blocks on the tokens of all tubes: the same patches, one nn.Linear a tube."""

    def __init__(self, arch: Arch):
        super().__init__()
        e = arch.embed_dim
        self.tubes = nn.ModuleList(
            nn.Linear(3 * math.prod(tube.kernel), e) for tube in TUBEVIT.tubes
        )
        self.blocks = nn.Sequential(
            *(
                Block(e, h, r, qkv_bias=True, attn_layer=TimmAttention, norm_layer=_norm)
                for h, r in zip(arch.num_heads, arch.mlp_ratio, strict=True)
            )
        )
        self.norm, self.head = nn.LayerNorm(e, eps=1e-6), nn.Linear(e, CLASSES)
        positions = torch.randn(1, TUBEVIT.num_tokens(32, 224), e)
        self.positions = nn.Parameter(positions, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = [
            linear(tube_patches(x, tube))
            for linear, tube in zip(self.tubes, TUBEVIT.tubes, strict=True)
        ]
        x = torch.cat(tokens, 1) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def _norm(dim: int, **rest: Any) -> nn.Module:
    return nn.LayerNorm(dim, eps=1e-6, **rest)


def build_timm(case: Case) -> nn.Module:
    """The case's sub-network in timm's layers, float32, on the CPU."""
    arch = case.arch
    if case.frames is not None:
        return TimmVideo(arch)
    net = VisionTransformer(
        embed_dim=arch.embed_dim,
        depth=arch.depth,
        num_heads=arch.num_heads[0],
        mlp_ratio=arch.mlp_ratio[0],
        num_classes=CLASSES,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        attn_layer=TimmAttention,
    )
    net.pos_embed.requires_grad_(False)
    assert isinstance(net, nn.Module)
    return net


def build_ours(case: Case) -> Supernet:
    """The whole supernet, float32, on the CPU."""
    return Supernet(case.space, TUBEVIT, {DATASET: CLASSES})


def ours(case: Case, place: Place) -> Callable[[], Tensor]:
    """Build our side; returns its step."""
    net = build_ours(case).to(place.device, place.dtype).train()
    masters = Masters(net)
    grids = ParamGrids(net.layouts(), case.space)
    optimizer = SampledAdamW(masters.named.items(), grids)
    optimizer.bind_plain()
    activation = Activation((case.arch,), DATASET, case.frames is None)
    x, y = case.inputs(place)

    def step() -> Tensor:
        net.zero_grad(set_to_none=True)
        loss = F.cross_entropy(net(x, case.arch, DATASET).float(), y)
        loss.backward()
        masters.pull_gradients()
        optimizer.activate(activation, LR, DECAY)
        optimizer.step()
        masters.push_weights()
        return loss.detach()

    return step


def theirs(case: Case, place: Place) -> Callable[[], Tensor]:
    """Build timm's side; returns its step."""
    net = build_timm(case).to(place.device, place.dtype).train()
    masters = Masters(net)
    trained = [p for p in masters.named.values() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=DECAY, fused=True)
    x, y = case.inputs(place)

    def step() -> Tensor:
        net.zero_grad(set_to_none=True)
        loss = F.cross_entropy(net(x).float(), y)
        loss.backward()
        masters.pull_gradients()
        optimizer.step()
        masters.push_weights()
        return loss.detach()

    return step


def profile(step: Callable[[], Tensor]) -> str:
    """The 16 operations that take most of a step's own CPU time: milliseconds, calls, name."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    steps = 5
    for _ in range(3):
        step()
    with record(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            step()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    lines = [
        f"  {e.self_cpu_time_total / steps / 1e3:8.1f} ms {e.count // steps:5d} x {e.key}"
        for e in events[:16]
    ]
    total = sum(e.self_cpu_time_total for e in events) / steps / 1e3
    return "\n".join([*lines, f"  {total:8.1f} ms in all"])


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--space", choices=("vit_s", "vit_b"), default="vit_s")
    parser.add_argument("--smallest", action="store_true", help="the space's smallest sub-network")
    parser.add_argument("--video", action="store_true", help="one clip of 32 frames")
    parser.add_argument("--profile", action="store_true", help="profile both, time nothing")
    args = parser.parse_args(argv)
    space = SPACES[args.space]
    if args.space != "vit_s" and not args.smallest:
        parser.error("--space vit_b needs --smallest: d13 e384 h6 r3.5 is vit_s's")
    arch = space.smallest() if args.smallest else REFERENCE
    name = f"step_{space.name}" + "_smallest" * args.smallest + "_video" * args.video
    frames, batch = (32, 1) if args.video else (None, 4 if args.smallest else 8)
    case = Case(name, space, arch, batch, frames, 1.05 if args.smallest else 1.00)
    place = start(args)
    print(f"{arch}: {batch} x {case.tokens} tokens")
    sides = {"supernet": ours(case, place), "timm": theirs(case, place)}
    if args.profile:
        for side, step in sides.items():
            print(f"{side}, a step:\n{profile(step)}")
        return 0
    medians = interleave(sides, place)
    print(ratio_line(case.name, medians["supernet"] / medians["timm"], case.goal))
    return 0


if __name__ == "__main__":
    sys.exit(main())
