"""AdamW on the sampled half of a partition / torch's fused AdamW on all of it.

    python scripts/bench_adamw.py

A flat float32 partition of 50 M elements of the vit_b supernet, of which the smallest sub-network
has half: leading blocks of every weight of 14 of its 16 layers. Ours updates those blocks through
the operator `sliced_adamw_`; theirs is torch.optim.AdamW(fused=True) on the whole partition.

Floor 0.50: 28 bytes moved for each updated element (read w, g, m, v, write w, m, v), 0.7 against
1.4 GB. A few seconds.
"""

from __future__ import annotations

import sys

import torch
from bench_common import arguments, interleave, ratio_line, start
from torch import nn

from vimnas_ds.model.supernet import Supernet
from vimnas_ds.ops.boxes import as_rows, boxes_in_range
from vimnas_ds.space import SPACES
from vimnas_ds.tubes import TUBEVIT

GOAL, SIZE, TAIL = 0.55, 50_000_000, 2_500_000
LR, DECAY, BETAS, EPS = 1e-3, 0.05, (0.9, 0.999), 1e-8


def sampled_boxes() -> list[tuple[int, int, int, int]]:
    """(offset, rows, columns, row stride) of the smallest vit_b sub-network in a partition that
    ends TAIL elements before the end of the blocks' parameters, in their order."""
    space = SPACES["vit_b"]
    with torch.device("meta"):
        net = Supernet(space, TUBEVIT, {"imagenet": 1000})
    layouts = net.layouts()
    names = [name for name in layouts if name.startswith("blocks.")]
    total = sum(torch.Size(layouts[name].shape).numel() for name in names)
    begin, end = total - TAIL - SIZE, total - TAIL
    found: list[tuple[int, int, int, int]] = []
    at = 0
    for name in names:
        layout = layouts[name]
        numel = torch.Size(layout.shape).numel()
        extents = layout.extents(space.smallest(), space.head_dim)
        first, last = max(begin - at, 0), min(end - at, numel)
        if extents is not None and first < last:
            low = [0] * len(extents)
            for offset, sizes, strides in boxes_in_range(layout.shape, low, extents, first, last):
                shifted = (at - begin + offset, sizes, strides)
                found += as_rows(shifted)
        at += numel
    return found


def main(argv: list[str] | None = None) -> int:
    args = arguments(__doc__).parse_args(argv)
    place = start(args)
    rows = sampled_boxes()
    share = sum(r * c for _, r, c, _ in rows) / SIZE
    print(f"{len(rows)} boxes, {share:.3f} of {SIZE / 1e6:.0f} M elements")
    boxes = torch.tensor(rows, dtype=torch.int64)
    correction = (1 - BETAS[1] ** 10) ** 0.5
    rates = torch.tensor([[LR / (1 - BETAS[0] ** 10), correction]] * len(rows), dtype=torch.float64)
    param, grad = (torch.randn(SIZE, device=place.device) * 0.02 for _ in range(2))
    exp_avg, exp_avg_sq = torch.zeros_like(param), torch.zeros_like(param)
    whole = nn.Parameter(param.clone())
    whole.grad = grad.clone()
    stock = torch.optim.AdamW([whole], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)

    def ours() -> None:
        torch.ops.vimnas_ds.sliced_adamw_(
            param, grad, exp_avg, exp_avg_sq, boxes, rates, 1 - LR * DECAY, *BETAS, EPS
        )

    medians = interleave({"sliced_adamw_": ours, "AdamW(fused=True)": stock.step}, place)
    ratio = medians["sliced_adamw_"] / medians["AdamW(fused=True)"]
    print(ratio_line("adamw_half", ratio, GOAL))
    return 0


if __name__ == "__main__":
    sys.exit(main())
