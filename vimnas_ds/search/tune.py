"""Tuning between decisions: a few training steps on the space that is left, same engine, same step.

The engine starts from the checkpoint's weights with fresh moments (so any number of ranks can run
it), and the data goes on from the checkpoint's cursor. The learning rate is constant (ours: a
tenth of the run's peak); DARTS-PT tunes the weights only, so alphas stay.
"""

from __future__ import annotations

from collections.abc import Callable

from vimnas_ds.data.joint import Loaders
from vimnas_ds.search.run import SearchRun
from vimnas_ds.space import SearchSpace
from vimnas_ds.train.engine import build_engine
from vimnas_ds.train.schedule import DataCursor, Drawer, Schedule
from vimnas_ds.train.step import WeightStepper


class Tuner:
    """Called with the space that is left; trains `steps` steps on it and goes back to eval mode."""

    def __init__(self, run: SearchRun, steps: int, lr: float, progress: Callable[[], None]):
        config, ranks = run.config, run.ranks
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
        self.drawer = Drawer(schedule, run.net.space, is_image, seed, position)

    def __call__(self, space: SearchSpace) -> None:
        self.drawer.space = space
        self.run.net.train()
        for _ in range(self.steps):
            context = self.drawer.draw()
            self.stepper.step(context, self.lr)
            self.drawer.advance(context)
            self.progress()
        self.run.net.eval()

    def close(self) -> None:
        self.loaders.close()
