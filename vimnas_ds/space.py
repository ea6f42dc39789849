"""The search space as data: `Arch` is one sub-network, `SearchSpace` the set it is chosen from.

A sub-network is an embedding width shared by all layers, a depth, and per layer a number of heads
and an MLP ratio (AutoFormer's space; VIM-NAS supplement, Appendix B). Weights are entangled: a
smaller choice is the leading block of a larger one, a shallower network its first `depth` layers.
Nothing here knows torch.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self


@dataclass(frozen=True)
class Arch:
    """One sub-network. `num_heads` and `mlp_ratio` have one entry per layer, `depth` of them."""

    embed_dim: int
    depth: int
    num_heads: tuple[int, ...]
    mlp_ratio: tuple[float, ...]

    def __post_init__(self) -> None:
        # 3.0 and 3 are one choice: without this, equal architectures would print differently.
        object.__setattr__(self, "embed_dim", _whole("embed_dim", self.embed_dim))
        object.__setattr__(self, "depth", _whole("depth", self.depth))
        heads = tuple(_whole("num_heads", h) for h in self.num_heads)
        object.__setattr__(self, "num_heads", heads)
        object.__setattr__(self, "mlp_ratio", tuple(float(r) for r in self.mlp_ratio))
        if not len(self.num_heads) == len(self.mlp_ratio) == self.depth:
            raise ValueError(
                f"depth {self.depth} needs that many num_heads and mlp_ratio, "
                f"got {len(self.num_heads)} and {len(self.mlp_ratio)}"
            )

    @classmethod
    def uniform(cls, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float) -> Self:
        """The architecture whose layers are all alike."""
        return cls(embed_dim, depth, (num_heads,) * depth, (mlp_ratio,) * depth)

    def hidden_dim(self, layer: int) -> int:
        """Width of layer `layer`'s MLP: int(embed_dim * mlp_ratio)."""
        return int(self.embed_dim * self.mlp_ratio[layer])

    def to_json(self) -> str:
        """One line of JSON, keys spelled as the fields are; equal architectures print equally."""
        return json.dumps(
            {
                "embed_dim": self.embed_dim,
                "depth": self.depth,
                "num_heads": list(self.num_heads),
                "mlp_ratio": list(self.mlp_ratio),
            }
        )

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; also takes the parsed object. Raises ValueError on bad keys."""
        try:
            data = json.loads(text) if isinstance(text, str) else dict(text)
        except json.JSONDecodeError as err:
            raise ValueError(f"an architecture is a JSON object; {err}") from err
        keys = {"embed_dim", "depth", "num_heads", "mlp_ratio"}
        if not isinstance(data, dict) or set(data) != keys:
            got = sorted(data) if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"an architecture has exactly the keys {sorted(keys)}, got {got}")
        return cls(
            data["embed_dim"], data["depth"], tuple(data["num_heads"]), tuple(data["mlp_ratio"])
        )

    def __str__(self) -> str:
        heads = ",".join(map(str, self.num_heads))
        ratios = ",".join(f"{r:g}" for r in self.mlp_ratio)
        return f"d{self.depth} e{self.embed_dim} h[{heads}] r[{ratios}]"


def _whole(name: str, value: float) -> int:
    if isinstance(value, bool) or value % 1 != 0:  # of infinity it is no number
        raise ValueError(f"{name} must be whole numbers, got {value!r}")
    return int(value)


@dataclass(frozen=True)
class SearchSpace:
    """The choices. `num_heads[l]` and `mlp_ratio[l]` are the choices of layer l (ascending),
    one entry for each of the `max_depth` layers; `head_dim` is fixed (q, k, v have h*head_dim)."""

    name: str
    embed_dim: tuple[int, ...]
    depth: tuple[int, ...]
    num_heads: tuple[tuple[int, ...], ...]
    mlp_ratio: tuple[tuple[float, ...], ...]
    head_dim: int = 64

    def __post_init__(self) -> None:
        axes: list[tuple[str, tuple[float, ...]]] = [
            ("embed_dim", self.embed_dim),
            ("depth", self.depth),
        ]
        axes += [(f"num_heads[{i}]", c) for i, c in enumerate(self.num_heads)]
        axes += [(f"mlp_ratio[{i}]", c) for i, c in enumerate(self.mlp_ratio)]
        for field, choices in axes:
            if not choices or list(choices) != sorted(set(choices)) or choices[0] <= 0:
                raise ValueError(f"{field} needs positive ascending choices, got {choices}")
        if not len(self.num_heads) == len(self.mlp_ratio) == self.depth[-1]:
            raise ValueError(f"choices are needed for each of the {self.depth[-1]} layers")

    @classmethod
    def uniform(
        cls,
        name: str,
        embed_dim: tuple[int, ...],
        depth: tuple[int, ...],
        num_heads: tuple[int, ...],
        mlp_ratio: tuple[float, ...],
        head_dim: int = 64,
    ) -> Self:
        """The space whose layers all have the same choices (every published one)."""
        layers = max(depth)
        heads, ratios = (num_heads,) * layers, (mlp_ratio,) * layers
        return cls(name, embed_dim, depth, heads, ratios, head_dim)

    @classmethod
    def single(cls, arch: Arch, head_dim: int = 64) -> Self:
        """The space with one member: trains `arch` alone with the supernet's own code."""
        heads = tuple((h,) for h in arch.num_heads)
        ratios = tuple((r,) for r in arch.mlp_ratio)
        return cls("single", (arch.embed_dim,), (arch.depth,), heads, ratios, head_dim)

    @property
    def max_depth(self) -> int:
        return self.depth[-1]

    @property
    def max_embed_dim(self) -> int:
        return self.embed_dim[-1]

    def hidden_dims(self, layer: int) -> tuple[int, ...]:
        """All MLP widths layer `layer` can take: int(e*r) over both choices, ascending."""
        return tuple(sorted({int(e * r) for e in self.embed_dim for r in self.mlp_ratio[layer]}))

    def validate(self, arch: Arch) -> None:
        """Raise ValueError, naming the field and its choices, unless `arch` is a member."""
        for field in ("embed_dim", "depth"):
            value, choices = getattr(arch, field), getattr(self, field)
            if value not in choices:
                raise ValueError(f"{field} {value} is not in space {self.name}: {choices}")
        for field in ("num_heads", "mlp_ratio"):
            for layer, value in enumerate(getattr(arch, field)):
                choices = getattr(self, field)[layer]
                if value not in choices:
                    raise ValueError(
                        f"{field}[{layer}] {value} is not in space {self.name}: {choices}"
                    )

    def __contains__(self, arch: Arch) -> bool:
        try:
            self.validate(arch)
        except ValueError:
            return False
        return True

    def sample(self, rng: random.Random) -> Arch:
        """One sub-network; every decision uniform and independent (Algorithm 1, line 5).

        The draws do not depend on the depth drawn, so two spaces of equal choices and seed agree.
        """
        embed_dim, depth = rng.choice(self.embed_dim), rng.choice(self.depth)
        heads = tuple(rng.choice(c) for c in self.num_heads)
        ratios = tuple(rng.choice(c) for c in self.mlp_ratio)
        return Arch(embed_dim, depth, heads[:depth], ratios[:depth])

    def smallest(self) -> Arch:
        return self._corner(0)

    def largest(self) -> Arch:
        return self._corner(-1)

    def _corner(self, end: int) -> Arch:
        depth = self.depth[end]
        heads = tuple(c[end] for c in self.num_heads[:depth])
        ratios = tuple(c[end] for c in self.mlp_ratio[:depth])
        return Arch(self.embed_dim[end], depth, heads, ratios)

    def size(self) -> int:
        """Number of distinct sub-networks, exactly."""
        per_layer = [len(h) * len(r) for h, r in zip(self.num_heads, self.mlp_ratio, strict=True)]
        return len(self.embed_dim) * sum(math.prod(per_layer[:d]) for d in self.depth)

    def members(self) -> Iterator[Arch]:
        """All of them: for small spaces only (see `size`)."""
        for embed_dim, depth in itertools.product(self.embed_dim, self.depth):
            for heads in itertools.product(*self.num_heads[:depth]):
                for ratios in itertools.product(*self.mlp_ratio[:depth]):
                    yield Arch(embed_dim, depth, heads, ratios)

    def neighbours(self, arch: Arch) -> Iterator[Arch]:
        """All members one decision away. A deeper neighbour's new layers take their largest
        choices, a shallower one drops its last layers."""
        self.validate(arch)
        for embed_dim in self.embed_dim:
            if embed_dim != arch.embed_dim:
                yield replace(arch, embed_dim=embed_dim)
        for depth in self.depth:
            if depth != arch.depth:
                heads = arch.num_heads + tuple(c[-1] for c in self.num_heads[arch.depth :])
                ratios = arch.mlp_ratio + tuple(c[-1] for c in self.mlp_ratio[arch.depth :])
                yield Arch(arch.embed_dim, depth, heads[:depth], ratios[:depth])
        for layer in range(arch.depth):
            before, after = slice(0, layer), slice(layer + 1, None)
            h, r = arch.num_heads, arch.mlp_ratio
            for count in self.num_heads[layer]:
                if count != h[layer]:
                    yield replace(arch, num_heads=(*h[before], count, *h[after]))
            for ratio in self.mlp_ratio[layer]:
                if ratio != r[layer]:
                    yield replace(arch, mlp_ratio=(*r[before], ratio, *r[after]))


SPACES = {
    space.name: space
    for space in (
        # AutoFormer-T; its yaml lists mlp_ratio 3.5 and 4, its published sub-network uses 3 as well
        SearchSpace.uniform("vit_t", (192, 216, 240), (12, 13, 14), (3, 4), (3, 3.5, 4)),
        SearchSpace.uniform("vit_s", (320, 384, 448), (12, 13, 14), (5, 6, 7), (3, 3.5, 4)),
        SearchSpace.uniform("vit_b", (528, 576, 624), (14, 15, 16), (8, 9, 10), (3, 3.5, 4)),
        # ours: no published elastic ViT-L space was found
        SearchSpace.uniform("vit_l", (896, 960, 1024), (20, 22, 24), (14, 15, 16), (3, 3.5, 4)),
        # ours: laptop demo and tests
        SearchSpace.uniform("nano", (32, 48, 64), (2, 3), (1, 2), (2, 4), head_dim=16),
    )
}
