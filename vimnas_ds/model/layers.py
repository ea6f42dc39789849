"""Entangled layers: whole parameters, used through their leading blocks.

Each layer takes its input width from its input and is told its output width; it keeps no
architecture. `param_layouts` says how its parameters are cut (see `vimnas_ds.layout`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vimnas_ds.layout import Axis, ParamLayout
from vimnas_ds.model.options import NORM_EPS
from vimnas_ds.ops.gates import gated_norm
from vimnas_ds.ops.layer_norm import layer_norm
from vimnas_ds.ops.sliced_linear import sliced_linear


class EntangledLinear(nn.Module):
    """y = x W[:o, :i]^T + b[:o]. `groups` stacks equal projections (3 for q, k, v): every head
    count then takes the leading rows of each group, and no row or bias changes its role.

    `packed` (q, k, v alone): the biases are one vector of which o outputs take the first 3 o, q's,
    k's and v's in turn, so that their roles change with o (AutoFormer)."""

    def __init__(
        self,
        out_axis: Axis,
        in_axis: Axis,
        groups: int = 1,
        layer: int | None = None,
        dataset: str | None = None,
        video_only: bool = False,
        packed: bool = False,
    ):
        super().__init__()
        self.groups, self.out_axis, self.in_axis, self.packed = groups, out_axis, in_axis, packed
        self.layer, self.dataset, self.video_only = layer, dataset, video_only
        self.weight = nn.Parameter(torch.empty(groups * out_axis.size, in_axis.size))
        self.bias = nn.Parameter(torch.zeros(groups * out_axis.size))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward_groups(self, x: Tensor, out_features: int) -> list[Tensor]:
        """x (..., i) -> one (..., out_features) per group."""
        weight, bias = self.grouped()
        if self.packed:  # padded to the width that the operator expects
            bias = F.pad(self.packed_bias(out_features), (0, bias.shape[1] - out_features))
        return sliced_linear(x, weight, bias, out_features)

    def packed_bias(self, out_features: int) -> Tensor:
        """(G, out_features): the biases of so many outputs where they are packed."""
        return self.bias[: self.groups * out_features].view(self.groups, out_features)

    def grouped(self) -> tuple[Tensor, Tensor]:
        """The parameters as the operators take them: weight (G, O, I), bias (G, O)."""
        o, i = self.out_axis.size, self.in_axis.size
        return self.weight.view(self.groups, o, i), self.bias.view(self.groups, o)

    def forward(self, x: Tensor, out_features: int) -> Tensor:
        """x (..., i) -> (..., out_features), for a layer of one group."""
        (y,) = self.forward_groups(x, out_features)
        return y

    def forward_frozen(self, x: Tensor) -> Tensor:
        """The full layer with its weights held constant (the alpha step)."""
        return F.linear(x, self.weight.detach(), self.bias.detach())

    def param_layouts(self) -> dict[str, ParamLayout]:
        stack = (Axis("all", self.groups),) if self.groups > 1 else ()
        place = (self.layer, self.dataset, self.video_only)
        outputs = (Axis("qkv", len(self.bias)),) if self.packed else (*stack, self.out_axis)
        return {
            "weight": ParamLayout((*stack, self.out_axis, self.in_axis), *place),
            "bias": ParamLayout(outputs, *place, decay=False),
        }


class EntangledNorm(nn.Module):
    """LayerNorm over the leading channels of its axis (embed_dim, or a fixed head width)."""

    def __init__(self, axis: Axis, layer: int | None = None, eps: float = NORM_EPS):
        super().__init__()
        self.axis, self.layer, self.eps = axis, layer, eps
        self.weight = nn.Parameter(torch.ones(axis.size))
        self.bias = nn.Parameter(torch.zeros(axis.size))

    def forward(self, x: Tensor) -> Tensor:
        d = x.shape[-1]
        return layer_norm(x, self.weight[:d], self.bias[:d], self.eps)

    def forward_frozen(self, x: Tensor, mass: Tensor | None = None) -> Tensor:
        """With weights held constant; under channel masses (D,) when they are given."""
        weight, bias = self.weight.detach(), self.bias.detach()
        if mass is None:
            return layer_norm(x, weight, bias, self.eps)
        return gated_norm(x, mass, weight, bias, self.eps)

    def param_layouts(self) -> dict[str, ParamLayout]:
        layout = ParamLayout((self.axis,), self.layer, decay=False)
        return {"weight": layout, "bias": layout}


class EntangledScale(nn.Module):
    """LayerScale: one learned factor per channel on a branch (DeiT-III)."""

    def __init__(self, axis: Axis, init: float, layer: int):
        super().__init__()
        self.axis, self.layer = axis, layer
        self.gamma = nn.Parameter(torch.full((axis.size,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma[: x.shape[-1]]

    def forward_frozen(self, x: Tensor) -> Tensor:
        return x * self.gamma.detach()

    def param_layouts(self) -> dict[str, ParamLayout]:
        return {"gamma": ParamLayout((self.axis,), self.layer, decay=False)}


class EntangledTable(nn.Module):
    """Learned vectors, one a row, of which the leading channels of an axis are used: a class token,
    positions, relative positions. No weight decay acts on them."""

    def __init__(self, rows: int, axis: Axis, layer: int | None = None):
        super().__init__()
        self.axis, self.layer = axis, layer
        self.weight = nn.Parameter(torch.empty(rows, axis.size))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, width: int, frozen: bool = False) -> Tensor:
        """(rows, width); `frozen`: held constant."""
        return (self.weight.detach() if frozen else self.weight)[:, :width]

    def param_layouts(self) -> dict[str, ParamLayout]:
        axes = (Axis("all", len(self.weight)), self.axis)
        return {"weight": ParamLayout(axes, self.layer, decay=False)}
