"""Scaled dot-product attention through one function.

`scaled_dot_product_attention` picks the fused kernel by itself: flash or cuDNN on a GPU, its flash
kernel on a CPU (fp32 and bf16, with backward, no copy of q, k, v).
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, N, H*K) -> (B, H, N, K)"""
    return rearrange(x, "b n (h k) -> b h n k", k=head_dim)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, K) -> (B, N, H*K)"""
    return rearrange(x, "b h n k -> b n (h k)")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v: all (B, H, N, K)."""
    return F.scaled_dot_product_attention(q, k, v)
