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

from vimnas_ds.model.block import drop_path
from vimnas_ds.model.options import ModelOptions
from vimnas_ds.model.relative import distance_entries
from vimnas_ds.model.tokens import check_places, fixed_positions, to_clip
from vimnas_ds.space import Arch
from vimnas_ds.tubes import TokenGeometry


class _Table(nn.Module):
    def __init__(self, rows: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim).normal_(std=0.02))


class _Relative(nn.Module):
    """What a layer adds to its keys and values for every pair of tokens, (N, N, K) each."""

    rows: Tensor
    columns: Tensor

    def __init__(self, reach: int, head_dim: int, entries: tuple[Tensor, Tensor]):
        super().__init__()
        size = 2 * reach + 2, head_dim
        self.k_rows, self.k_columns = _Table(*size), _Table(*size)
        self.v_rows, self.v_columns = _Table(*size), _Table(*size)
        for name, each in zip(("rows", "columns"), entries, strict=True):
            self.register_buffer(name, each, persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        k = self.k_rows.weight[self.rows] + self.k_columns.weight[self.columns]
        return k, self.v_rows.weight[self.rows] + self.v_columns.weight[self.columns]


#: What all layers share: the entries of their tables of relative positions, if they have any.
Entries = tuple[Tensor, Tensor] | None


class _Attention(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, head_dim: int, options: ModelOptions, entries: Entries
    ):
        super().__init__()
        self.head_dim, width, eps = head_dim, num_heads * head_dim, options.norm_eps
        self.qkv = nn.Linear(dim, 3 * width)
        self.proj = nn.Linear(width, dim)
        self.q_norm = nn.LayerNorm(head_dim, eps=eps) if options.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=eps) if options.qk_norm else nn.Identity()
        reach = options.relative_positions
        self.relative: _Relative | None = None
        if reach is not None and entries is not None:
            self.relative = _Relative(reach, head_dim, entries)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (g h k) -> g b h n k", g=3, k=self.head_dim)
        if self.relative is None:
            y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        else:
            r_k, r_v = self.relative()
            q, k = self.q_norm(q) * self.head_dim**-0.5, self.k_norm(k)
            p = (q @ k.mT + torch.einsum("bhnk,nmk->bhnm", q, r_k)).softmax(-1)
            y = p @ v + torch.einsum("bhnm,nmk->bhnk", p, r_v)
        return self.proj(rearrange(y, "b h n k -> b n (h k)"))


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, gelu: str):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.approximate = "none" if gelu == "erf" else "tanh"

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class _Tokens(nn.Module):
    def __init__(self, geometry: TokenGeometry, dim: int, options: ModelOptions):
        super().__init__()
        self.tubes = nn.ModuleList(nn.Conv3d(3, dim, t.kernel, t.stride) for t in geometry.tubes)
        self.class_token = _Table(1, dim) if options.class_token else None
        learned = options.positions == "learned"
        self.position = _Table(options.num_places, dim) if learned else None


class _Scale(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Block(nn.Module):
    def __init__(
        self, arch: Arch, layer: int, head_dim: int, options: ModelOptions, entries: Entries
    ):
        super().__init__()
        dim, hidden, eps = arch.embed_dim, arch.hidden_dim(layer), options.norm_eps
        self.drop_rate = options.drop_path * layer / max(arch.depth - 1, 1)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = _Attention(dim, arch.num_heads[layer], head_dim, options, entries)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = _Mlp(dim, hidden, options.gelu)
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
        self.tokens = _Tokens(geometry, arch.embed_dim, options)
        entries: Entries = None
        if options.relative_positions is not None:
            assert options.side is not None
            place = options.side, options.relative_positions
            entries = distance_entries(*place, options.class_token)
        self.blocks = nn.Sequential(
            *(_Block(arch, i, head_dim, options, entries) for i in range(arch.depth))
        )
        self.norm = nn.LayerNorm(arch.embed_dim, eps=options.norm_eps)
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
        if self.tokens.class_token is not None:
            tokens.append(self.tokens.class_token.weight.expand(x.shape[0], 1, -1))
        for index in self.geometry.active_tubes(is_image):
            t, h, w = self.geometry.tubes[index].offset
            y = self.tokens.tubes[index](clip[:, :, t:, h:, w:])
            tokens.append(rearrange(y, "b d t h w -> b (t h w) d"))
        return torch.cat(tokens, 1)

    def positions(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """(N, D) of inputs (B, 3, *shape): images (H, W) or clips (T, H, W); fixed ones in float32.
        Raises ValueError for inputs that learned or relative ones are not made for."""
        is_image = len(shape) == 2
        frames = self.geometry.image_frames if is_image else shape[0]
        size = (frames, shape[-2], shape[-1])
        check_places(self.options, self.geometry, size, is_image)
        if self.tokens.position is not None:
            return self.tokens.position.weight
        if (shape, device) not in self._positions:
            position = fixed_positions(
                self.geometry, size, is_image, self.position_dim, self.options.class_token
            )
            self._positions[shape, device] = position[:, : self.arch.embed_dim].to(device)
        return self._positions[shape, device]

    def classify(self, tokens: Tensor, positions: Tensor, dataset: str) -> Tensor:
        """Tokens (B, N, D) and their positions (N, D) -> logits (B, classes of `dataset`)."""
        x = self.norm(self.blocks(tokens + positions.to(tokens.dtype)))
        return self.heads[dataset]((x[:, 1:] if self.options.class_token else x).mean(1))

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
        positions = net.positions(shape, next(net.parameters()).device).detach()
        self.net.tokens.position = None
        self.register_buffer("positions", positions.contiguous())

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, *shape) -> logits (B, classes)."""
        return self.net.classify(self.net.patches(pixels), self.positions, self.dataset)
