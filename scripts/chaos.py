r"""Kill a run again and again, resume it, and prove that it did what an undisturbed one did.

    python scripts/chaos.py --kills 20                    (fp32, then bf16: about 12 minutes)
    python scripts/chaos.py --kills 2 --dtype bf16 --seed 5

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
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from chaos_train import FOLDER, LAST, STARTING, Appointment
from run_processes import find_processes, kill
from small_run import launch, spoil, write_config

from vimnas_ds.report.same_run import differences
from vimnas_ds.report.table import format_table
from vimnas_ds.train.run_files import newest_first

ANYWHERE = "anywhere"  #: struck by this process, at any time
MOMENTS = ("save", "weight step", "evaluation", "alpha step", STARTING, "save", ANYWHERE, LAST)
VICTIMS = ("rank", "all", "launcher", "runner")
#: whether ranks end by themselves once the launcher or the runner is gone
RANKS_WATCH = False
PATIENCE = 20.0 if RANKS_WATCH else 2.0  #: s that they get for it
LAUNCHING = 2.0  #: s before a rank's first line of code
ENDING = 45.0  #: s that the launcher gets to end the others after the death of a rank
LIMIT = 240.0  #: s that one life may take
PER_CLASS = 10  #: training files
SECTION: dict[str, Any] = {
    "schedule": {"epochs": 6, "warmup": 4, "warmup_unit": "steps"},
    "alpha": {"every": 1},
    # not multiples of each other: points between saves, saves between points
    "log": {"every": 7, "images_every": 20, "eval_every": 10, "eval_subnets": 1},
    "checkpoint": {"every": 5, "keep": 3},
}


@dataclass
class Life:
    """What one launch of the run came to."""

    number: int  #: 0: the undisturbed run
    moment: str = "-"  #: at which it was killed
    step: int = 0
    victim: str = "-"
    code: int = 0  #: the runner's exit code
    began_at: int | None = None  #: the step; None: killed before it said so
    latest: int = 0  #: step of the last checkpoint in the end, 0: there is none
    cleaned: int = 0  #: processes that did not end by themselves
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def row(self) -> list[str]:
        began = "-" if self.began_at is None else str(self.began_at)
        return [
            str(self.number),
            self.moment,
            str(self.step),
            self.victim,
            began,
            str(self.latest),
            str(self.cleaned),
            f"{self.seconds:.1f}",
            "; ".join(self.problems) or "ok",
        ]


HEAD = ["life", "killed in", "step", "victim", "began at", "saved", "cleaned up", "s", ""]


@dataclass(frozen=True)
class Runs:
    """Two runs of one configuration: out/whole, and out/killed with its many lives."""

    out: Path
    config: Path
    dtype: str
    ranks: int

    @property
    def lives(self) -> Path:
        return self.out / "lives"

    def typical(self, rank: int) -> dict[str, tuple[float, int]]:
        """moment -> (seconds, events in the file system), as the undisturbed run had them."""
        found: dict[str, tuple[float, int]] = json.loads(
            (self.lives / f"typical-{rank}.json").read_text()
        )
        return found

    def live(self, number: int, appointment: Appointment | None = None) -> Life:
        """Launch one of them and let it live, to its end or to the appointed one."""
        run, folder = self.out / ("killed" if number else "whole"), self.lives / str(number)
        folder.mkdir(parents=True)
        args = ["--deepspeed_config", str(self.config), "--set", f"vimnas.output_dir={run}"]
        args += ["--set", f"bf16.enabled={json.dumps(self.dtype == 'bf16')}"]
        args += ["--resume"] if (run / "config.json").exists() else []
        if appointment is not None:
            appointment.write(folder)
        life, before, started = Life(number), latest(run), time.monotonic()
        mark = f"{run.resolve()}/{number}"
        with (folder / "output.log").open("w") as output:
            variables = {FOLDER: str(folder.resolve())}
            runner = launch("chaos_train.py", args, self.ranks, mark, output, variables)
            try:
                self._watch(life, runner, folder, mark, appointment)
            finally:
                life.cleaned = kill(find_processes(mark))
                life.code = runner.wait()
        life.seconds, life.latest = time.monotonic() - started, latest(run)
        self._judge(life, folder, before, appointment)
        return life

    def _watch(
        self,
        life: Life,
        runner: subprocess.Popen[str],
        folder: Path,
        mark: str,
        appointment: Appointment | None,
    ) -> None:
        """Until nothing of this life is left, or has had its time to go."""
        deadline = time.monotonic() + LIMIT
        strikes_at = math.inf
        if appointment is not None and appointment.moment == ANYWHERE:
            usual = self.typical(appointment.rank)[STARTING][0]
            strikes_at = time.monotonic() + LAUNCHING + 1.5 * appointment.share * usual
        while runner.poll() is None and not (folder / "death.json").exists():
            if time.monotonic() > deadline:
                life.problems.append(f"still there after {LIMIT:.0f} s")
                return
            if appointment is not None and time.monotonic() > strikes_at:
                strike_from_outside(appointment, folder, mark)
            time.sleep(0.05)
        by_launcher = appointment is not None and appointment.victim == "rank"
        deadline = time.monotonic() + (ENDING if by_launcher else PATIENCE)
        while time.monotonic() < deadline and find_processes(mark):
            runner.poll()
            time.sleep(0.2)

    def _judge(
        self, life: Life, folder: Path, before: int, appointment: Appointment | None
    ) -> None:
        """Fill in what the life's files say, and what was wrong with it."""
        output = (folder / "output.log").read_text(errors="replace")
        if match := re.search(r"resumed from \S+ at step (\d+)", output):
            life.began_at = int(match[1])
        elif " samples, " in output:  # the first line of a run that has begun
            life.began_at = 0
        if life.began_at not in (None, before):
            life.problems.append(f"began at {life.began_at}, the last save was {before}")
        if appointment is None:
            if life.code != 0 or life.cleaned:
                life.problems.append(f"exit code {life.code}, {life.cleaned} processes left")
            return
        if not (folder / "death.json").exists():
            life.problems.append(f"ended by itself with exit code {life.code}")
            return
        death = json.loads((folder / "death.json").read_text())
        life.moment, life.step, life.victim = death["moment"], death["step"], appointment.victim
        if life.cleaned and (RANKS_WATCH or life.victim in ("rank", "all")):
            life.problems.append(f"{life.cleaned} processes stayed behind")
        saved = (
            json.loads((folder / "where-0.json").read_text())["saved"]
            if (folder / "where-0.json").exists()
            else 0
        )
        if saved > life.latest:
            life.problems.append(f"saved step {saved}, but the last checkpoint is of {life.latest}")


def strike_from_outside(appointment: Appointment, folder: Path, mark: str) -> None:
    """Kill whom the appointment says, wherever they are; death.json says where that was."""
    where = {"moment": STARTING, "step": 0}
    if (note := folder / f"where-{appointment.rank}.json").exists():
        where = json.loads(note.read_text())
    victim = appointment.victim
    kill(
        p
        for p in find_processes(mark)
        if victim == "all" or (p.role == victim and p.rank in (None, appointment.rank))
    )
    (folder / "death.json").write_text(json.dumps(where))


def latest(run: Path) -> int:
    """The step of the checkpoint that a run goes on from; 0: there is none."""
    return next((int(p.name.removeprefix("step")) for p in newest_first(run / "checkpoints")), 0)


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
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of moments, steps and victims")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="data, runs, report")
    args = parser.parse_args(argv)
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no run is left behind
    out = args.out.resolve()
    config = write_config(out, PER_CLASS, **SECTION)
    spoil(config, 16)
    report: dict[str, Any] = {"seed": args.seed, "kills": args.kills}
    for i, dtype in enumerate(args.dtype):
        runs = Runs(out / dtype, config, dtype, args.ranks)
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
