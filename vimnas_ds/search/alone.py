"""Sub-networks trained alone, several at once: scripts/train.py under DeepSpeed's launcher.

ROOT/settings.json      what all trainings share; with others ROOT is refused
ROOT/NN/arch.json       the sub-network
ROOT/NN/console.log     what its training said
ROOT/NN/result.json     its checkpoint; written last, so what is there is finished

A finished training is kept and one that was cut off starts anew. Of its checkpoint the plain files
stay; nothing calls it the latest, so that no other script takes it for the run to work on.
"""

from __future__ import annotations

import base64
import bisect
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vimnas_ds.checkpoint_names import LATEST
from vimnas_ds.config import ConfigError, RunConfig, load_config
from vimnas_ds.space import Arch
from vimnas_ds.train.ranks import free_port, has_gpu
from vimnas_ds.train.run_files import RunFiles, config_object, find_checkpoint
from vimnas_ds.train.schedule import Schedule

#: nothing is drawn, scored or saved on the way, and the test splits are not read
QUIET = [f"vimnas.log.{key}={10**9}" for key in ("images_every", "eval_every")]
QUIET += [f"vimnas.checkpoint.every={10**9}", "vimnas.log.test_at_end=false"]
#: and one that is cut off begins anew: there is nothing to save
QUIET += ["vimnas.checkpoint.minutes=null", "vimnas.faults.grace_seconds=0.1"]
LOG_LINES, LOG_TAIL = 12, 8192  #: of a failed training; bytes that hold a log's latest line
POLL_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class TrainingFailed(ConfigError):
    """A training ended without its last checkpoint; the message says which, and its last words."""


def shortened(config: RunConfig, epochs: int) -> list[str]:
    """Overrides that run `config`'s schedule in `epochs` epochs, every part in proportion."""
    schedule = config.vimnas.schedule
    share = epochs / schedule.epochs
    overrides = [
        f"vimnas.schedule.epochs={epochs}",
        f"vimnas.schedule.warmup={schedule.warmup * share}",
    ]
    if schedule.image_epochs is not None:
        overrides.append(f"vimnas.schedule.image_epochs={round(schedule.image_epochs * share)}")
    return overrides


def epochs_within(steps: int, steps_of: Callable[[int], int]) -> int:
    """The most whole epochs that take no more than `steps` steps; `steps_of` maps epochs to steps.

    Raises ConfigError if not even one fits.
    """
    found = bisect.bisect_right(range(1, steps + 1), steps, key=steps_of)
    if not found:
        raise ConfigError(f"--steps {steps}: one epoch already takes {steps_of(1)}")
    return found


@dataclass(frozen=True)
class Trainings:
    """What is to be trained under `root`; the sub-networks differ in nothing else."""

    root: Path
    archs: Sequence[Arch]
    script: Path  #: scripts/train.py
    config: Path  #: of the supernet's run
    overrides: Sequence[str]
    settings: Mapping[str, Any]  #: what else must be the same to go on under `root`

    @cached_property
    def recipe(self) -> RunConfig:
        """The configuration that all trainings share."""
        return load_config(self.config, [*self.overrides, *QUIET])

    def total_steps(self, sizes: Mapping[str, int]) -> int:
        """Steps of one training; `sizes`: training files by dataset."""
        return Schedule.build(self.recipe, sizes).total_steps

    def folder(self, number: int) -> Path:
        return self.root / f"{number:02d}"

    def checkpoint(self, number: int) -> Path | None:
        """Where a finished training left its weights; None if it is not finished.

        Raises ConfigError if what it left names a place outside its folder.
        """
        result = self.folder(number) / "result.json"
        if not result.is_file():
            return None
        found = self.folder(number) / json.loads(result.read_text())["checkpoint"]
        if not found.resolve().is_relative_to(self.folder(number).resolve()):
            raise ConfigError(f"{result} names {found}, which is not of that training: delete it")
        return found

    def begin(self) -> None:
        """Write `root`'s settings, or see that they are these. Raises ConfigError, naming one."""
        archs = {f"{i:02d}": json.loads(a.to_json()) for i, a in enumerate(self.archs)}
        ours = {**self.settings, "archs": archs, "configuration": config_object(self.recipe)}
        ours = json.loads(json.dumps(ours))
        file = self.root / "settings.json"
        if file.is_file():
            theirs = json.loads(file.read_text())
            if (change := first_difference(theirs, ours)) is not None:
                raise ConfigError(
                    f"{self.root} holds trainings with other settings: {change}; delete it, or "
                    "choose another folder with --out"
                )
            return
        self.root.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(ours, indent=2) + "\n")
        fresh.replace(file)

    def run(self, steps: int, jobs: int | None) -> None:
        """Train what is not finished, `jobs` at once (None: as many as there are CPU cores, or one
        on all GPUs); a bar with ETA counts the steps, `steps` a training.

        Raises TrainingFailed. No training outlives the call, however this process ends.
        """
        count = len(self.archs)
        jobs = jobs or (1 if has_gpu() else min(count, len(os.sched_getaffinity(0))))
        waiting = [i for i in range(count) if self.checkpoint(i) is None]
        finished = count - len(waiting)
        running: dict[int, tuple[subprocess.Popen[bytes], float]] = {}
        bar = tqdm(total=count * steps, initial=finished * steps, unit="step", dynamic_ncols=True)
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    number = waiting.pop(0)
                    running[number] = self._start(number, jobs), time.monotonic()
                time.sleep(POLL_SECONDS)
                for number, (process, started) in list(running.items()):
                    if (code := process.poll()) is not None:
                        del running[number]
                        self._finish(number, code, time.monotonic() - started)
                        finished += 1
                bar.n = finished * steps + sum(map(self._steps_done, running))
                bar.set_description(f"{finished} of {count} trained")  # this draws the bar
        finally:
            bar.close()
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.wait()

    def _start(self, number: int, jobs: int) -> subprocess.Popen[bytes]:
        folder, environment = self.folder(number), dict(os.environ)
        folder.mkdir(exist_ok=True)
        RunFiles(folder).remove()  # what one that was cut off left
        arch = folder / "arch.json"
        arch.write_text(self.archs[number].to_json() + "\n")
        overrides = [*self.overrides, *QUIET, f"vimnas.output_dir={folder}"]
        if has_gpu():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            devices = visible.split(",") if visible else list(range(torch.cuda.device_count()))
        else:
            devices, threads = [0], max(1, len(os.sched_getaffinity(0)) // jobs)
            overrides += [f"vimnas.cpu_threads={threads}", f"vimnas.data.workers={threads}"]
            environment["OMP_NUM_THREADS"] = str(threads)
        world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
        command = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
        command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", str(self.script)]
        command += ["--deepspeed_config", str(self.config), "--arch", str(arch)]
        command += [part for override in overrides for part in ("--set", override)]
        with (folder / "console.log").open("wb") as log:
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_end_with_parent(),
            )

    def _finish(self, number: int, code: int, seconds: float) -> None:
        folder = self.folder(number)
        files = RunFiles(folder)
        if code != 0 or not (files.checkpoints / LATEST).is_file():
            log = folder / "console.log"
            lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            raise TrainingFailed(
                f"training {folder.name} of {self.archs[number]} ended with exit code {code}; the "
                f"last lines of {log}:\n" + "\n".join(f"  {line}" for line in lines)
            )
        checkpoint = find_checkpoint(folder)
        (files.checkpoints / LATEST).unlink()
        for shard in checkpoint.glob("rank*.safetensors"):
            shard.unlink()
        result = {"checkpoint": str(checkpoint.relative_to(folder)), "seconds": round(seconds, 1)}
        fresh = folder / "result.new"
        fresh.write_text(json.dumps(result) + "\n")
        fresh.replace(folder / "result.json")

    def _steps_done(self, number: int) -> int:
        log = RunFiles(self.folder(number)).log
        if not log.is_file():
            return 0
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL))
            steps = re.findall(rb"step (\d+)/", file.read())
        return int(steps[-1]) if steps else 0


def first_difference(theirs: Any, ours: Any, key: str = "") -> str | None:
    """In words, the first key at which two JSON values differ; None where they are equal."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in dict.fromkeys([*theirs, *ours]):
            path = f"{key}.{name}" if key else name
            found = first_difference(theirs.get(name), ours.get(name), path)
            if found is not None:
                return found
        return None
    return None if theirs == ours else f"{key} was {theirs}, now {ours}"


def _end_with_parent() -> Callable[[], object] | None:
    """On Linux the kernel ends a training's launcher, and that its ranks, when this process is
    gone, even killed: started again, it must find nobody writing."""
    if sys.platform != "linux":
        return None
    return partial(ctypes.CDLL(None).prctl, _PR_SET_PDEATHSIG, signal.SIGTERM)
