"""Tuning between decisions: a few training steps on the space that is left, same engine, same step.

The engine starts from the checkpoint's weights with fresh moments (so any number of ranks can run
it), and the data goes on from the checkpoint's cursor. The learning rate is constant (ours: a
tenth of the run's peak); DARTS-PT tunes the weights only, so alphas stay. Drop path and mixup draw
by rank, so a tuned search repeats on the same number of ranks only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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
        self.skipped_in_a_row = 0
        run.net.float().requires_grad_(True)
        self.engine = build_engine(config, ranks, run.net)
        run.net = self.engine.net.eval()
        seed = config.vimnas.seed
        self.loaders = Loaders(run.data, seed, ranks.rank, ranks.world_size, ranks.device)
        self.stepper = WeightStepper(config, self.engine, self.loaders, ranks)
        schedule = Schedule.build(config, run.data.sizes)
        is_image = {n: d.is_image for n, d in config.vimnas.data.datasets.items()}
        position = DataCursor.from_state(run.position)
        self.drawer = Drawer(schedule, run.net.space, is_image, seed, position)

    def __call__(self, space: SearchSpace) -> None:
        self.drawer.space = space
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

    def close(self) -> None:
        self.loaders.close()
