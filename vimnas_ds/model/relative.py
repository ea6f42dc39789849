"""Attention with learned 2-D relative positions (AutoFormer; Shaw et al., 2018).

    scores = (q k^T + q R_k^T) / sqrt(K)       output = p v + p R_v       p = softmax(scores)
    R[n, m] = V[row(m) - row(n)] + H[column(m) - column(n)]

Distances are clamped to the tables' reach; entry 0 of each stands for the class token on either
side. All heads of a layer share its tables. No flash kernel computes this: the scores are made.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vimnas_ds.layout import Axis
from vimnas_ds.model.layers import EntangledTable


def distance_entries(side: int, reach: int, class_token: bool) -> tuple[Tensor, Tensor]:
    """Entries of the vertical and the horizontal table for all pairs of tokens, (N, N) each, the
    class token first. On the CPU even while weights are built on "meta"."""
    patches = torch.arange(side**2, device="cpu")

    def entries(places: Tensor) -> Tensor:
        distance = places[None, :] - places[:, None]
        found = distance.clamp(-reach, reach) + reach + 1
        return F.pad(found, (1, 0, 1, 0)) if class_token else found

    return entries(patches // side), entries(patches % side)


def relative_attention(q: Tensor, k: Tensor, v: Tensor, r_k: Tensor, r_v: Tensor) -> Tensor:
    """q, k, v (B, H, N, K); r_k, r_v (N, N, K) -> (B, H, N, K)"""
    q = q * q.shape[-1] ** -0.5
    p = (q @ k.mT + torch.einsum("bhnk,nmk->bhnm", q, r_k)).softmax(-1)
    return p @ v + torch.einsum("bhnm,nmk->bhnk", p, r_v)


class RelativeTables(nn.Module):
    """A layer's tables of 2 * reach + 2 rows, vertical and horizontal, for keys and for values."""

    rows: Tensor
    columns: Tensor

    def __init__(self, side: int, reach: int, class_token: bool, head_dim: int, layer: int):
        super().__init__()

        def table() -> EntangledTable:
            return EntangledTable(2 * reach + 2, Axis("all", head_dim), layer)

        self.k_rows, self.k_columns, self.v_rows, self.v_columns = (table() for _ in range(4))
        rows, columns = distance_entries(side, reach, class_token)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """R_k, R_v: (N, N, K) each; `frozen`: no gradients."""

        def of(rows: EntangledTable, columns: EntangledTable) -> Tensor:
            width = rows.axis.size
            return rows(width, frozen)[self.rows] + columns(width, frozen)[self.columns]

        return of(self.k_rows, self.k_columns), of(self.v_rows, self.v_columns)
