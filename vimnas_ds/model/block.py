"""One pre-norm transformer block with entangled widths.

    x = x + drop(scale1(proj(attention(qkv(norm1(x))))))
    x = x + drop(scale2(fc2(gelu(fc1(norm2(x))))))            GELU in its tanh form, or its erf form

`forward` is a sampled sub-network's block; `forward_superposed` is the alpha step's: full width,
weights constant, each decision acting once through a gate on activations (METHOD.md section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vimnas_ds.layout import Axis
from vimnas_ds.model.attention import attention, merge_heads, split_heads
from vimnas_ds.model.layers import EntangledLinear, EntangledNorm, EntangledScale
from vimnas_ds.model.options import ModelOptions
from vimnas_ds.model.relative import RelativeTables, relative_attention
from vimnas_ds.ops.gates import gated_gelu, head_gate
from vimnas_ds.ops.sliced_linear import sliced_mlp
from vimnas_ds.space import SearchSpace


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: drop a branch for whole samples of (B, N, D), scale the others."""
    if rate == 0.0 or not training:
        return x
    keep = x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - rate)
    return x * keep.div_(1 - rate)


class _Attention(nn.Module):
    """The projections around attention; q and k norms and relative positions if switched on."""

    def __init__(self, space: SearchSpace, layer: int, options: ModelOptions):
        super().__init__()
        self.head_dim, self.choices = space.head_dim, space.num_heads[layer]
        embed = Axis("embed", space.max_embed_dim)
        heads = Axis("heads", self.choices[-1] * space.head_dim)
        packed = options.packed_qkv_bias
        self.qkv = EntangledLinear(heads, embed, groups=3, layer=layer, packed=packed)
        self.proj = EntangledLinear(embed, heads, layer=layer)
        self.qk_norm = options.qk_norm
        if options.qk_norm:
            self.q_norm = EntangledNorm(Axis("all", space.head_dim), layer, options.norm_eps)
            self.k_norm = EntangledNorm(Axis("all", space.head_dim), layer, options.norm_eps)
        self.relative: RelativeTables | None = None
        if (reach := options.relative_positions) is not None:
            assert options.side is not None
            place = options.side, reach, options.class_token
            self.relative = RelativeTables(*place, space.head_dim, layer)

    def forward(self, x: Tensor, num_heads: int) -> Tensor:
        """x (B, N, D), normed -> the same shape."""
        q, k, v = (
            split_heads(y, self.head_dim)
            for y in self.qkv.forward_groups(x, num_heads * self.head_dim)
        )
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.relative is None:
            y = attention(q, k, v)
        else:
            y = relative_attention(q, k, v, *self.relative())
        return self.proj(merge_heads(y), x.shape[-1])

    def forward_frozen(self, x: Tensor, head_mass: Tensor) -> Tensor:
        """The same at full width, heads under their masses (H,); no weight gradients."""
        if self.qkv.packed:
            return self.proj.forward_frozen(self._mixed(x, head_mass))
        q, k, v = self.qkv.forward_frozen(x).chunk(3, -1)
        # masses stay in float32: bf16 would round most of a small alpha step away
        return self.proj.forward_frozen(head_gate(self._attend_frozen(q, k, v), head_mass))

    def _attend_frozen(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (split_heads(y, self.head_dim) for y in (q, k, v))
        if self.qk_norm:
            q, k = self.q_norm.forward_frozen(q), self.k_norm.forward_frozen(k)
        if self.relative is None:
            return merge_heads(attention(q, k, v))
        return merge_heads(relative_attention(q, k, v, *self.relative(frozen=True)))

    def _mixed(self, x: Tensor, head_mass: Tensor) -> Tensor:
        """Packed biases give a head other biases for every head count, so there is one attention
        for each, weighted by its probability: (B, N, H*K)."""
        weight, total = self.qkv.weight.detach(), self.choices[-1] * self.head_dim
        qkv = F.linear(x, weight).unflatten(-1, (3, total))
        contained = head_mass[[heads - 1 for heads in self.choices]]  # in this many, or more
        shares = contained - F.pad(contained[1:], (0, 1))
        mixed = torch.zeros((), device=x.device)
        for heads, share in zip(self.choices, shares, strict=True):
            width = heads * self.head_dim
            groups = qkv[..., :width] + self.qkv.packed_bias(width).detach()
            y = self._attend_frozen(*groups.unbind(-2)) * share  # in float32, as gates are
            mixed = mixed + F.pad(y, (0, total - width))
        return mixed.to(x.dtype)


class _Mlp(nn.Module):
    def __init__(self, hidden: Axis, embed: Axis, layer: int, erf: bool):
        super().__init__()
        self.fc1 = EntangledLinear(hidden, embed, layer=layer)
        self.fc2 = EntangledLinear(embed, hidden, layer=layer)
        self.erf = erf

    def forward(self, x: Tensor, hidden_dim: int, out_features: int) -> Tensor:
        """x (..., i) -> (..., out_features)"""
        if self.erf:  # the compiled operator's GELU is the tanh form
            return self.fc2(F.gelu(self.fc1(x, hidden_dim)), out_features)
        fc1, fc2 = self.fc1.grouped(), self.fc2.grouped()
        return sliced_mlp(x, fc1, fc2, hidden_dim, out_features)

    def forward_frozen(self, x: Tensor, hidden_mass: Tensor) -> Tensor:
        """The same at full width, hidden units under their masses (F,); no weight gradients."""
        return self.fc2.forward_frozen(
            gated_gelu(self.fc1.forward_frozen(x), hidden_mass, self.erf)
        )


class Block(nn.Module):
    """Layer `layer` of the supernet."""

    def __init__(self, space: SearchSpace, layer: int, options: ModelOptions):
        super().__init__()
        embed = Axis("embed", space.max_embed_dim)
        hidden = Axis("hidden", space.hidden_dims(layer)[-1])
        self.norm1 = EntangledNorm(embed, layer, options.norm_eps)
        self.attn = _Attention(space, layer, options)
        self.norm2 = EntangledNorm(embed, layer, options.norm_eps)
        self.mlp = _Mlp(hidden, embed, layer, options.gelu == "erf")
        self.layer_scale = options.layer_scale is not None
        if options.layer_scale is not None:
            self.ls1 = EntangledScale(embed, options.layer_scale, layer)
            self.ls2 = EntangledScale(embed, options.layer_scale, layer)

    def forward(self, x: Tensor, num_heads: int, hidden_dim: int, drop_rate: float) -> Tensor:
        """x (B, N, D) of the sampled width -> the same shape."""
        y = self.attn(self.norm1(x), num_heads)
        y = self.ls1(y) if self.layer_scale else y
        x = x + drop_path(y, drop_rate, self.training)
        y = self.mlp(self.norm2(x), hidden_dim, x.shape[-1])
        y = self.ls2(y) if self.layer_scale else y
        return x + drop_path(y, drop_rate, self.training)

    def forward_superposed(
        self,
        x: Tensor,
        embed_mass: Tensor,
        head_mass: Tensor,
        hidden_mass: Tensor,
        first: int = 0,
        stop: int = 2,
    ) -> Tensor:
        """x (B, N, D) at full width; masses (D,), (H,), (F,) in float32; no weight gradients.

        The branches `first` to before `stop` alone: 0 is attention, 1 the MLP.
        """
        if first == 0:
            x = self.superposed_attention(x, embed_mass, head_mass)
        return self.superposed_mlp(x, embed_mass, hidden_mass) if stop == 2 else x

    def superposed_attention(self, x: Tensor, embed_mass: Tensor, head_mass: Tensor) -> Tensor:
        y = self.attn.forward_frozen(self.norm1.forward_frozen(x, embed_mass), head_mass)
        return x + (self.ls1.forward_frozen(y) if self.layer_scale else y)

    def superposed_mlp(self, x: Tensor, embed_mass: Tensor, hidden_mass: Tensor) -> Tensor:
        y = self.mlp.forward_frozen(self.norm2.forward_frozen(x, embed_mass), hidden_mass)
        return x + (self.ls2.forward_frozen(y) if self.layer_scale else y)
