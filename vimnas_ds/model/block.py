"""One pre-norm transformer block with entangled widths.

    x = x + drop(scale1(proj(attention(qkv(norm1(x))))))
    x = x + drop(scale2(fc2(gelu(fc1(norm2(x))))))            GELU in its tanh form everywhere

`forward` is a sampled sub-network's block; `forward_superposed` is the alpha step's: full width,
weights constant, each decision acting once through a gate on activations (METHOD.md section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vimnas_ds.layout import Axis
from vimnas_ds.model.attention import attention, merge_heads, split_heads
from vimnas_ds.model.layers import EntangledLinear, EntangledNorm, EntangledScale
from vimnas_ds.ops.gates import gated_gelu, head_gate
from vimnas_ds.ops.sliced_linear import sliced_mlp
from vimnas_ds.space import SearchSpace


@dataclass(frozen=True)
class ModelOptions:
    """The network's switches; see `config.ModelSection` for their meaning."""

    qk_norm: bool = False
    layer_scale: float | None = None
    drop_path: float = 0.0
    activation_checkpointing: bool = False


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: drop a branch for whole samples of (B, N, D), scale the others."""
    if rate == 0.0 or not training:
        return x
    keep = x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - rate)
    return x * keep.div_(1 - rate)


class _Attention(nn.Module):
    """The projections around attention; q and k norms only if switched on."""

    def __init__(self, heads: Axis, embed: Axis, layer: int, qk_norm_dim: int | None):
        super().__init__()
        self.qkv = EntangledLinear(heads, embed, groups=3, layer=layer)
        self.proj = EntangledLinear(embed, heads, layer=layer)
        if qk_norm_dim is not None:
            self.q_norm = EntangledNorm(Axis("all", qk_norm_dim), layer)
            self.k_norm = EntangledNorm(Axis("all", qk_norm_dim), layer)


class _Mlp(nn.Module):
    def __init__(self, hidden: Axis, embed: Axis, layer: int):
        super().__init__()
        self.fc1 = EntangledLinear(hidden, embed, layer=layer)
        self.fc2 = EntangledLinear(embed, hidden, layer=layer)

    def forward(self, x: Tensor, hidden_dim: int, out_features: int) -> Tensor:
        """x (..., i) -> (..., out_features)"""
        fc1, fc2 = self.fc1.grouped(), self.fc2.grouped()
        return sliced_mlp(x, fc1, fc2, hidden_dim, out_features)


class Block(nn.Module):
    """Layer `layer` of the supernet."""

    def __init__(self, space: SearchSpace, layer: int, options: ModelOptions):
        super().__init__()
        embed = Axis("embed", space.max_embed_dim)
        heads = Axis("heads", space.num_heads[layer][-1] * space.head_dim)
        hidden = Axis("hidden", space.hidden_dims(layer)[-1])
        self.head_dim = space.head_dim
        self.norm1 = EntangledNorm(embed, layer)
        self.attn = _Attention(heads, embed, layer, space.head_dim if options.qk_norm else None)
        self.norm2 = EntangledNorm(embed, layer)
        self.mlp = _Mlp(hidden, embed, layer)
        self.qk_norm, self.layer_scale = options.qk_norm, options.layer_scale is not None
        if options.layer_scale is not None:
            self.ls1 = EntangledScale(embed, options.layer_scale, layer)
            self.ls2 = EntangledScale(embed, options.layer_scale, layer)

    def forward(self, x: Tensor, num_heads: int, hidden_dim: int, drop_rate: float) -> Tensor:
        """x (B, N, D) of the sampled width -> the same shape."""
        d = x.shape[-1]
        q, k, v = self.attn.qkv.forward_groups(self.norm1(x), num_heads * self.head_dim)
        q, k, v = (split_heads(y, self.head_dim) for y in (q, k, v))
        if self.qk_norm:
            q, k = self.attn.q_norm(q), self.attn.k_norm(k)
        y = self.attn.proj(merge_heads(attention(q, k, v)), d)
        y = self.ls1(y) if self.layer_scale else y
        x = x + drop_path(y, drop_rate, self.training)
        y = self.mlp(self.norm2(x), hidden_dim, d)
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
        qkv = self.attn.qkv.forward_frozen(self.norm1.forward_frozen(x, embed_mass))
        q, k, v = (split_heads(y, self.head_dim) for y in qkv.chunk(3, -1))
        if self.qk_norm:
            q, k = self.attn.q_norm.forward_frozen(q), self.attn.k_norm.forward_frozen(k)
        # masses stay in float32: bf16 would round most of a small alpha step away
        y = self.attn.proj.forward_frozen(head_gate(merge_heads(attention(q, k, v)), head_mass))
        return x + (self.ls1.forward_frozen(y) if self.layer_scale else y)

    def superposed_mlp(self, x: Tensor, embed_mass: Tensor, hidden_mass: Tensor) -> Tensor:
        y = self.mlp.fc1.forward_frozen(self.norm2.forward_frozen(x, embed_mass))
        y = self.mlp.fc2.forward_frozen(gated_gelu(y, hidden_mass))
        return x + (self.ls2.forward_frozen(y) if self.layer_scale else y)
