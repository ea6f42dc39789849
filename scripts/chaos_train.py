"""scripts/train.py with an appointed death: what chaos.py lets the launcher start.

Trainer and WeightStepper are wrapped from outside, so that this process knows at which moment of
its life it is and can kill itself, its parents or its peers right there: after a share of the time
that such a moment takes, or before the n-th thing that it does to the file system. Nothing else
about the run is touched. Each rank notes where it is in where-RANK.json; without an appointment the
run measures how long its moments take, in typical-RANK.json.

    VIMNAS_CHAOS=FOLDER: holds appointment.json, gets where-, typical- and death.json
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the imports below are a part of the start-up that can be hit
    STARTED = time.monotonic()

from run_processes import MARK, find_processes, kill

from vimnas_ds.processes import end_process

FOLDER = "VIMNAS_CHAOS"
STARTING, LAST = "start-up", "after the last save"
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


@dataclass(frozen=True)
class Appointment:
    """Rank `rank` strikes `victim` ("rank": itself; "launcher", "runner", "all") in the first
    `moment` at or after `step`: when `share` of its usual time is over, or, if given, before its
    `file_event`-th event in the file system. A run that is about to end first strikes then."""

    rank: int
    moment: str
    step: int
    share: float
    file_event: int | None
    victim: str

    def write(self, folder: Path) -> None:
        (folder / "appointment.json").write_text(json.dumps(asdict(self)))


class Life:
    """Where this process is, and when it strikes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rank = folder, int(os.environ["RANK"])
        self.moment, self.step, self.saved = STARTING, 0, 0
        self._began, self._file_events = STARTED, 0
        self._lock = threading.Lock()
        self._takes: dict[str, list[tuple[float, int]]] = defaultdict(list)
        self._where = (folder / f"where-{self.rank}.json").open("w")
        self._appointment: Appointment | None = None
        file = folder / "appointment.json"
        if file.exists():
            appointment = Appointment(**json.loads(file.read_text()))
            self._appointment = appointment if appointment.rank == self.rank else None
        self._typical = {}
        if self._appointment is not None:
            self._typical = json.loads((folder.parent / f"typical-{self.rank}.json").read_text())
        self._struck = False
        self._timer: threading.Timer | None = None
        main = threading.get_ident()
        sys.addaudithook(lambda event, _: self._hook(event, main))
        self.enter(STARTING, 0)

    def enter(self, moment: str, step: int) -> str:
        """A moment begins; returns the one around it."""
        around, self.moment, self.step = self.moment, moment, step
        self._began, self._file_events = time.monotonic(), 0
        if moment == STARTING:
            self._began = STARTED
        self._note()
        one = self._appointment
        if one is None or self._struck:
            return around
        if moment == LAST and one.moment != LAST:
            self.strike()
        if self._is_due() and one.file_event is None:
            seconds = one.share * self._typical[moment][0] - (time.monotonic() - self._began)
            self._timer = threading.Timer(max(seconds, 0), self.strike)
            self._timer.start()
        return around

    def leave(self, around: str) -> None:
        """The moment is over: the last chance to strike in it."""
        self._takes[self.moment].append((time.monotonic() - self._began, self._file_events))
        if self._is_due():
            self.strike()
        if self.moment == "save":
            self.saved = self.step
        self.moment = around
        self._note()

    def _is_due(self) -> bool:
        one = self._appointment
        return one is not None and one.moment == self.moment and self.step >= one.step

    def _hook(self, event: str, main: int) -> None:
        if event not in FILE_EVENTS or threading.get_ident() != main:
            return
        self._file_events += 1
        one = self._appointment
        if one is not None and one.file_event == self._file_events and self._is_due():
            self.strike()

    def _note(self) -> None:
        text = json.dumps({"moment": self.moment, "step": self.step, "saved": self.saved})
        os.pwrite(self._where.fileno(), text.ljust(120).encode(), 0)

    def strike(self) -> None:
        """Once: say what happens, then let it happen."""
        with self._lock:
            if self._struck or self._appointment is None:
                return
            self._struck = True
        if (self.folder / "death.json").exists():  # struck from outside
            return
        victim = self._appointment.victim
        death = {
            "moment": self.moment,
            "step": self.step,
            "seconds": round(time.monotonic() - self._began, 4),
            "file_events": self._file_events,
        }
        written = self.folder / "death.new"
        written.write_text(json.dumps(death))
        written.rename(self.folder / "death.json")
        if victim == "rank":
            os.kill(os.getpid(), 9)
        processes = find_processes(os.environ[MARK])
        kill([p for p in processes if victim in ("all", p.role)])

    def await_strike(self) -> None:
        """A strike that is under way comes before this process's own end."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()

    def report(self) -> None:
        """The medians of what each moment takes: (seconds, events in the file system). Of the
        undisturbed run, which comes first."""
        file = self.folder.parent / f"typical-{self.rank}.json"
        if file.exists():
            return
        typical = {
            k: [statistics.median(c) for c in zip(*v, strict=True)] for k, v in self._takes.items()
        }
        file.write_text(json.dumps(typical))


def wrap(owner: Any, name: str, life: Life, moment: str, step: Callable[[Any, Any], int]) -> None:
    """Let `life` know when owner.name(self, first, ...) runs; step(self, first) is its step."""
    inner = getattr(owner, name)

    def method(self: Any, *args: Any, **options: Any) -> Any:
        around = life.enter(moment, step(self, args[0] if args else None))
        value = inner(self, *args, **options)
        life.leave(around)
        return value

    setattr(owner, name, method)


def main() -> int:
    life = Life(Path(os.environ[FOLDER]))
    import train

    from vimnas_ds.train.loop import Trainer
    from vimnas_ds.train.step import WeightStepper

    wrap(WeightStepper, "step", life, "weight step", lambda _, context: context.step + 1)
    wrap(Trainer, "_alpha_step", life, "alpha step", lambda _, context: context.step + 1)
    wrap(Trainer, "evaluate", life, "evaluation", lambda _, done: done)
    wrap(Trainer, "save", life, "save", lambda _, done: done)
    wrap(Trainer, "summarise", life, LAST, lambda trainer, _: trainer.schedule.total_steps)
    inner = Trainer.run

    def run(self: Trainer) -> dict[str, Any]:
        life.leave("between")
        return inner(self)

    Trainer.run = run  # type: ignore[method-assign]
    code = train.main(sys.argv[1:], watched=True)
    life.report()
    life.await_strike()
    return code


if __name__ == "__main__":
    end_process(main())
