"""AdamW on rectangles of flat tensors: the compiled pass, and the reference it is tested against.

    w <- w (1 - lr wd);  m <- m + (1-b1)(g - m);  v <- b2 v + (1-b2) g^2
    w <- w - step_size * m / (sqrt(v) / correction + eps)

with step_size = lr / (1-b1^n) and correction = sqrt(1-b2^n) of the rectangle's own n updates.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vimnas_ds.ops.boxes import StridedBox, as_rows

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
    boxes: Iterable[tuple[StridedBox, Rates]],
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """The compiled update of disjoint boxes of a flat float32 partition, in one pass.

    `tensors` are weights, gradient, first and second moments, contiguous and of one size; what no
    box holds keeps its bits. Needs the extension; equals the reference within rounding.
    """
    rows = [(row, rates) for box, rates in boxes for row in as_rows(box)]
    torch.ops.vimnas_ds.sliced_adamw_(
        *(t.view(-1) for t in tensors),
        torch.tensor([row for row, _ in rows]),
        torch.tensor([rates for _, rates in rows], dtype=torch.float64),
        1 - lr * weight_decay,
        *betas,
        eps,
    )
