"""Architecture parameters: one vector per decision, kept outside the network and in float32.

Decisions are named as in `Arch`: "embed_dim", "depth", "num_heads[l]", "mlp_ratio[l]". The network
sees probabilities, softmax(alpha) (TangleNAS), never alpha itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from vimnas_ds.space import Arch, SearchSpace

#: decision name -> probabilities over its choices (K,), summing to one
Probabilities = Mapping[str, Tensor]


def decisions(space: SearchSpace) -> dict[str, tuple[float, ...]]:
    """Every decision of the space with its choices, in a fixed order."""
    found: dict[str, tuple[float, ...]] = {"embed_dim": space.embed_dim, "depth": space.depth}
    for layer in range(space.max_depth):
        found[f"num_heads[{layer}]"] = space.num_heads[layer]
        found[f"mlp_ratio[{layer}]"] = space.mlp_ratio[layer]
    return found


def layer_of(name: str) -> int | None:
    """The layer that a decision belongs to; None for embed_dim and depth."""
    return int(name[name.index("[") + 1 : -1]) if "[" in name else None


def one_hot(space: SearchSpace, arch: Arch) -> dict[str, Tensor]:
    """Probabilities that are certain of `arch` (layers beyond its depth: their first choice)."""
    chosen: dict[str, float] = {"embed_dim": arch.embed_dim, "depth": arch.depth}
    for layer in range(arch.depth):
        chosen[f"num_heads[{layer}]"] = arch.num_heads[layer]
        chosen[f"mlp_ratio[{layer}]"] = arch.mlp_ratio[layer]
    found = {}
    for name, choices in decisions(space).items():
        p = torch.zeros(len(choices))
        p[choices.index(chosen.get(name, choices[0]))] = 1
        found[name] = p
    return found


class Alphas:
    """The learned alphas of a space, initialised to `std` * randn from `generator`."""

    def __init__(self, space: SearchSpace, std: float, generator: torch.Generator):
        self.space = space
        self.values = {
            name: (torch.randn(len(choices), generator=generator) * std).requires_grad_()
            for name, choices in decisions(space).items()
        }

    def to(self, device: torch.device) -> Alphas:
        self.values = {
            name: value.detach().to(device).requires_grad_() for name, value in self.values.items()
        }
        return self

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.values.values())

    def probabilities(self) -> dict[str, Tensor]:
        """softmax of each decision's alphas, with gradients."""
        return {name: value.softmax(0) for name, value in self.values.items()}

    @torch.no_grad()
    def argmax(self) -> Arch:
        """The architecture of the highest alpha of every decision."""
        best = {
            name: choices[int(self.values[name].argmax())]
            for name, choices in decisions(self.space).items()
        }
        depth = int(best["depth"])
        heads = tuple(int(best[f"num_heads[{i}]"]) for i in range(depth))
        ratios = tuple(best[f"mlp_ratio[{i}]"] for i in range(depth))
        return Arch(int(best["embed_dim"]), depth, heads, ratios)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.values.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError when the state is of another space."""
        if state.keys() != self.values.keys():
            raise ValueError("alphas of another search space: decisions differ")
        for name, value in self.values.items():
            if state[name].shape != value.shape:
                raise ValueError(f"alphas of another search space: {name} has other choices")
            value.copy_(state[name])
