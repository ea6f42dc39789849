"""A moving average on rectangles of flat tensors.

    a <- a + (1 - d_n) (w - a),   d_n = min(decay, (1 + n) / (10 + n))

with n the rectangle's own number of updates (TensorFlow's rule for a young average, here for each
rectangle by itself: one that is seldom sampled does not lag behind the others).
"""

from __future__ import annotations

import numpy as np
from torch import Tensor


def ema_share(n: int, decay: float) -> float:
    """How far the n-th update goes towards the weights, 1 - d_n."""
    return 1 - min(decay, (1 + n) / (10 + n))


def sliced_ema_(average: Tensor, weight: Tensor, rows: np.ndarray, shares: np.ndarray) -> None:
    """`average` goes `shares` (N,) of the way to `weight` on disjoint rectangles `rows` (N, 4) of
    both flat tensors (offset, rows, columns, row stride); the rest keeps its bits."""
    for (offset, height, width, stride), share in zip(rows.tolist(), shares.tolist(), strict=True):
        a, w = (
            t.as_strided((height, width), (stride, 1), t.storage_offset() + offset)
            for t in (average, weight)
        )
        a.lerp_(w, share)
