"""The processes of a run, found by a mark in their environment, whoever their parent is by now."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

MARK = "VIMNAS_RUN_MARK"  #: the variable; all that descends from a launcher has it


@dataclass(frozen=True)
class Process:
    """One process of a run: "runner" and "launcher" (its child) are DeepSpeed's, a "rank" trains,
    a "helper" was started by a rank."""

    pid: int
    role: str
    rank: int | None


def find_processes(mark: str) -> list[Process]:
    """The run's living processes."""
    wanted, found = f"{MARK}={mark}", []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            if wanted not in variables:
                continue
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended, or is another user's
            continue
        settings = dict(v.split("=", 1) for v in variables if "=" in v)
        role = _role(words, settings)
        rank = int(settings["RANK"]) if role == "rank" else None
        found.append(Process(int(folder.name), role, rank))
    return found


def _role(words: list[str], settings: Mapping[str, str]) -> str:
    if "deepspeed.launcher.runner" in words:
        return "runner"
    if "deepspeed.launcher.launch" in words:
        return "launcher"
    is_rank = "RANK" in settings and any(w.endswith("train.py") for w in words)
    return "rank" if is_rank else "helper"


def kill(processes: Iterable[Process]) -> int:
    """SIGKILL to all of them, to this process last if it is one of them; returns their number."""
    ordered = sorted(processes, key=lambda p: p.pid == os.getpid())
    for one in ordered:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
    return len(ordered)
