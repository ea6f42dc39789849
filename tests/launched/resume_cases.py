"""Run as a program, on one rank: runs that go on from a checkpoint, in another way than they began.

    resume_cases.py ROOT    writes data and runs there

Every case prints one line `RESULT name {json}`; the claims are checked by pytest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.untrained import write_data
from vimnas_ds.config import load_config
from vimnas_ds.train.checkpoint_names import newest_first
from vimnas_ds.train.claim import choose_start
from vimnas_ds.train.loop import Trainer
from vimnas_ds.train.open_data import open_data
from vimnas_ds.train.ranks import settle_on_cpu, start_ranks
from vimnas_ds.train.run_files import RunFiles
from vimnas_ds.train.schedule import StepContext
from vimnas_ds.train.step import StepResult

root = Path(sys.argv[1])
raw = write_data(root)
raw["train_batch_size"] = 2
raw["vimnas"] |= {
    "schedule": {"epochs": 3, "warmup": 0, "image_epochs": 0, "lr": 1e-3},
    "log": {"every": 1, "eval_every": 1000, "eval_subnets": 0, "test_at_end": False},
    "checkpoint": {"every": 4, "keep": 3},
}
(root / "config.json").write_text(json.dumps(raw))
ranks = start_ranks()
settle_on_cpu(1, ranks)
Before = Callable[[Trainer, StepContext], None]


class Killed(Exception):
    """Nothing of the run's own is done any more."""


def report(name: str, **values: object) -> None:
    print("RESULT", name, json.dumps(values), flush=True)


def train(name: str, resume: str | None, *values: str, before: Before | None = None) -> Trainer:
    """The run root/NAME as scripts/train.py has it, to its end or to what `before`, which is called
    ahead of every step, raises."""
    sets = [f"vimnas.output_dir={root / name}", *(f"vimnas.{value}" for value in values)]
    config = load_config(root / "config.json", sets)
    start = choose_start(RunFiles(config.vimnas.output_dir), resume, False)
    data = open_data(config.vimnas.data, ranks, root / "config.json")
    trainer = Trainer(config, data, ranks, start)
    inner = trainer.stepper.step

    def step(context: StepContext, *args: object) -> StepResult:
        if before is not None:
            before(trainer, context)
        return inner(context, *args)

    trainer.stepper.step = step
    try:
        trainer.run()
    except Killed:
        pass
    finally:
        trainer.close()
    return trainer


def saved(name: str) -> list[str]:
    return [path.name for path in newest_first(root / name / "checkpoints")]


def die(trainer: Trainer, context: StepContext) -> None:
    raise Killed


def guests() -> None:
    """From another run's checkpoint, which is gone afterwards; killed in its first step."""
    start = root / "whole" / "checkpoints" / "step00000004"
    train("guest", str(start), before=die)
    report("guest", saved=saved("guest"))
    start.rename(root / "moved")
    train("guest", "auto")
    report("guest again", saved=saved("guest"))
    (root / "moved").rename(start)


if __name__ == "__main__":
    train("whole", None, "checkpoint.keep=9")
    report("whole", saved=saved("whole"))
    guests()
