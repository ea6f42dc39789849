"""Tuning between decisions: a few training steps on the space that is left, same engine, same step.

The engine starts from the checkpoint's weights (so any number of ranks can run it), every tuning
with fresh moments (so weights and cursor are all its state), and the data goes on from the
checkpoint's cursor. The learning rate is constant (ours: a
tenth of the run's peak); DARTS-PT tunes the weights only, so alphas stay. Drop path and mixup draw
by rank, so a tuned search repeats on the same number of ranks only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from vimnas_ds.config import ConfigError
from vimnas_ds.data.joint import Loaders
from vimnas_ds.search.run import SearchRun
from vimnas_ds.space import SearchSpace
from vimnas_ds.train.engine import build_engine
from vimnas_ds.train.schedule import DataCursor, Drawer, Schedule
from vimnas_ds.train.step import WeightStepper


class Tuner:
    """Called with the space that is left; trains `steps` steps on it and goes back to eval mode.

    From its construction on, `run.net` is the engine's. Raises ConfigError for impossible values,
    and when too many steps in a row are not finite.
    """

    def __init__(self, run: SearchRun, steps: int, lr: float, progress: Callable[[], None]):
        config, ranks = run.config, run.ranks
        if steps < 1 or not 0 < lr < math.inf:
            raise ConfigError(f"tuning needs steps >= 1 and a rate > 0, got {steps} and {lr}")
        self.run, self.steps, self.lr, self.progress = run, steps, lr, progress
        run.net.float().requires_grad_(True)
        self.engine = build_engine(config, ranks, run.net)
        run.net = self.engine.net.eval()
        seed = config.vimnas.seed
        self.loaders = Loaders(run.data, seed, ranks.rank, ranks.world_size, ranks.device)
        self.stepper = WeightStepper(config, self.engine, self.loaders, ranks)
        schedule = Schedule.build(config, run.data.sizes)
        is_image = {n: d.is_image for n, d in config.vimnas.data.datasets.items()}
        position = DataCursor.from_state(run.position)
        sandwich = config.vimnas.sandwich
        num_random = sandwich.random if sandwich is not None else None
        self.drawer = Drawer(schedule, run.net.space, is_image, seed, position, num_random)

    def __call__(self, space: SearchSpace) -> None:
        self.drawer.space = space
        self.engine.optimizer.forget()
        self.skipped_in_a_row = 0
        self.run.net.train()
        for _ in range(self.steps):
            context = self.drawer.draw()
            self.stepper.step(context, self.lr)
            self.skipped_in_a_row = 0 if self.engine.was_applied else self.skipped_in_a_row + 1
            if self.skipped_in_a_row >= self.run.config.vimnas.optimizer.max_skipped:
                raise ConfigError(
                    f"tuning: {self.skipped_in_a_row} steps in a row had non-finite gradients, the "
                    f"last on {context.dataset}: lower --tune_lr {self.lr:g}"
                )
            self.drawer.advance(context)
            self.progress()
        self.run.net.eval()

    def weights(self) -> dict[str, Tensor]:
        """The tuned weights in float32, on rank 0 alone. Collective."""
        return self.engine.weights(keep=self.run.ranks.is_main)

    @property
    def position(self) -> dict[str, Any]:
        """The place in the data, as JSON takes it."""
        return self.drawer.position.state_dict()

    def restore(self, weights: Mapping[str, Tensor], position: Mapping[str, Any]) -> None:
        """Go on from what `weights` and `position` were."""
        self.engine.set_weights(weights)
        self.drawer.position = DataCursor.from_state(position)

    def close(self) -> None:
        self.loaders.close()
