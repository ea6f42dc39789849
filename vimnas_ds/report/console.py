"""What a run says while it trains: one line a logged step, on stdout and in a file.

On a terminal a progress bar stays below the lines; anywhere else (a log, a pipe) there are lines
only. The file gets the same lines, each with its time. The remaining time is

    eta = (total_steps - step) * EMA of the seconds per step,

taken between log lines, so evaluations and checkpoints count; the time up to a process's first
line is left out, for it holds compilation and the first decoding.
"""

from __future__ import annotations

import os
import re
import resource
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from vimnas_ds.space import Arch


class StepTimer:
    """Bias-corrected moving average of seconds per step; `decay` is per step, not per call."""

    def __init__(self, total_steps: int, decay: float = 0.98) -> None:
        self._total_steps = total_steps
        self._decay = decay
        self._last: tuple[int, float] | None = None
        self._sum = 0.0
        self._weight = 0.0

    def eta(self, step: int, now: float) -> float | None:
        """Seconds left after `step`, finished at time `now`; None until two steps are known."""
        if self._last is not None and step > self._last[0]:
            steps, seconds = step - self._last[0], now - self._last[1]
            kept = self._decay**steps
            self._sum = kept * self._sum + (1 - kept) * seconds / steps
            self._weight = kept * self._weight + (1 - kept)
        if self._last is None or step != self._last[0]:
            self._last = (step, now)
        if not self._weight:
            return None
        return max(0, self._total_steps - step) * self._sum / self._weight


class Console:
    """Rank 0's voice; elsewhere `enabled` is False and nothing is said or written.

    `start_step` is the number of steps done before this process (0 unless resumed); the log file
    is continued, never overwritten. `clock` gives seconds.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        log_path: Path,
        enabled: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._enabled = enabled
        self._clock = clock
        self._timer = StepTimer(total_steps)
        self._log_path = log_path
        self._bar: tqdm | None = None
        if enabled:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            if sys.stdout.isatty():
                self._bar = tqdm(
                    total=total_steps,
                    initial=start_step,
                    file=sys.stdout,
                    dynamic_ncols=True,
                    leave=False,
                    bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{postfix}",
                )

    def step_line(
        self,
        step: int,
        epoch: int,
        phase: str,
        dataset: str,
        arch: Arch,
        loss: float,
        top1: float | None,
        lr: float,
        samples_per_s: float,
        data_time: float,
    ) -> None:
        """Say how step `step` (counted from 1) went. `top1` is a fraction in [0, 1], None where
        labels are mixed; `data_time` is the wait for data in seconds; memory is the peak so far.
        The file's line ends with the architecture layer by layer."""
        if not self._enabled:
            return
        eta = self._timer.eta(step, self._clock())
        eta_text = "--" if eta is None else format_duration(eta)
        parts = [
            f"step {step}/{self._total_steps}",
            f"e{epoch} {phase}",
            dataset,
            summarise(arch),
            f"loss {loss:.3f}",
            *([] if top1 is None else [f"top1 {top1:.1%}"]),
            f"lr {_format_lr(lr)}",
            f"{samples_per_s:.{0 if samples_per_s >= 10 else 1}f} samples/s",
            f"data {1000 * data_time:.0f} ms",
            f"eta {eta_text}",
            f"mem {peak_memory() / 2**30:.1f} GiB",
        ]
        exact = f"  [{arch}]"
        if self._bar is not None:
            self._bar.set_postfix_str(f"eta {eta_text}", refresh=False)
            self._bar.update(step - self._bar.n)
        self._write("  ".join(parts), exact)

    def say(self, text: str) -> None:
        """Any other message, of one or more lines."""
        self._write(text, "")

    def _write(self, text: str, only_in_file: str) -> None:
        if not self._enabled:
            return
        # file names may hold bytes that are no UTF-8
        text, only_in_file = (
            part.encode("utf-8", "backslashreplace").decode() for part in (text, only_in_file)
        )
        try:
            if self._bar is not None:
                tqdm.write(text, file=sys.stdout)
            else:
                sys.stdout.write(text + "\n")
                sys.stdout.flush()
        except OSError:  # the terminal or the reader is gone: that must not end a run
            sys.stdout = Path(os.devnull).open("w")
        stamp = datetime.now().astimezone().isoformat(timespec="seconds")
        with self._log_path.open("a", encoding="utf-8") as file:
            file.writelines(
                f"{stamp}  {line}".rstrip() + "\n" for line in (text + only_in_file).split("\n")
            )

    def close(self) -> None:
        """Remove the progress bar; may be called twice."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def summarise(arch: Arch) -> str:
    """ "d3 e64 h2.0 r3.3": the heads and MLP ratios are means over the layers."""
    heads = sum(arch.num_heads) / arch.depth
    ratio = sum(arch.mlp_ratio) / arch.depth
    return f"d{arch.depth} e{arch.embed_dim} h{heads:.1f} r{ratio:.1f}"


def format_duration(seconds: float) -> str:
    """ "2:41", "1:02:03" or, from a day on, "3d 4h"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def peak_memory() -> int:
    """Bytes: the most that torch held on this GPU, or without one the process's largest size."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest  # Linux counts KiB


def _format_lr(lr: float) -> str:
    """9.8e-4, not 9.8e-04."""
    return re.sub(r"e([-+])0", r"e\1", f"{lr:.1e}") if lr else "0"
