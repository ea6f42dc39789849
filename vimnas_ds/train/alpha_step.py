"""The architecture step: alpha <- alpha - gamma grad_alpha L_val(w*, alpha)  (Algorithm 1, line 9).

On the superposed network, with a batch of the sampled dataset's `alpha` split, plain cross-entropy,
no mixup and no drop path. Alphas live outside the engine in float32 with their own Adam, and the
pass goes through `engine.module`, never the engine: ZeRO's hooks then see nothing (measured in
ENGINE_NOTES: weights stay bit-identical). One all-reduce for all alphas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vimnas_ds.config import AlphaSection
from vimnas_ds.model.alphas import Alphas
from vimnas_ds.model.supernet import Supernet
from vimnas_ds.seeds import derive_seed
from vimnas_ds.space import SearchSpace
from vimnas_ds.train.ranks import Ranks, sum_over_ranks


class AlphaLearner:
    """The alphas, their Adam, and their step. Equal on all ranks at all times."""

    def __init__(self, space: SearchSpace, section: AlphaSection, seed: int, ranks: Ranks):
        generator = torch.Generator().manual_seed(derive_seed("alpha", seed))
        self.alphas = Alphas(space, section.init_std, generator).to(ranks.device)
        self.ranks = ranks
        #: whether the last step changed the alphas (false: a non-finite gradient, on all ranks)
        self.was_applied = True
        self.optimizer = torch.optim.Adam(
            list(self.alphas),
            lr=section.lr,
            betas=section.betas,
            weight_decay=section.weight_decay,
        )

    def step(self, net: Supernet, x: Tensor, y: Tensor, dataset: str) -> Tensor:
        """One update from this rank's share of a batch; returns its loss (detached)."""
        logits = net.superposed(x, self.alphas.probabilities(), dataset)
        loss = F.cross_entropy(logits.float(), y)
        grads = torch.autograd.grad(loss, list(self.alphas))
        flat = torch.cat([g.flatten() for g in grads]) / self.ranks.world_size
        sum_over_ranks(flat, self.ranks)
        self.was_applied = bool(torch.isfinite(flat).all())
        if self.was_applied:
            for alpha, grad in zip(
                self.alphas, flat.split([g.numel() for g in grads]), strict=True
            ):
                alpha.grad = grad
            self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"alphas": self.alphas.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.alphas.load_state_dict(state["alphas"])
        rates = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group.update(rate)  # the configuration's, not the saved run's
