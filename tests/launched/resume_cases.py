"""Run as a program, on one rank: runs that go on from a checkpoint, in another way than they began.

    resume_cases.py ROOT    writes data and runs there

Every case prints one line `RESULT name {json}`; the claims are checked by pytest.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.untrained import write_data
from vimnas_ds.checkpoint_names import newest_first
from vimnas_ds.config import ConfigError, load_config
from vimnas_ds.processes import end_process
from vimnas_ds.train.claim import choose_start
from vimnas_ds.train.guard import NotSound
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
raw["vimnas"]["data"]["datasets"].pop("k400")
raw["vimnas"]["schedule"]["epochs"] = 6
(root / "images.json").write_text(json.dumps(raw))
ranks = start_ranks()
settle_on_cpu(1, ranks)
Before = Callable[[Trainer, StepContext, float], None]


class Killed(Exception):
    """Nothing of the run's own is done any more."""


def report(name: str, **values: object) -> None:
    print("RESULT", name, json.dumps(values), flush=True)


def train(
    name: str,
    resume: str | None,
    *values: str,
    before: Before | None = None,
    file: str = "config.json",
) -> Trainer:
    """The run root/NAME as scripts/train.py has it, to its end or to the Killed of `before`, which
    is called ahead of every step with its learning rate."""
    sets = [f"vimnas.output_dir={root / name}", *(f"vimnas.{value}" for value in values)]
    config = load_config(root / file, sets)
    start = choose_start(RunFiles(config.vimnas.output_dir), resume, False)
    data = open_data(config.vimnas.data, ranks, root / file)
    trainer = Trainer(config, data, ranks, start)
    inner = trainer.stepper.step

    def step(context: StepContext, lr: float, *args: object) -> StepResult:
        if before is not None:
            before(trainer, context, lr)
        return inner(context, lr, *args)

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


def die(trainer: Trainer, context: StepContext, lr: float) -> None:
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


def changed() -> None:
    """Another recipe from step 4 on; other inputs, which cannot be."""
    start = str(root / "whole" / "checkpoints" / "step00000004")
    values = ["alpha.every=2", "data.k400.mixup=0.2", "data.k400.fps=4", "schedule.lr=2e-3"]
    train("changed", start, *values, before=die)
    train("changed", "latest", *values, before=die)
    report("changed", log=(root / "changed" / "train.log").read_text())
    refused = {}
    for value in ("data.imagenet.size=40", "data.k400.frames=4"):
        try:
            train("other", start, value)
        except ConfigError as err:
            refused[value] = str(err)
    report("refused", **refused)


def without_guard() -> None:
    """On, with a lowered rate, to step 5; off to step 9; on again."""
    rates: dict[int, float] = {}
    found: list[tuple[str, int]] = []
    end = 0

    def before(trainer: Trainer, context: StepContext, lr: float) -> None:
        if context.step == 2 and trainer.recovery is not None:
            trainer.recovery.rewinds.lr_factor = 0.25
        if context.step == end:
            raise Killed
        rates[context.step] = lr / trainer.schedule.lr(context.step)

    for resume, on, last in ((None, "true", 5), ("latest", "false", 9), ("latest", "true", 99)):
        end = last
        train("guard", resume, f"guard.enabled={on}", before=before)
        status = json.loads((root / "guard" / "status.json").read_text())
        found.append((status["state"], status["step"]))
    log = (root / "guard" / "train.log").read_text()
    report("guard", rates=rates, log=log, found=found)


def given_up() -> None:
    """Images alone. NaN before step 6 and, after the rewind, before step 8: one rewind is allowed.
    Resumed as it is, and at another rate, NaN comes once more."""
    values = ["guard.enabled=true", "guard.every=2", "guard.skipped=2", "guard.margin=0"]
    values += ["guard.max_rewinds=1", "checkpoint.every=2", "checkpoint.minutes=1e-9"]
    bad: list[int] = []

    def before(trainer: Trainer, context: StepContext, lr: float) -> None:
        if bad and context.step == bad[0]:
            bad.pop(0)
            for flat in trainer.engine.deepspeed.optimizer.single_partition_of_fp32_groups:
                flat.data.fill_(math.nan)
            for parameter in trainer.engine.net.parameters():
                parameter.data.fill_(math.nan)

    ends, left, history, finite = [], [], [], False
    for resume, steps, value in (
        (None, [6, 8], "schedule.lr=1e-3"),
        ("latest", [8], "schedule.lr=1e-3"),
        ("latest", [8], "schedule.lr=5e-4"),
    ):
        bad[:] = steps
        try:
            trainer = train("stopped", resume, *values, value, before=before, file="images.json")
        except NotSound as err:
            ends.append(str(err))
        else:
            assert trainer.recovery is not None
            history = trainer.recovery.rewinds.history
            finite = all(bool(p.isfinite().all()) for p in trainer.engine.net.parameters())
            ends.append("done")
        left.append(saved("stopped"))
    report("given up", ends=ends, left=left, history=history, finite=finite)


if __name__ == "__main__":
    train("whole", None, "checkpoint.keep=9")
    report("whole", saved=saved("whole"))
    guests()
    changed()
    without_guard()
    given_up()
    end_process(0)
