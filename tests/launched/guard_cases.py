"""Run by the launcher on 2 ranks: training runs that go wrong, with the collapse guard on and off.

What goes wrong is done to the weights here, never by a switch of the product; the collapse is a
learning rate's. Every case prints one line `RESULT name {json}` on rank 0.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from vimnas_ds.config import load_config
from vimnas_ds.processes import end_process
from vimnas_ds.train.loop import Trainer
from vimnas_ds.train.open_data import open_data
from vimnas_ds.train.ranks import settle_on_cpu, start_ranks
from vimnas_ds.train.run_files import find_checkpoint
from vimnas_ds.train.schedule import StepContext
from vimnas_ds.train.step import StepResult

given = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank")]
folder, cases = Path(given[0]), given[1:]
ranks = start_ranks()
settle_on_cpu(1, ranks)


Done = tuple[int, int, float]  #: step, cursor, learning rate


class Killed(Exception):
    pass


def report(name: str, **values: object) -> None:
    if ranks.is_main:
        print("RESULT", name, json.dumps(values), flush=True)


def build(name: str, *values: str, resume: bool = False) -> Trainer:
    """The run folder/NAME of folder/guard.json."""
    values = (f"vimnas.output_dir={folder / name}", *values)
    config = load_config(folder / "guard.json", list(values))
    data = open_data(config.vimnas.data, ranks, folder / "guard.json")
    return Trainer(config, data, ranks, find_checkpoint(folder / name) if resume else None)


def watch(trainer: Trainer, seen: list[Done], before: Callable[[StepContext], None]) -> None:
    """Calls `before` ahead of every step, and writes down all in `seen`."""
    inner = trainer.stepper.step

    def step(context: StepContext, lr: float, *args: object) -> StepResult:
        seen.append((context.step, context.cursor, lr))
        before(context)
        return inner(context, lr, *args)

    trainer.stepper.step = step


def spoil(trainer: Trainer, factor: float) -> None:
    """What rank 1 owns of the weights is multiplied; its next update brings it to all ranks."""
    if ranks.rank == 1:
        for flat in trainer.engine.deepspeed.optimizer.single_partition_of_fp32_groups:
            flat.data.mul_(factor)


def faults(name: str, killed: bool = False) -> None:
    """NaN at the 25th batch, weights blown up at the 80th and, near there, at the 120th. `killed`:
    the process ends soon after the third rewind, before another save, and is started again."""
    bad = {25: math.nan, 80: 20.0, 120: 20.0}
    trainer, seen = build(name), list[Done]()

    def before(context: StepContext) -> None:
        history = trainer.recovery.rewinds.history
        if killed and len(history) == 3 and context.step == 80:
            raise Killed
        if context.cursor in bad:
            spoil(trainer, bad[context.cursor])

    watch(trainer, seen, before)
    again = 0
    try:
        trainer.run()
    except Killed:
        trainer.close()
        dist.barrier()
        trainer, killed, again = build(name, resume=True), False, len(seen)
        watch(trainer, seen, before)
        trainer.run()
    report(
        name,
        seen=seen,
        again=again,
        history=trainer.recovery.rewinds.history,
        skipped=trainer.skipped,
        checkpoints=sorted(p.name for p in trainer.files.checkpoints.glob("step*")),
        finite=all(bool(torch.isfinite(p).all()) for p in trainer.engine.net.parameters()),
    )
    trainer.close()
    dist.barrier()


def damaged(name: str) -> None:
    """NaN at the 25th batch; the checkpoint that is to be rewound to has a wrong byte by then."""
    trainer = build(name, "vimnas.schedule.epochs=10")

    def before(context: StepContext) -> None:
        if context.cursor == 25:
            if ranks.is_main:
                file = trainer.files.checkpoints / "step00000015" / "supernet.safetensors"
                content = file.read_bytes()
                file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            spoil(trainer, math.nan)

    seen = list[Done]()
    watch(trainer, seen, before)
    trainer.run()
    report(
        name,
        history=trainer.recovery.rewinds.history,
        marks=trainer.recovery.rewinds.marks,
        checkpoints=sorted(p.name for p in trainer.files.checkpoints.glob("step*")),
        steps=[step for step, *_ in seen],
        finite=all(bool(torch.isfinite(p).all()) for p in trainer.engine.net.parameters()),
    )
    trainer.close()
    dist.barrier()


def collapse(name: str, guarded: bool) -> None:
    """A warm-up to a learning rate at which the supernet learns first and then collapses."""
    values = ["vimnas.schedule.epochs=80", "vimnas.schedule.lr=0.4", "vimnas.schedule.warmup=320"]
    values += ["vimnas.alpha.enabled=false", f"vimnas.guard.enabled={str(guarded).lower()}"]
    values += ["vimnas.guard.collapse_steps=20", "vimnas.guard.collapse_gain=0.1"]
    values += ["vimnas.guard.margin=20", "vimnas.guard.lr_factor=0.05", "vimnas.guard.near=100"]
    values += ["vimnas.checkpoint.every=20"]
    trainer = build(name, *values)
    losses, rights = [], []
    take = trainer.meters.add

    def add(dataset: str, loss: torch.Tensor, correct: torch.Tensor, count: int) -> None:
        losses.append(float(loss))
        rights.append(float(correct) / count)
        take(dataset, loss, correct, count)

    trainer.meters.add = add
    seen: list[Done] = []
    watch(trainer, seen, lambda context: None)
    trainer.run()
    report(
        name,
        steps=len(seen),
        losses=[round(statistics.median(losses[i : i + 20]), 3) for i in range(0, len(losses), 20)],
        top1=[round(statistics.fmean(rights[i : i + 20]), 3) for i in range(0, len(rights), 20)],
        select=trainer.scores(trainer.subnets(), "imagenet", "select")["largest"].top1,
        train=trainer.best.score,
        history=trainer.recovery.rewinds.history if trainer.recovery else [],
        lr=seen[-1][2],
    )
    trainer.close()
    dist.barrier()


if __name__ == "__main__":
    if "faults" in cases:
        faults("whole")
        faults("killed", killed=True)
        damaged("damaged")
    if "collapse" in cases:
        collapse("unguarded", guarded=False)
        collapse("guarded", guarded=True)
    dist.barrier()
    end_process(0)
