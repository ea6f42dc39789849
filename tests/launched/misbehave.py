"""scripts/train.py, except that one rank does something at one place of the run.

The environment's MISBEHAVE says what, and when: "ACTION RANK ACTIVITY STEP", e.g. "kill 1 data 5";
the activities are those that the trainer tells its watch. A file of the name in MISBEHAVED is made
just before.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts import train
from vimnas_ds.processes import end_process
from vimnas_ds.train import watch
from vimnas_ds.train.schedule import StepContext
from vimnas_ds.train.watch import Watch

action, rank, *place = os.environ["MISBEHAVE"].split()


def misbehave(mine: Watch) -> None:
    if action == "nothing":
        return
    if action == "raise":
        raise OSError("boom")
    if action == "full":  # the kernel's own full disk, under the log
        log = Path(os.environ["MISBEHAVED"]).with_suffix("") / "train.log"
        log.unlink()
        log.symlink_to("/dev/full")
        return
    if action == "exit":
        os._exit(7)
    if action == "sleep":
        time.sleep(1000)
    if action == "draw":
        StepContext.fingerprint = lambda self: 1  # type: ignore[method-assign]
        return
    name, _, target = action.partition("-")
    number = {"term": signal.SIGTERM, "kill": signal.SIGKILL, "stop": signal.SIGSTOP}[name]
    if target == "group":
        os.killpg(0, number)
    else:
        process = psutil.Process()
        for _ in range(("worker", "launcher", "runner").index(target)):
            process = process.parent()
        process.send_signal(number)
    time.sleep(1.5)  # the others are at the place as well by then
    deadline = time.monotonic() + 30
    while name in ("term", "kill") and not mine.stop_asked() and time.monotonic() < deadline:
        time.sleep(0.05)  # until it is heard of


class MisbehavingWatch(Watch):
    def at(self, activity: str, step: int) -> None:
        super().at(activity, step)
        if os.environ["RANK"] == rank and [activity, str(step)] == place:
            Path(os.environ["MISBEHAVED"]).touch()
            misbehave(self)


if __name__ == "__main__":
    train.Watch = MisbehavingWatch  # type: ignore[misc]
    watch.LAST_WORDS = 15.0  # the disk may be busy
    end_process(train.main(watched=True))
