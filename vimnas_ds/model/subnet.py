"""One sub-network on its own: an ordinary ViT of plain torch layers, no supernet inside.

Parameter names are the supernet's (and timm's where timm has them), so the sliced weights load as
they are; the code is written independently and serves as the supernet's reference in the tests.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vimnas_ds.model.block import ModelOptions, drop_path
from vimnas_ds.model.layers import NORM_EPS
from vimnas_ds.model.tokens import sincos_positions, to_clip, token_centres
from vimnas_ds.space import Arch
from vimnas_ds.tubes import TokenGeometry


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, head_dim: int, qk_norm: bool):
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim)
        self.proj = nn.Linear(num_heads * head_dim, dim)
        self.q_norm = nn.LayerNorm(head_dim, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=NORM_EPS) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (g h k) -> g b h n k", g=3, k=self.head_dim)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(rearrange(y, "b h n k -> b n (h k)"))


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class _Tokens(nn.Module):
    def __init__(self, geometry: TokenGeometry, dim: int):
        super().__init__()
        self.tubes = nn.ModuleList(nn.Conv3d(3, dim, t.kernel, t.stride) for t in geometry.tubes)


class _Scale(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Block(nn.Module):
    def __init__(self, arch: Arch, layer: int, head_dim: int, options: ModelOptions):
        super().__init__()
        dim, hidden = arch.embed_dim, arch.hidden_dim(layer)
        self.drop_rate = options.drop_path * layer / max(arch.depth - 1, 1)
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = _Attention(dim, arch.num_heads[layer], head_dim, options.qk_norm)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = _Mlp(dim, hidden)
        scaled = options.layer_scale is not None
        self.ls1 = _Scale(dim) if scaled else nn.Identity()
        self.ls2 = _Scale(dim) if scaled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.ls1(self.attn(self.norm1(x)))
        x = x + drop_path(y, self.drop_rate, self.training)
        y = self.ls2(self.mlp(self.norm2(x)))
        return x + drop_path(y, self.drop_rate, self.training)


class SubNetwork(nn.Module):
    """A ViT of fixed widths with the supernet's tokens, positions and heads.

    `position_dim` is the supernet's largest embed_dim: it fixes the positions' frequencies.
    """

    def __init__(
        self,
        arch: Arch,
        head_dim: int,
        geometry: TokenGeometry,
        num_classes: Mapping[str, int],
        options: ModelOptions,
        position_dim: int,
    ):
        super().__init__()
        self.arch, self.geometry, self.options = arch, geometry, options
        self.head_dim, self.position_dim = head_dim, position_dim
        self.tokens = _Tokens(geometry, arch.embed_dim)
        self.blocks = nn.Sequential(
            *(_Block(arch, i, head_dim, options) for i in range(arch.depth))
        )
        self.norm = nn.LayerNorm(arch.embed_dim, eps=NORM_EPS)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(arch.embed_dim, n) for name, n in num_classes.items()}
        )
        self._positions: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def forward(self, x: Tensor, dataset: str) -> Tensor:
        """(B, 3, H, W) or (B, 3, T, H, W) -> logits (B, classes of `dataset`)."""
        return self.classify(self.patches(x), self.positions(tuple(x.shape[2:]), x.device), dataset)

    def patches(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) or (B, 3, T, H, W) -> tokens without their positions, (B, N, D)."""
        clip, is_image = to_clip(x, self.geometry)
        tokens = []
        for index in self.geometry.active_tubes(is_image):
            t, h, w = self.geometry.tubes[index].offset
            y = self.tokens.tubes[index](clip[:, :, t:, h:, w:])
            tokens.append(rearrange(y, "b d t h w -> b (t h w) d"))
        return torch.cat(tokens, 1)

    def positions(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """(N, D) float32 of inputs (B, 3, *shape): images (H, W) or clips (T, H, W)."""
        if (shape, device) not in self._positions:
            is_image = len(shape) == 2
            height, width = shape[-2:]
            frames = self.geometry.image_frames if is_image else shape[0]
            centres = token_centres(self.geometry, (frames, height, width), is_image)
            position = sincos_positions(centres, self.position_dim)[:, : self.arch.embed_dim]
            self._positions[shape, device] = position.to(device)
        return self._positions[shape, device]

    def classify(self, tokens: Tensor, positions: Tensor, dataset: str) -> Tensor:
        """Tokens (B, N, D) and their positions (N, D) -> logits (B, classes of `dataset`)."""
        x = self.blocks(tokens + positions.to(tokens.dtype))
        return self.heads[dataset](self.norm(x).mean(1))

    def only(self, dataset: str, shape: tuple[int, ...]) -> OneHead:
        """What inputs (B, 3, *shape) of one dataset need of it."""
        return OneHead(self, dataset, shape)


class OneHead(nn.Module):
    """`net(x, dataset)` for inputs (B, 3, *shape) alone: a copy without the other heads and the
    tubes such inputs do not pass through, the positions a buffer. What programs are made of."""

    positions: Tensor

    def __init__(self, net: SubNetwork, dataset: str, shape: tuple[int, ...]):
        super().__init__()
        geometry = net.geometry
        active = geometry.active_tubes(is_image=len(shape) == 2)
        tubes = tuple(geometry.tubes[i] for i in active)
        self.net, self.dataset = copy.deepcopy(net), dataset
        self.net.geometry = TokenGeometry(tubes, active.index(geometry.image_tube))
        self.net.tokens.tubes = nn.ModuleList(self.net.tokens.tubes[i] for i in active)
        self.net.heads = nn.ModuleDict({dataset: self.net.heads[dataset]})
        positions = net.positions(shape, next(net.parameters()).device)
        self.register_buffer("positions", positions.contiguous())

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, *shape) -> logits (B, classes)."""
        return self.net.classify(self.net.patches(pixels), self.positions, self.dataset)
