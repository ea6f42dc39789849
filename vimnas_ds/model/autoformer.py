"""AutoFormer's ViT: a published supernet's sub-networks, as plain torch (Chen et al., 2021).

What differs from this project's own: a class token that attends but is not pooled, learned
positions, GELU in its erf form, LayerNorm's eps, and 2-D relative positions in every layer,

    scores = (q k^T + q R_k^T) / sqrt(K)       output = p v + p R_v       p = softmax(scores)
    R[n, m] = V[row(m) - row(n)] + H[column(m) - column(n)]

with distances clamped to the tables, whose entry 0 stands for the class token on either side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from vimnas_ds.space import Arch, SearchSpace

NORM_EPS = 1e-5
#: Patches along a side; at this many a table of distances takes 134 MB.
MAX_SIDE = 64


@dataclass(frozen=True)
class AutoFormerShape:
    """What all sub-networks share: head and patch width, patches along a side, the largest
    distance in the tables of relative positions."""

    head_dim: int
    patch: int
    side: int
    reach: int

    def __post_init__(self) -> None:
        if not 1 <= self.side <= MAX_SIDE:
            raise ValueError(
                f"{self.side} patches along a side: 1 to {MAX_SIDE} are taken, the relative "
                "positions need memory for all pairs of patches"
            )

    @property
    def size(self) -> int:
        """Pixels along a side of the picture."""
        return self.patch * self.side


def distance_entries(shape: AutoFormerShape) -> tuple[Tensor, Tensor]:
    """Entries of the vertical and the horizontal table, (N+1, N+1) each, the class token first.

    On the CPU even while weights are built on "meta".
    """
    patches = torch.arange(shape.side**2, device="cpu")

    def entries(places: Tensor) -> Tensor:
        distance = places[None, :] - places[:, None]
        return F.pad(distance.clamp(-shape.reach, shape.reach) + shape.reach + 1, (1, 0, 1, 0))

    return entries(patches // shape.side), entries(patches % shape.side)


class _Relative(nn.Module):
    """R (N+1, N+1, K) from two tables of 2 * reach + 2 rows."""

    rows: Tensor
    columns: Tensor

    def __init__(self, shape: AutoFormerShape, entries: tuple[Tensor, Tensor]):
        super().__init__()
        size = 2 * shape.reach + 2, shape.head_dim
        self.embeddings_table_v = nn.Parameter(torch.empty(size))
        self.embeddings_table_h = nn.Parameter(torch.empty(size))
        for name, each in zip(("rows", "columns"), entries, strict=True):
            self.register_buffer(name, each, persistent=False)

    def forward(self) -> Tensor:
        return self.embeddings_table_v[self.rows] + self.embeddings_table_h[self.columns]


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, head_dim: int, k: _Relative, v: _Relative):
        super().__init__()
        self.head_dim, width = head_dim, num_heads * head_dim
        self.qkv, self.proj = nn.Linear(dim, 3 * width), nn.Linear(width, dim)
        self.rel_pos_embed_k, self.rel_pos_embed_v = k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (g h k) -> g b h n k", g=3, k=self.head_dim)
        q = q * self.head_dim**-0.5
        scores = q @ k.mT + torch.einsum("bhnk,nmk->bhnm", q, self.rel_pos_embed_k())
        p = scores.softmax(-1)
        y = p @ v + torch.einsum("bhnm,nmk->bhnk", p, self.rel_pos_embed_v())
        return self.proj(rearrange(y, "b h n k -> b n (h k)"))


class _Block(nn.Module):
    def __init__(
        self, arch: Arch, layer: int, shape: AutoFormerShape, entries: tuple[Tensor, Tensor]
    ):
        super().__init__()
        dim, hidden = arch.embed_dim, arch.hidden_dim(layer)
        relative = _Relative(shape, entries), _Relative(shape, entries)
        self.attn_layer_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = _Attention(dim, arch.num_heads[layer], shape.head_dim, *relative)
        self.ffn_layer_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_layer_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.ffn_layer_norm(x))))


class AutoFormerNetwork(nn.Module):
    """One sub-network on its own; used as `SubNetwork` is."""

    def __init__(self, arch: Arch, shape: AutoFormerShape, num_classes: Mapping[str, int]):
        super().__init__()
        self.arch, self.shape = arch, shape
        dim = arch.embed_dim
        self.patch_embed = nn.Conv2d(3, dim, shape.patch, shape.patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, shape.side**2 + 1, dim))
        entries = distance_entries(shape)
        self.blocks = nn.Sequential(*(_Block(arch, i, shape, entries) for i in range(arch.depth)))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.heads = nn.ModuleDict({name: nn.Linear(dim, n) for name, n in num_classes.items()})

    def forward(self, x: Tensor, dataset: str) -> Tensor:
        """(B, 3, H, W), H = W = `shape.size` -> logits (B, classes of `dataset`)."""
        patches = rearrange(self.patch_embed(x), "b d h w -> b (h w) d")
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), patches], 1)
        x = self.norm(self.blocks(tokens + self.pos_embed))
        return self.heads[dataset](x[:, 1:].mean(1))

    def only(self, dataset: str, shape: tuple[int, ...]) -> OneHead:
        """The program of its one head."""
        return OneHead(self, dataset)


class OneHead(nn.Module):
    """`net(x, dataset)` as a function of the pixels."""

    def __init__(self, net: AutoFormerNetwork, dataset: str):
        super().__init__()
        self.net, self.dataset = net, dataset

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, classes)."""
        return self.net(pixels, self.dataset)


@dataclass(frozen=True)
class AutoFormerSupernet:
    """A published checkpoint's tensors under its own names, which may be wider than the largest
    choice, and the space they were trained on. Made by `vimnas_ds.autoformer.open_autoformer`."""

    weights: Mapping[str, Tensor]
    space: SearchSpace
    shape: AutoFormerShape
    dataset: str

    def __call__(self, x: Tensor, arch: Arch, dataset: str) -> Tensor:
        """Logits of the sub-network `arch`. Raises ValueError for one outside the space."""
        self.space.validate(arch)
        with torch.device("meta"):
            net = self._network(arch)
        return functional_call(net, dict(self.blocks_of(arch)), (x, dataset))

    def extract(self, arch: Arch) -> AutoFormerNetwork:
        """A stand-alone network with copies of `arch`'s blocks of the shared weights."""
        self.space.validate(arch)
        net = self._network(arch)
        net.load_state_dict(self.blocks_of(arch))
        return net.eval()

    def _network(self, arch: Arch) -> AutoFormerNetwork:
        classes = {self.dataset: self.weights["head.bias"].shape[0]}
        return AutoFormerNetwork(arch, self.shape, classes)

    def blocks_of(self, arch: Arch) -> dict[str, Tensor]:
        """`arch`'s blocks of the shared weights under `AutoFormerNetwork`'s names."""
        dim, found = arch.embed_dim, {}

        def take(ours: str, theirs: str, *ends: int | None) -> None:
            found[ours] = self.weights[theirs][tuple(slice(0, end) for end in ends)]

        def take_linear(ours: str, theirs: str, out: int | None, into: int) -> None:
            take(f"{ours}.weight", f"{theirs}.weight", out, into)
            take(f"{ours}.bias", f"{theirs}.bias", out)

        def take_vectors(*names: str) -> None:
            for name in names:
                take(f"{name}.weight", f"{name}.weight", dim)
                take(f"{name}.bias", f"{name}.bias", dim)

        take("patch_embed.weight", "patch_embed_super.proj.weight", dim)
        take("patch_embed.bias", "patch_embed_super.proj.bias", dim)
        take("cls_token", "cls_token", None, None, dim)
        take("pos_embed", "pos_embed", None, None, dim)
        take_vectors("norm")
        take_linear(f"heads.{self.dataset}", "head", None, dim)
        for layer in range(arch.depth):
            at, hidden = f"blocks.{layer}", arch.hidden_dim(layer)
            width = arch.num_heads[layer] * self.shape.head_dim
            take_vectors(f"{at}.attn_layer_norm", f"{at}.ffn_layer_norm")
            take_linear(f"{at}.attn.qkv", f"{at}.attn.qkv", 3 * width, dim)
            # rows are q, k, v in turn, biases all of q, then k, then v: only so far as used
            rows = found[f"{at}.attn.qkv.weight"]
            found[f"{at}.attn.qkv.weight"] = rearrange(rows, "(w g) d -> (g w) d", g=3)
            take_linear(f"{at}.attn.proj", f"{at}.attn.proj", dim, width)
            for table in TABLES:
                take(f"{at}.{table}", f"{at}.{table}", None, self.shape.head_dim)
            take_linear(f"{at}.fc1", f"{at}.fc1", hidden, dim)
            take_linear(f"{at}.fc2", f"{at}.fc2", dim, hidden)
        return found


#: A layer's tables of relative positions.
TABLES: Sequence[str] = tuple(
    f"attn.rel_pos_embed_{of}.embeddings_table_{along}" for of in "kv" for along in "vh"
)
