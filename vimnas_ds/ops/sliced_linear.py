"""Linear layer on the leading block of a shared weight: y = x W[:o, :i]^T + b[:o].

The weight stays whole and is never copied: BLAS reads the block through its leading dimension.
Backward gives one full-size dW, zero outside the block, because ZeRO-2 reduces gradients of whole
parameters; autograd's own slices would allocate full-size zeros once per slice (measured: 24 MiB
for a 3 MiB gradient). The compiled operator (csrc/sliced_linear.cpp) does this where it is there,
`_SlicedLinear` elsewhere; `sliced_linear_ref` is the same through autograd, the tests' reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vimnas_ds.ops._extension import usable


def sliced_linear_ref(
    x: Tensor, weight: Tensor, bias: Tensor, out_features: int, gelu: bool = False
) -> list[Tensor]:
    """What `sliced_linear` computes, by slicing under autograd."""
    groups, _, _ = weight.shape
    i = x.shape[-1]
    parts = [
        F.linear(x, weight[g, :out_features, :i], bias[g, :out_features]) for g in range(groups)
    ]
    return [F.gelu(part, approximate="tanh") for part in parts] if gelu else parts


class _SlicedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, out_features: int) -> Tensor:
        groups, _, _ = weight.shape
        i = x.shape[-1]
        rows = x.reshape(-1, i)  # (M, i)
        y = x.new_empty(groups, rows.shape[0], out_features)
        for g in range(groups):
            block = weight[g, :out_features, :i]
            torch.addmm(bias[g, :out_features], rows, block.t(), out=y[g])
        ctx.save_for_backward(rows, weight)
        ctx.x_shape = x.shape
        return y.view(groups, *x.shape[:-1], out_features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, None]:
        rows, weight = ctx.saved_tensors
        groups, total_out, _ = weight.shape
        i, out = rows.shape[1], grads[0].shape[-1]
        dy = grads[0].reshape(groups, -1, out)  # (G, M, o)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = dy[0] @ weight[0, :out, :i]
            for g in range(1, groups):
                dx.addmm_(dy[g], weight[g, :out, :i])
            dx = dx.view(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            dw = torch.zeros_like(weight)
            for g in range(groups):
                dw[g, :out, :i].addmm_(dy[g].t(), rows, beta=0)
        db = weight.new_zeros(groups, total_out)
        torch.sum(dy, 1, out=db[:, :out])
        return dx, dw, db, None


def sliced_linear(
    x: Tensor, weight: Tensor, bias: Tensor, out_features: int, gelu: bool = False
) -> list[Tensor]:
    """Linear map through the leading block of each of G stacked weights.

    Args:
        x: (..., i), i at most I.
        weight: (G, O, I); G is 3 for a stacked q, k, v projection, else 1.
        bias: (G, O).
        out_features: o, at most O.
        gelu: apply GELU (tanh form) to the result.

    Returns: G tensors (..., o). The gradients of weight and bias are full-size, zero outside the
    block.
    Raises ValueError when the block exceeds the weight or the dtypes differ.
    """
    if usable(x):
        return torch.ops.vimnas_ds.sliced_linear(x, weight, bias, out_features, gelu)
    groups, total_out, total_in = weight.shape
    if x.shape[-1] > total_in or not 0 < out_features <= total_out:
        raise ValueError(
            f"block ({out_features}, {x.shape[-1]}) does not fit a weight of "
            f"({total_out}, {total_in})"
        )
    if bias.shape != (groups, total_out):
        raise ValueError(f"bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}")
    if not x.dtype == weight.dtype == bias.dtype:
        raise ValueError(f"one dtype is needed, got {x.dtype}, {weight.dtype}, {bias.dtype}")
    parts = _SlicedLinear.apply(x, weight, bias, out_features).unbind(0)
    return [F.gelu(part, approximate="tanh") for part in parts] if gelu else list(parts)


def sliced_mlp(
    x: Tensor,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    hidden: int,
    out_features: int,
) -> Tensor:
    """A block's MLP: `sliced_linear` to `hidden` with GELU, then `sliced_linear` to `out_features`.

    `first` and `second` are (weight (1, O, I), bias (1, O)); x (..., i) -> (..., out_features).
    The compiled operator keeps the hidden pre-activations alone for backward and computes GELU
    again there; the reference keeps GELU's result too. Raises what `sliced_linear` raises.
    """
    if usable(x):
        return torch.ops.vimnas_ds.sliced_mlp(x, *first, *second, hidden, out_features)
    (h,) = sliced_linear(x, *first, hidden, gelu=True)
    (y,) = sliced_linear(h, *second, out_features)
    return y
