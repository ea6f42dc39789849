"""Gates of the superposed network: how soft choices act on activations.

A nested choice k keeps the leading `cuts[k]` channels. Weighting the padded weights of all choices
by p and applying them once equals multiplying channel c by the mass of all choices containing it:

    g[c] = sum_k p_k [cuts_k > c]                       (METHOD.md section 3)

A norm that reads the gated residual stream takes its statistics under the same masses, so that
with one-hot p it is exactly the narrow network's LayerNorm.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from vimnas_ds.ops._extension import usable


@lru_cache(maxsize=1024)
def _containing(cuts: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """(size, K) float32: 1 where choice k contains channel c. Made once, so that a step copies
    nothing to the device."""
    widths = torch.tensor(cuts)
    return (widths[None, :] > torch.arange(size)[:, None]).float().to(device)


def leading_mass(p: Tensor, cuts: Sequence[int], size: int) -> Tensor:
    """Mass of the choices that contain each channel: p (K,), cuts (K,) -> (size,)."""
    if len(cuts) != p.numel() or max(cuts) > size:
        raise ValueError(f"{p.numel()} masses do not fit cuts {tuple(cuts)} of {size} channels")
    return _containing(tuple(cuts), size, p.device) @ p


def hidden_mass(
    p_embed: Tensor, p_ratio: Tensor, embed_dims: Sequence[int], ratios: Sequence[float], size: int
) -> Tensor:
    """Mass of MLP hidden units: both choices decide the width int(e*r). -> (size,)"""
    widths = [int(e * r) for e in embed_dims for r in ratios]
    return leading_mass(torch.outer(p_embed, p_ratio).flatten(), widths, size)


def weighted_layer_norm(
    x: Tensor, mass: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """LayerNorm under channel masses, gated: x (..., D), mass (D,) fp32 -> (..., D) in x's dtype.

    mean = sum(g x)/sum(g), var = sum(g (x-mean)^2)/sum(g), result = g ((x-mean)/std * w + b).
    """
    wide = x.float()
    share = mass / mass.sum()
    mean = (wide * share).sum(-1, keepdim=True)
    centred = wide - mean
    var = (centred.square() * share).sum(-1, keepdim=True)
    normed = centred * torch.rsqrt(var + eps) * weight.float() + bias.float()
    return (normed * mass).to(x.dtype)


def gated_norm(x: Tensor, mass: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`weighted_layer_norm` with constant weight and bias: gradients reach x and mass alone."""
    weight, bias = weight.detach(), bias.detach()
    if usable(x):
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return torch.ops.vimnas_ds.gated_norm(x, mass, weight, bias, eps)
    return weighted_layer_norm(x, mass, weight, bias, eps)


def gated_gelu(x: Tensor, mass: Tensor, erf: bool = False) -> Tensor:
    """GELU, gated: x (..., F), mass (F,) float32 -> (..., F) in x's dtype. In its tanh form, or,
    without a compiled operator, in its `erf` form."""
    if usable(x) and not erf:
        return torch.ops.vimnas_ds.gated_gelu(x, mass)
    return (F.gelu(x, approximate="none" if erf else "tanh") * mass).to(x.dtype)


def head_gate(x: Tensor, mass: Tensor) -> Tensor:
    """Gate of whole heads: x (..., H*K), mass (H,) float32 -> (..., H*K) in x's dtype."""
    if usable(x):
        return torch.ops.vimnas_ds.head_gate(x, mass)
    return (x.unflatten(-1, (mass.numel(), -1)) * mass[:, None]).flatten(-2).to(x.dtype)
