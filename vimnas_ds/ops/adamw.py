"""AdamW on rectangles of flat tensors: the compiled pass, and the reference it is tested against.

    w <- w (1 - lr wd);  m <- m + (1-b1)(g - m);  v <- b2 v + (1-b2) g^2
    w <- w - step_size * m / (sqrt(v) / correction + eps)

with step_size = lr / (1-b1^n) and correction = sqrt(1-b2^n) of the rectangle's own n updates.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: (step_size, correction)
Rates = tuple[float, float]


def adamw_ref_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rates: Rates,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """torch.optim.AdamW's single-tensor update, bit for bit, in place on views of one shape."""
    step_size, correction = rates
    beta1, beta2 = betas
    weight.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / correction).add_(eps)
    weight.addcdiv_(exp_avg, denominator, value=-step_size)


def sliced_adamw_(
    tensors: tuple[Tensor, ...],
    rows: np.ndarray,
    rates: np.ndarray,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """The compiled update of disjoint rectangles of a flat float32 partition, in one pass.

    `tensors` are weights, gradient, first and second moments, contiguous and of one size; `rows`
    (N, 4) int64 are the rectangles as offset, rows, columns, row stride, `rates` (N, 2) float64
    their rates. What no rectangle holds keeps its bits. Needs the extension; equals
    `sliced_adamw_ref_` within rounding.
    """
    torch.ops.vimnas_ds.sliced_adamw_(
        *(t.view(-1) for t in tensors),
        torch.from_numpy(rows),
        torch.from_numpy(rates),
        1 - lr * weight_decay,
        *betas,
        eps,
    )


def sliced_adamw_ref_(
    tensors: tuple[Tensor, ...],
    rows: np.ndarray,
    rates: np.ndarray,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """`adamw_ref_` on every rectangle: the arguments of `sliced_adamw_`, on any device."""
    for (offset, height, width, stride), rate in zip(rows.tolist(), rates.tolist(), strict=True):
        w, g, m, v = (
            t.as_strided((height, width), (stride, 1), t.storage_offset() + offset) for t in tensors
        )
        adamw_ref_(w, g, m, v, tuple(rate), lr, weight_decay, betas, eps)
