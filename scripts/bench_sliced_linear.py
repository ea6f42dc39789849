"""The linear layer on a leading block of a shared weight / nn.Linear / slices under autograd.

    python scripts/bench_sliced_linear.py

Forward and backward (gradients of input, weight and bias) of the four layers of a vit_s block,
sub-network d13 e384 h6 r3.5, at 200 and 1576 rows (about 1 and 8 images), geometric mean over the
layers. Baselines: nn.Linear of exactly the sub-network's size (its own weights), and F.linear on a
slice of the whole weight, one slice for each of q, k, v, whose gradients autograd pads.

Floor against nn.Linear: the same 6 o i rows FLOPs, and one write of zeros outside the block (fc1:
0.29 M elements of 0.80 M, 1.1 MB, against 0.62 GFLOP at 200 rows). Half a minute.
"""

from __future__ import annotations

import sys

import torch
from bench_common import Place, Side, arguments, geometric_mean, interleave, ratio_line, start
from torch import Tensor, nn
from torch.nn import functional as F

from vimnas_ds.ops.sliced_linear import sliced_linear

#: layer -> (groups, whole out, whole in, out, in)
LAYERS = {
    "qkv": (3, 448, 448, 384, 384),
    "proj": (1, 448, 448, 384, 384),
    "fc1": (1, 1792, 448, 1344, 384),
    "fc2": (1, 448, 1792, 384, 1344),
}
ROWS = (200, 1576)
GOAL_LINEAR, GOAL_SLICE = 1.02, 0.90


def sides(layer: str, rows: int, place: Place) -> dict[str, Side]:
    """The three ways to do one layer."""
    groups, whole_out, whole_in, out, width = LAYERS[layer]
    device, dtype = place.device, place.dtype
    weight = (torch.randn(groups, whole_out, whole_in) * 0.02).to(device, dtype).requires_grad_()
    bias = torch.zeros(groups, whole_out).to(device, dtype).requires_grad_()
    x = torch.randn(rows, width).to(device, dtype).requires_grad_()
    linear = nn.Linear(width, groups * out, device=device, dtype=dtype)
    dy = torch.randn(rows, groups * out).to(device, dtype)
    parts = [part.contiguous() for part in dy.chunk(groups, -1)]

    def ours() -> tuple[Tensor, ...]:
        y = sliced_linear(x, weight, bias, out)
        return torch.autograd.grad(y, (x, weight, bias), parts)

    def dense() -> tuple[Tensor, ...]:
        return torch.autograd.grad([linear(x)], (x, linear.weight, linear.bias), [dy])

    def slices() -> tuple[Tensor, ...]:
        y = [F.linear(x, weight[g, :out, :width], bias[g, :out]) for g in range(groups)]
        return torch.autograd.grad(y, (x, weight, bias), parts)

    return {"sliced_linear": ours, "nn.Linear": dense, "slices": slices}


def main(argv: list[str] | None = None) -> int:
    args = arguments(__doc__).parse_args(argv)
    place = start(args)
    lines = []
    for rows in ROWS:
        against: dict[str, list[float]] = {"nn.Linear": [], "slices": []}
        for layer in LAYERS:
            print(f"{layer}, {rows} rows")
            medians = interleave(sides(layer, rows, place), place, 3, floor_seconds=0.03)
            for name, ratios in against.items():
                ratios.append(medians["sliced_linear"] / medians[name])
            print("  ratios", " ".join(f"{n} {r[-1]:.3f}" for n, r in against.items()))
        dense, slices = (geometric_mean(r) for r in against.values())
        lines.append(ratio_line(f"sliced_linear_{rows}_rows_vs_nn.Linear", dense, GOAL_LINEAR))
        if rows == ROWS[0]:
            lines.append(ratio_line(f"sliced_linear_{rows}_rows_vs_slices", slices, GOAL_SLICE))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
