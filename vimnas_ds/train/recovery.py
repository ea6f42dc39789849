"""Feeds the collapse guard with a run's steps, and rewinds the run when it says so.

Losses stay on the device; every `vimnas.guard.every` steps one all-reduce brings their sums over
ranks to all ranks, which therefore judge alike. A rewind restores the newest checkpoint from well
before the trouble began, and gives up the later ones. The schedule goes back with it, the place in
the data does not: the batches and the draws that led there are not met again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vimnas_ds.checkpoint_names import checkpoint_name
from vimnas_ds.config import ConfigError, VimnasSection
from vimnas_ds.data.joint import JointData
from vimnas_ds.report.board import Board
from vimnas_ds.train.checkpoint import go_back
from vimnas_ds.train.guard import Event, Guard, NotSound, Rewinds, Seen, chance_of
from vimnas_ds.train.ranks import (
    CannotStart,
    Ranks,
    rank_zero_decides,
    run_together,
    sum_over_ranks,
)
from vimnas_ds.train.run_files import CheckpointError, find_checkpoint
from vimnas_ds.train.schedule import DataCursor
from vimnas_ds.train.step import StepResult

if TYPE_CHECKING:
    from vimnas_ds.train.loop import Trainer


class Taken(NamedTuple):
    """A step that is still to be judged."""

    step: int
    dataset: str
    weights_applied: bool
    alphas_applied: bool | None  #: None: it had no alpha step


class Recovery:
    """The guard of one run, with the steps since its last judgement."""

    def __init__(self, section: VimnasSection, data: JointData, ranks: Ranks):
        self._datasets, self._ranks = section.data.datasets, ranks
        self.every = section.guard.every
        chances = {
            name: chance_of(
                (s.label for s in data.splits[name]["train"]), d.num_classes, d.label_smoothing
            )
            for name, d in self._datasets.items()
        }
        self.guard, self.rewinds = Guard(section.guard, chances), Rewinds(section.guard)
        self._taken: list[Taken] = []
        self._sums: list[torch.Tensor] = []  # of each: loss, ranks, right answers, samples

    def add(self, taken: Taken, result: StepResult) -> None:
        """This rank's share of a step."""
        self._taken.append(taken)
        one, count = torch.ones_like(result.loss), torch.full_like(result.loss, result.count)
        self._sums.append(torch.stack([result.loss, one, result.correct, count]).double())

    def judge(self) -> Event | None:
        """All steps since the last judgement, up to the first event (collective)."""
        taken, sums = self._taken, self._summed()
        self._taken, self._sums = [], []
        for one, (loss, ranks, right, samples) in zip(taken, sums, strict=True):
            data = self._datasets[one.dataset]
            # with mixed labels there is no right answer to count
            top1 = None if data.mixup or data.cutmix else right / samples
            event = self.guard.observe(
                one.dataset,
                Seen(one.step, loss / ranks, top1),
                one.weights_applied,
                one.alphas_applied,
            )
            if event is not None:
                return event
        return None

    def saved(self, done: int, keep: int) -> None:
        """The configuration's checkpoint after `done` steps is being saved; `rewinds.marks` are
        the ones that must stay."""
        self.rewinds.saved(done, self.guard.safe(done), keep)

    def _summed(self) -> list[list[float]]:
        """A row for each step, over all ranks: float32 losses, so that float64 sums are exact,
        whatever their order."""
        if not self._sums:
            return []
        found: list[list[float]] = sum_over_ranks(torch.stack(self._sums), self._ranks).tolist()
        return found

    def state_dict(self) -> dict[str, Any]:
        """Collective."""
        return {
            "guard": self.guard.state_dict(),
            "rewinds": self.rewinds.state_dict(),
            "taken": [tuple(taken) for taken in self._taken],
            "sums": self._summed(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Rank 0 takes all; `judge` sums over ranks again."""
        self.guard.load_state_dict(state["guard"])
        self.rewinds.load_state_dict(state["rewinds"])
        self._taken = [Taken(*values) for values in state["taken"]]
        self._sums = [
            torch.tensor(row, dtype=torch.float64, device=self._ranks.device) * self._ranks.is_main
            for row in state["sums"]
        ]

    def begin_again(self, step: int) -> None:
        """A person has changed how the run is trained from `step` on: what was seen before is not
        held against that, and a place gets all its rewinds. The learning rate stays lowered."""
        self.guard.restart(step)
        self.rewinds.tries = 0
        self._taken, self._sums = [], []


def show(rewinds: Rewinds, board: Board, step: int, *more: str) -> None:
    """All events so far, in TensorBoard at `step`."""
    lines = [*rewinds.describe(), *more]
    board.guard(step, lines, len(rewinds.history), rewinds.lr_factor)


def _go_back(root: Path, marks: Sequence[int], ranks: Ranks) -> int:
    """The newest of `marks` whose checkpoint is whole; what is later is given up (collective).

    Raises CheckpointError where none is, and CannotRead; on other ranks CannotStart.
    """

    def choose() -> str:
        problems = []
        for mark in reversed(marks):
            try:
                find_checkpoint(root / checkpoint_name(mark))
            except CheckpointError as err:
                problems.append(str(err))
            else:
                go_back(root, checkpoint_name(mark))
                return str(mark)
        raise CheckpointError("; ".join(problems))

    return int(rank_zero_decides(choose, ranks, within_timeout=True))


def _leave_sound(root: Path, rewinds: Rewinds, event: Event, ranks: Ranks) -> str:
    """Make the checkpoint from before `event` the latest one; in words, which (collective)."""
    last = rewinds.mark_before(event)
    try:
        to = _go_back(root, [mark for mark in rewinds.marks if mark <= last], ranks)
    except (ConfigError, CannotStart, OSError) as err:
        return f"The checkpoints from before it cannot be used: {err}"
    return f"{checkpoint_name(to)}, from before it, is the latest checkpoint again"


def rewind(trainer: Trainer, recovery: Recovery, event: Event) -> None:
    """Put the run back to a good checkpoint, past the data that it has met since (collective).

    Raises NotSound when that was done too often near here (the good checkpoint is then the latest
    one all the same), or no checkpoint is whole; also where one cannot be read, and then nothing is
    given up.
    """
    position, rewinds, ranks = trainer.drawer.position, recovery.rewinds, trainer.ranks
    trainer.watch.at("rewind", position.step)
    root = trainer.files.checkpoints
    try:
        to = rewinds.answer(event, position.step)
    except NotSound as err:
        # what was saved since the trouble began must not be what a person resumes
        text = f"{err}. {_leave_sound(root, rewinds, event, ranks)}"
        show(rewinds, trainer.board, position.step, text)
        raise NotSound(text) from err
    try:
        to = _go_back(root, rewinds.marks, ranks)
        rewinds.settle(to)
        decided, skipped = rewinds.state_dict(), trainer.skipped
        path = root / checkpoint_name(to)
        run_together(lambda: trainer.restore(path), ranks, within_timeout=True)
    except (ConfigError, CannotStart, OSError) as err:
        raise NotSound(f"{rewinds.describe()[-1]}: it cannot be: {err}") from err
    rewinds.load_state_dict(decided)
    trainer.forget_missing()
    recovery.guard.restart(to)
    trainer.skipped, trainer.skipped_in_a_row = skipped, 0
    trainer.alphas_skipped_in_a_row = 0
    if ranks.is_main:
        trainer.finish_save()
    trainer.drawer.position = DataCursor(
        to, position.cursor, position.consumed, position.alpha_consumed
    )
    trainer.console.say(f"guard: {rewinds.describe()[-1]}")
    trainer.board.reopen(to + 1)
    show(rewinds, trainer.board, to + 1)
    trainer.read_ahead()
