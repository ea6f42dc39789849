"""The entangled ViT supernet: one set of weights, every sub-network an argument of `forward`.

    supernet(x, arch, dataset)                 one sampled sub-network, or several
    supernet.superposed(x, probabilities, ...) all of them at once, softly (the alpha step)
    supernet.extract(arch)                     a stand-alone copy of one

Images (B, 3, H, W) and clips (B, 3, T, H, W) share the trunk; every dataset has a linear head on
the mean over tokens, but for a class token, after the last norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vimnas_ds.layout import Axis, ParamLayout
from vimnas_ds.model.alphas import Probabilities
from vimnas_ds.model.block import Block
from vimnas_ds.model.layers import EntangledLinear, EntangledNorm
from vimnas_ds.model.options import ModelOptions
from vimnas_ds.model.subnet import SubNetwork
from vimnas_ds.model.tokens import Tokens
from vimnas_ds.ops.gates import hidden_mass, leading_mass
from vimnas_ds.space import Arch, SearchSpace
from vimnas_ds.tubes import TokenGeometry


class Superposed(NamedTuple):
    """The superposed network on its way: every layer is two places, attention and MLP."""

    place: int  #: branches behind it: 2l is before layer l's attention, 2l + 1 before its MLP
    x: Tensor  #: (B, N, D) at full width
    ends: Mapping[int, Tensor]  #: what x was after each depth that will be mixed, ascending


class Supernet(nn.Module):
    """All sub-networks of `space` in one module.

    `num_classes` maps each dataset to its head. `position_dim` fixes the positions' frequencies
    (default: the largest embed_dim); a single sub-network keeps its supernet's.
    """

    blocks: Sequence[Block]
    heads: Mapping[str, EntangledLinear]

    def __init__(
        self,
        space: SearchSpace,
        geometry: TokenGeometry,
        num_classes: Mapping[str, int],
        options: ModelOptions | None = None,
        position_dim: int | None = None,
    ):
        super().__init__()
        self.position_dim = position_dim or space.max_embed_dim
        self.space, self.geometry = space, geometry
        self.num_classes, self.options = dict(num_classes), options or ModelOptions()
        embed = Axis("embed", space.max_embed_dim)
        self.tokens = Tokens(geometry, embed.size, self.position_dim, self.options)
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            Block(space, i, self.options) for i in range(space.max_depth)
        )
        self.norm = EntangledNorm(embed, eps=self.options.norm_eps)
        self.heads = nn.ModuleDict(  # type: ignore[assignment]
            {
                name: EntangledLinear(Axis("all", classes), embed, dataset=name)
                for name, classes in num_classes.items()
            }
        )

    def layouts(self) -> dict[str, ParamLayout]:
        """How every parameter is cut, by parameter name."""
        found: dict[str, ParamLayout] = {}
        for prefix, module in self.named_modules():
            if isinstance(getattr(module, "weight", getattr(module, "gamma", None)), nn.Parameter):
                for name, layout in module.param_layouts().items():
                    found[f"{prefix}.{name}"] = layout
        assert found.keys() == dict(self.named_parameters()).keys()
        return found

    def forward(self, x: Tensor, arch: Arch | Sequence[Arch], dataset: str) -> Tensor:
        """Logits (B, classes of `dataset`) of the sub-network `arch`; of several, a sandwich,
        (S, B, classes), and only the first of them has drop path (BigNAS, NASViT)."""
        if isinstance(arch, Arch):
            return self._logits(x, arch, dataset, self.options.drop_path)
        rates = [self.options.drop_path, *[0.0] * (len(arch) - 1)]
        parts = zip(arch, rates, strict=True)
        return torch.stack([self._logits(x, a, dataset, rate) for a, rate in parts])

    def _logits(self, x: Tensor, arch: Arch, dataset: str, drop_path: float) -> Tensor:
        x = self.tokens(x, arch.embed_dim)
        for layer in range(arch.depth):
            # stochastic depth ramps over the sampled depth
            rate = drop_path * layer / max(arch.depth - 1, 1)
            block, heads, hidden = self.blocks[layer], arch.num_heads[layer], arch.hidden_dim(layer)
            if self.options.activation_checkpointing and self.training:
                x = checkpoint(block, x, heads, hidden, rate, use_reentrant=False)
            else:
                x = block(x, heads, hidden, rate)
        return self.heads[dataset](self._pool(self.norm(x)), self.num_classes[dataset])

    def _pool(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, D), the mean over all but the class token."""
        return (x[:, 1:] if self.options.class_token else x).mean(1)

    def superposed(self, x: Tensor, probabilities: Probabilities, dataset: str) -> Tensor:
        """Logits of the probability-weighted mixture of all sub-networks; no weight gradients.

        One full-width pass: W_mix = sum_k p_k PAD(W[:, :k]) acts once, as gates on activations.
        With one-hot probabilities this is `forward` of that sub-network.
        """
        depths: Sequence[int] = self.space.depth
        if not torch.is_grad_enabled():  # a depth of no probability has a gradient
            shares = probabilities["depth"].tolist()
            depths = [d for d, share in zip(depths, shares, strict=True) if share > 0]
        state = self.advance(self.start(x), probabilities, depths, 2 * depths[-1])
        return self.finish(state, probabilities, dataset)

    def start(self, x: Tensor) -> Superposed:
        """The superposed network's tokens, before its first layer: no decision has acted yet."""
        return Superposed(0, self.tokens(x, self.space.max_embed_dim, frozen=True), {})

    def advance(
        self, state: Superposed, probabilities: Probabilities, depths: Sequence[int], place: int
    ) -> Superposed:
        """On to `place`, if it is not there already, keeping the states after `depths` (those that
        will be mixed) alone."""
        space, p = self.space, probabilities
        embed = leading_mass(p["embed_dim"], space.embed_dim, space.max_embed_dim)
        x = state.x
        ends = {depth: end for depth, end in state.ends.items() if depth in depths}
        for layer in range(state.place // 2, (place + 1) // 2):
            block, heads = self.blocks[layer], space.num_heads[layer]
            masses = (
                embed,
                leading_mass(p[f"num_heads[{layer}]"], heads, heads[-1]),
                hidden_mass(
                    p["embed_dim"],
                    p[f"mlp_ratio[{layer}]"],
                    space.embed_dim,
                    space.mlp_ratio[layer],
                    space.hidden_dims(layer)[-1],
                ),
            )
            part = max(state.place - 2 * layer, 0), min(place - 2 * layer, 2)
            if self.options.activation_checkpointing:
                x = checkpoint(block.forward_superposed, x, *masses, *part, use_reentrant=False)
            else:
                x = block.forward_superposed(x, *masses, *part)
            if part[1] == 2 and layer + 1 in depths:
                ends[layer + 1] = x
        return Superposed(max(state.place, place), x, ends)

    def finish(self, state: Superposed, probabilities: Probabilities, dataset: str) -> Tensor:
        """Logits of the mixture over the depths that `state` holds."""
        space, p = self.space, probabilities
        mixed: Tensor | None = None
        for depth, end in state.ends.items():
            part = end.float() * p["depth"][space.depth.index(depth)]
            mixed = part if mixed is None else mixed + part
        assert mixed is not None
        embed = leading_mass(p["embed_dim"], space.embed_dim, space.max_embed_dim)
        pooled = self._pool(self.norm.forward_frozen(mixed, embed).to(state.x.dtype))
        return self.heads[dataset].forward_frozen(pooled)

    @torch.no_grad()
    def extract(self, arch: Arch) -> SubNetwork:
        """A stand-alone network with copies of `arch`'s blocks of the shared weights."""
        self.space.validate(arch)
        net = SubNetwork(
            arch,
            self.space.head_dim,
            self.geometry,
            self.num_classes,
            self.options,
            self.position_dim,
        )
        own, layouts = dict(net.named_parameters()), self.layouts()
        for name, shared in self.named_parameters():
            extents = layouts[name].extents(arch, self.space.head_dim)
            if extents is not None:
                block = shared.view(layouts[name].shape)[tuple(slice(0, e) for e in extents)]
                own[name].copy_(block.reshape(own[name].shape))
        return net.to(next(self.parameters()).device).train(self.training)
