r"""Kill a run again and again, resume it, and prove that it did what an undisturbed one did.

    python scripts/chaos.py --kills 20                    (fp32, then bf16: about 12 minutes)
    python scripts/chaos.py --kills 2 --dtype bf16 --seed 5 --set vimnas.ema={}

On generated data with some broken clips, through the launcher on CPU ranks, for each dtype: one run
undisturbed, then the same again, killed with SIGKILL --kills times and continued with --resume each
time. Moments (start-up, weight step, alpha step, evaluation, save, after the last save, anywhere),
steps and victims (one rank, the launcher, the runner, all) are drawn from --seed. A kill strikes
after a share of the time that its moment usually takes; in a save also right before the n-th thing
that the rank does to the file system.

Prints a table of kills and every difference between what the two runs left behind (checkpoints,
TensorBoard, log, results: see vimnas_ds/report/same_run.py); the same in OUT/chaos.json. Exit code
0: every life began where the one before had last saved, and in the end all was equal; 1: not so.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from chaos_life import ANYWHERE, HEAD, Runs, latest
from chaos_train import LAST, STARTING, Appointment
from small_run import spoil, write_config

from vimnas_ds.report.same_run import differences
from vimnas_ds.report.table import format_table

MOMENTS = ("save", "weight step", "evaluation", "alpha step", STARTING, "save", ANYWHERE, LAST)
VICTIMS = ("rank", "all", "launcher", "runner")
PER_CLASS = 10  #: training files
SECTION: dict[str, Any] = {
    "alpha": {"every": 1},
    # not multiples of each other: points between saves, saves between points
    "log": {"every": 7, "images_every": 20, "eval_every": 10, "eval_subnets": 1},
    "checkpoint": {"every": 5, "keep": 3},
}


def appoint(runs: Runs, rng: random.Random, kills: int, first: int) -> list[Appointment]:
    """So many deaths: kinds of moments in turn, from the `first` on, at steps that go up."""
    total = latest(runs.out / "whole")
    kinds = list(islice(cycle(MOMENTS), first, first + kills))
    victims = list(islice(cycle(VICTIMS), kills))
    rng.shuffle(kinds)
    rng.shuffle(victims)
    kinds.sort(key=lambda kind: kind == LAST)  # nothing comes after those
    if STARTING in kinds:  # once with nothing saved yet
        kinds.insert(0, kinds.pop(kinds.index(STARTING)))
    steps = sorted(rng.randint(1, total) for _ in range(kills))
    found = []
    for kind, victim, step in zip(kinds, victims, steps, strict=True):
        rank = rng.randrange(runs.ranks)
        events = runs.typical(rank)["save"][1] if kind == "save" and rng.random() < 0.6 else 0
        event = rng.randint(1, int(events)) if events else None
        step = 0 if kind == STARTING else total if kind == LAST else step
        found.append(Appointment(rank, kind, step, rng.random(), event, victim))
    return found


def disturb(runs: Runs, rng: random.Random, kills: int, first: int) -> dict[str, Any]:
    """Both runs, and what came of them."""
    shutil.rmtree(runs.out, ignore_errors=True)
    print(f"{runs.dtype}: one run that nothing happens to", flush=True)
    whole = runs.live(0)
    if whole.problems:
        raise SystemExit(f"{whole.problems}: see {runs.lives / '0' / 'output.log'}")
    print(f"{runs.dtype}: {latest(runs.out / 'whole')} steps, {whole.seconds:.0f} s", flush=True)
    lives = []
    for number, appointment in enumerate([*appoint(runs, rng, kills, first), None], start=1):
        lives.append(life := runs.live(number, appointment))
        print(f"{runs.dtype} " + "  ".join(life.row), flush=True)
    found = differences(runs.out / "whole", runs.out / "killed")
    print(format_table(HEAD, [life.row for life in lives]))
    killed = lives[:-1]
    counts = {
        "moments": Counter(life.moment for life in killed),
        "victims": Counter(life.victim for life in killed),
    }
    for what, counted in counts.items():
        print(f"{what}: " + ", ".join(f"{n} {kind}" for kind, n in counted.most_common()))
    for line in found:
        print(line)
    cleaned = sum(life.cleaned for life in lives)
    problems = [f"life {one.number}: {text}" for one in lives for text in one.problems]
    print(
        f"{runs.dtype}: {kills} kills, {len(found)} differences, {len(problems)} problems, "
        f"{cleaned} processes cleaned up",
        flush=True,
    )
    return {
        "whole": asdict(whole),
        "lives": [asdict(life) for life in lives],
        **counts,
        "differences": found,
        "problems": problems,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="for each dtype")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--epochs", type=int, default=9, help="length of the run, 108 steps for 9")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as of scripts/train.py"
    )
    parser.add_argument("--seed", type=int, default=0, help="of moments, steps and victims")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="data, runs, report")
    args = parser.parse_args(argv)
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no run is left behind
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every purge
    out = args.out.resolve()
    schedule = {"epochs": args.epochs, "warmup": 4, "warmup_unit": "steps"}
    config = write_config(out, PER_CLASS, schedule=schedule, **SECTION)
    spoil(config, 16)
    report: dict[str, Any] = {"seed": args.seed, "kills": args.kills}
    for i, dtype in enumerate(args.dtype):
        runs = Runs(out / dtype, config, dtype, args.ranks, args.set)
        rng = random.Random(f"{args.seed}/{dtype}")
        report[dtype] = disturb(runs, rng, args.kills, i * args.kills)
    (out / "chaos.json").write_text(json.dumps(report, indent=1) + "\n")
    bad = sum(
        len(report[dtype][what]) for dtype in args.dtype for what in ("differences", "problems")
    )
    verdict = f"{bad} things are wrong" if bad else "all equal"
    print(f"{verdict}, {time.monotonic() - started:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
