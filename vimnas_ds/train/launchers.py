"""Whose child this process is: the launchers that it must not outlive.

    deepspeed (runner) -> deepspeed.launcher.launch (one a machine) -> this process
    torchrun                                                        -> this process

DeepSpeed's runner does not pass SIGTERM on, and nobody tells the workers of a launcher that was
killed: they would go on alone and hold the GPUs. So a launched process looks after its parent, and
after the runner where the parent is DeepSpeed's launcher of this machine. On the machines that a
runner reached by ssh, the runner is elsewhere: there the ssh session is looked after (unless
started under nohup, which says that it may end). A process that no launcher started (no
LOCAL_RANK) looks after nobody: its shell may close.

A launcher may have died while this process was still importing. What it started then belongs to
process 1 (or to systemd), which launches nothing itself, unless it is a program in Python.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

_LAUNCH = "deepspeed.launcher.launch"
#: set by DeepSpeed's launcher and by torchrun, for what they start
_OF_LAUNCHERS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")


class Program(NamedTuple):
    """A running program: its name, its command line, and its process id."""

    name: str
    command: tuple[str, ...]
    pid: int


def to_watch(
    ancestors: Sequence[Program], variables: Mapping[str, str], nohup: bool
) -> list[int] | None:
    """Which of `ancestors` (the parent first) must live, None: one that must is gone. See above.

    Args:
        variables: this process's environment.
        nohup: it ignores SIGHUP.
    """
    if "LOCAL_RANK" not in variables or not ancestors:
        return []
    if _adopts(ancestors[0]) and any(name in variables for name in _OF_LAUNCHERS):
        return None
    found = [0]
    if _runs(ancestors[0], _LAUNCH):
        if len(ancestors) > 1 and _is_runner(ancestors[1]):
            found.append(1)
        elif len(ancestors) > 1 and _adopts(ancestors[1]) and _of_one(ancestors[0]):
            return None
        elif not nohup:
            sessions = (i for i, one in enumerate(ancestors) if one.name.startswith("sshd"))
            found += [i for i in sessions if i][:1]
    return found


def _runs(program: Program, module: str) -> bool:
    return module in program.command[:4]


def _of_one(launch: Program) -> bool:
    """Whether this launcher was started for one machine only: by a runner on the same one."""
    return not any(word.startswith("--node_rank") for word in launch.command)


def _adopts(program: Program) -> bool:
    if program.pid != 1 and program.name != "systemd":
        return False
    return not program.command or "python" not in Path(program.command[0]).name


def _is_runner(program: Program) -> bool:
    names = [Path(word).name for word in program.command[:3]]
    return "deepspeed" in names or _runs(program, "deepspeed.launcher.runner")


class Launchers:
    """The launchers of this process; made early, before `ranks.start_ranks` sets LOCAL_RANK."""

    def __init__(self) -> None:
        launched = "LOCAL_RANK" in os.environ
        chain: list[tuple[psutil.Process, Program]] = []
        for process in psutil.Process().parents() if launched else ():
            try:
                program = Program(process.name(), tuple(process.cmdline()), process.pid)
                chain.append((process, program))
            except psutil.Error:  # of another user, or just gone: nothing of ours lies above it
                break
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        chosen = to_watch([program for _, program in chain], os.environ, nohup)
        self._gone_early, chosen = chosen is None, chosen or []
        self._watched = [chain[i][0] for i in chosen]
        commands = [chain[i][1].command for i in chosen if not chain[i][1].name.startswith("sshd")]
        self._command = commands[-1] if commands else tuple(sys.orig_argv)
        if commands and _runs(Program("", self._command, 0), _LAUNCH):  # its runner is elsewhere
            self._command = ("deepspeed", "--hostfile=HOSTFILE", *sys.argv)

    def missing(self) -> str | None:
        """In words, the first launcher that is not there any more."""
        if self._gone_early:
            return "its launcher was gone before it began"
        for process in self._watched:
            try:
                there = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            except psutil.Error:
                there = False
            if not there:
                return f"its launcher (process {process.pid}) is gone"
        return None

    def resuming(self) -> str:
        """The command that continues this run: as it was started, with --resume."""
        words: list[str] = []
        after_resume = False
        for word in self._command:
            is_value = after_resume and not word.startswith("-")
            after_resume = word == "--resume"
            given = word.startswith(("--resume=", "--local_rank="))
            if not (is_value or after_resume or given or word == "--overwrite"):
                words.append(word)
        return shlex.join([*words, "--resume"])
