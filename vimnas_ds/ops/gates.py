"""Gates of the superposed network: how soft choices act on activations.

A nested choice k keeps the leading `cuts[k]` channels. Weighting the padded weights of all choices
by p and applying them once equals multiplying channel c by the mass of all choices containing it:

    g[c] = sum_k p_k [cuts_k > c]                       (METHOD.md section 3)

A norm that reads the gated residual stream takes its statistics under the same masses, so that
with one-hot p it is exactly the narrow network's LayerNorm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def leading_mass(p: Tensor, cuts: Sequence[int], size: int) -> Tensor:
    """Mass of the choices that contain each channel: p (K,), cuts (K ascending) -> (size,)."""
    if len(cuts) != p.numel() or list(cuts) != sorted(cuts) or cuts[-1] > size:
        raise ValueError(f"{p.numel()} masses do not fit cuts {tuple(cuts)} of {size} channels")
    tail = p.flip(0).cumsum(0).flip(0)  # tail[k] = p_k + p_{k+1} + ...
    widths = torch.tensor([*cuts], device=p.device)
    widths = torch.diff(widths, prepend=widths.new_zeros(1))
    mass = tail.repeat_interleave(widths)
    return torch.nn.functional.pad(mass, (0, size - cuts[-1]))


def hidden_mass(
    p_embed: Tensor, p_ratio: Tensor, embed_dims: Sequence[int], ratios: Sequence[float], size: int
) -> Tensor:
    """Mass of MLP hidden units: both choices decide the width int(e*r). -> (size,)"""
    joint = torch.outer(p_embed, p_ratio).flatten()
    widths = [int(e * r) for e in embed_dims for r in ratios]
    order = sorted(range(len(widths)), key=widths.__getitem__)
    index = torch.tensor(order, device=joint.device)
    return leading_mass(joint[index], [widths[i] for i in order], size)


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
