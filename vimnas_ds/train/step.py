"""One weight step: fetch the drawn batch, agree, forward, backward, update the sampled blocks.

By the sandwich rule the step has several sub-networks, of one forward and one backward of the
engine: the *sum* of their losses, as US-Nets and NASViT add up their gradients.
Used by training and by tuning between search decisions, so both do the same thing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from vimnas_ds.config import RunConfig
from vimnas_ds.data.ahead import GivenUp
from vimnas_ds.data.joint import Loaders
from vimnas_ds.data.loader import Batch
from vimnas_ds.seeds import derive_seed
from vimnas_ds.train.engine import Engine
from vimnas_ds.train.objective import Objective, count_correct
from vimnas_ds.train.ranks import Ranks, StopAsked, Wish, check_agreement
from vimnas_ds.train.schedule import StepContext


@dataclass(frozen=True)
class StepResult:
    """This rank's share of one step, of a sandwich its largest sub-network's; the tensors stay on
    the device."""

    loss: Tensor  #: mean over the rank's samples, detached
    correct: Tensor  #: how many of them the network got right (before any mixing of labels)
    count: int
    waited: float  #: seconds until the batch was there
    wishes: int  #: of all ranks, see `ranks.Wish`


class WeightStepper:
    """Does weight steps with one engine."""

    def __init__(self, config: RunConfig, engine: Engine, loaders: Loaders, ranks: Ranks):
        self.config, self.engine, self.loaders, self.ranks = config, engine, loaders, ranks
        self._sections = config.vimnas.data.datasets
        self._objectives = {name: Objective(d) for name, d in self._sections.items()}
        sandwich = config.vimnas.sandwich
        self._distill = sandwich is not None and sandwich.distill
        #: the batch of the latest step as the network saw it before mixing: (x, y)
        self.latest: tuple[Tensor, Tensor] | None = None
        #: told (activity, step counted from 1) what this rank begins with
        self.at: Callable[[str, int], None] = lambda activity, step: None

    def step(
        self,
        context: StepContext,
        lr: float,
        keep_batch: bool = False,
        wish: int = 0,
        two_batches: bool = False,
    ) -> StepResult:
        """One optimiser step on all ranks. `keep_batch` leaves a copy of its first samples
        in `latest`; `wish`: what this rank asks all to do after it (`ranks.Wish`); `two_batches`:
        the plan's next batch belongs to the step as well, which begins when its files are there.

        Before the forward pass it raises RanksDisagree if ranks drew different things, and
        StopAsked if one of them wishes to stop: nothing has changed then.
        """
        name, archs = context.dataset, context.archs
        started = time.perf_counter()
        size, number = self.config.global_batch, context.batch_index
        self.at("data", context.step + 1)
        batch: Batch | None = None
        with suppress(GivenUp):
            batch = self.loaders.batch(name, "train", size, number)
            if two_batches:
                self.loaders.wait_for_next()
        if self.loaders.give_up():
            wish |= Wish.STOP
        waited = time.perf_counter() - started
        self.at("agree", context.step + 1)
        what = f"step {context.step}, {name}, {', '.join(map(str, archs))}"
        wishes = check_agreement(context.fingerprint(), what, self.ranks, wish)
        if wishes & Wish.STOP:
            if batch is not None:
                self.loaders.take_back(name, "train")
            raise StopAsked
        assert batch is not None
        self.at("step", context.step + 1)
        # drop path and mixup depend on (seed, cursor, rank) alone, so a resumed run repeats them
        seed = derive_seed("step", self.config.vimnas.seed, context.cursor, self.ranks.rank)
        torch.manual_seed(seed)
        x = batch.x.to(self.ranks.device, self.engine.dtype)
        y = batch.y.to(self.ranks.device)
        del batch  # its float32 pixels; x is all that is needed from here on
        shown = slice(0, 8)
        self.latest = (x[shown].float().clone(), y[shown]) if keep_batch else None
        objective = self._objectives[name]
        x, targets = objective.mix(x, y, seed)
        if len(archs) == 1:
            logits = self.engine.deepspeed(x, archs[0], name)
            loss = total = objective.loss(logits, targets)
        else:
            logits, *others = self.engine.deepspeed(x, archs, name)
            losses = objective.sandwich_losses([logits, *others], targets, self._distill)
            loss, total = losses[0], losses.sum()
        decay = self._sections[name].weight_decay
        self.engine.optimizer.activate(context.activation, lr, decay)
        self.engine.weight_step(total)
        return StepResult(loss.detach(), count_correct(logits, y), len(y), waited, wishes)
