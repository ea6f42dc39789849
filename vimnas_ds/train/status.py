"""How a run stands: exit codes, and OUTPUT_DIR/status.json.

A launcher may hide its workers' exit code (torchrun makes 1 of all; DeepSpeed's runner ends with 0
when its own launcher was killed), so how a run ended is also written into a file.
"""

from __future__ import annotations

import enum
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

from vimnas_ds.durable import flush


class Exit(enum.IntEnum):
    """What scripts/train.py exits with, on every rank."""

    DONE = 0
    FAILED = 1  #: an unexpected error, or a rank that died or got stuck
    CANNOT_START = 2  #: configuration or data, said before any work
    STOPPED = 3  #: the run stopped itself: non-finite steps, broken data, ranks that disagree
    RESUMABLE = 75  #: pre-empted (SIGTERM, Ctrl-C, a launcher that is gone): to be resumed


_STATES = {Exit.DONE: "done", Exit.FAILED: "failed", Exit.STOPPED: "stopped"}


@dataclass(frozen=True)
class Status:
    """Writes status.json.

    state      running, done, failed, stopped, preempted; "running" whose process is not there any
               more: killed
    step       steps done; while running, those of the latest checkpoint
    reason     in words
    exit_code  null while running
    resume     the command that continues the run
    host, pid  of the rank that wrote it
    time       seconds since 1970
    """

    path: Path
    resume: str

    def write(self, step: int, reason: str, code: Exit | None = None) -> None:
        """Replace the file; `code` None: the run goes on. By one rank."""
        status = {
            "state": "running" if code is None else _STATES.get(code, "preempted"),
            "step": step,
            "reason": reason,
            "exit_code": code,
            "resume": self.resume,
            "host": platform.node(),
            "pid": os.getpid(),
            "time": round(time.time(), 3),
        }
        fresh = self.path.with_name(f"{self.path.name}.{platform.node()}-{os.getpid()}")
        fresh.write_text(json.dumps(status, indent=2) + "\n")
        flush(fresh)
        fresh.replace(self.path)
