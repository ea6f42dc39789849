"""One life of a run that chaos.py kills: launched, watched from outside to its end, judged."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_train import FOLDER, STARTING, Appointment
from run_processes import find_processes, kill
from small_run import launch

from vimnas_ds.checkpoint_names import checkpoint_step, newest_first

ANYWHERE = "anywhere"  #: a moment: struck from here, at any time
PATIENCE = 40.0  #: s that ranks get to end by themselves once launcher or runner is gone
LAUNCHING = 2.0  #: s before a rank's first line of code
STEP = 0.3  #: s of a step, about
ENDING = 45.0  #: s that the launcher gets to end the others after the death of a rank
LIMIT = 600.0  #: s that one life may take


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
    settings: Sequence[str]  #: KEY=VALUE

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
        args += [word for setting in self.settings for word in ("--set", setting)]
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
        outside = appointment if appointment and appointment.moment == ANYWHERE else None
        begun = time.monotonic()
        while runner.poll() is None and not (folder / "death.json").exists():
            if time.monotonic() > deadline:
                life.problems.append(f"still there after {LIMIT:.0f} s")
                return
            if outside is not None and self._is_time(outside, folder, begun):
                strike_from_outside(outside, folder, mark)
            time.sleep(0.05)
        by_launcher = appointment is not None and appointment.victim == "rank"
        deadline = time.monotonic() + (ENDING if by_launcher else PATIENCE)
        while time.monotonic() < deadline and find_processes(mark):
            runner.poll()
            time.sleep(0.2)

    def _is_time(self, appointment: Appointment, folder: Path, begun: float) -> bool:
        """Of a life that is to end anywhere: half of them do while they start, at any time of it,
        the others at any time of a step, from the appointed one on."""
        share = 2 * appointment.share
        if share < 1:
            usual = self.typical(appointment.rank)[STARTING][0]
            return time.monotonic() > begun + LAUNCHING + share * usual
        if where(folder, appointment.rank)["step"] < appointment.step:
            return False
        time.sleep((share - 1) * STEP)
        return True

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
        if life.cleaned:
            life.problems.append(f"{life.cleaned} processes stayed behind")
        saved = where(folder, 0)["saved"]
        if saved > life.latest:
            life.problems.append(f"saved step {saved}, but the last checkpoint is of {life.latest}")


def where(folder: Path, rank: int) -> dict[str, Any]:
    """What a rank last noted of itself: its moment, step, and the last step that it saved."""
    note = folder / f"where-{rank}.json"
    text = note.read_text() if note.exists() else ""
    return json.loads(text) if text else {"moment": STARTING, "step": 0, "saved": 0}


def strike_from_outside(appointment: Appointment, folder: Path, mark: str) -> None:
    """Kill whom the appointment says, wherever they are; death.json says where that was. Nothing
    happens as long as they are not there yet."""
    victim, now = appointment.victim, where(folder, appointment.rank)
    victims = (
        p
        for p in find_processes(mark)
        if victim == "all" or (p.role == victim and p.rank in (None, appointment.rank))
    )
    if kill(victims):
        (folder / "death.json").write_text(json.dumps(now))


def latest(run: Path) -> int:
    """The step of the checkpoint that a run goes on from; 0: there is none."""
    steps = (checkpoint_step(path.name) for path in newest_first(run / "checkpoints"))
    return next(steps, None) or 0
