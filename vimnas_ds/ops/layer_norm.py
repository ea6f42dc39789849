"""LayerNorm over the last axis: y = (x - mean) / sqrt(var + eps) * weight + bias.

NVIDIA apex's fused kernel on CUDA where it is installed and compiled, PyTorch's otherwise.
"""

from __future__ import annotations

from torch import Tensor

from vimnas_ds.ops.apex import fused_layer_norm


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D,), bias (D,) -> (..., D)."""
    return fused_layer_norm()(x, weight, bias, eps)
