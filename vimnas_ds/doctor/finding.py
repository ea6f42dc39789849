"""One thing that was looked at, and how checks are kept from taking the doctor with them.

A check is a function that returns findings. It runs in a forked process: a missing package, a
crash of compiled code or a hang is then a finding like any other. The processes that a check starts
are of its process group and end with it.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Literal

#: "slow": works, but not the fast way; "skipped": cannot be there on this machine
State = Literal["ok", "slow", "missing", "failed", "skipped"]
#: How packages are put right that the set-up should have brought.
SETUP = "bash scripts/setup_venv.sh"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Finding:
    """`mend` is the command that puts it right; `required` is false where training does without
    it, or where nothing on this machine can be done about it."""

    name: str
    state: State
    detail: str
    mend: str = ""
    required: bool = True
    seconds: float = 0.0

    @property
    def counts(self) -> bool:
        """Whether something that can work here does not."""
        return self.required and self.state in ("slow", "missing", "failed")


@dataclass(frozen=True)
class Check:
    """`run` after importing `needs`, which takes no part of its time."""

    name: str
    run: Callable[[], list[Finding]]
    needs: Sequence[str] = ()


def isolated(check: Check, seconds: float, starting: float = 180.0) -> list[Finding]:
    """The check's findings, or one that says how it ended. Never raises.

    Args:
        seconds: most time that it may take; `starting`: that its imports may take.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_inside, args=(check, theirs))
    answer = None
    try:
        with _signals_later():  # or one could end this process before it knows of the other
            child.start()
            assert child.pid is not None
            with contextlib.suppress(OSError):  # it has done so itself, or has ended
                os.setpgid(child.pid, child.pid)
        theirs.close()
        started = time.perf_counter()
        if not ours.poll(starting):
            answer = _failed(check, f"its imports took longer than {starting:.0f} s")
        elif (answer := ours.recv()) is None:  # ready
            started = time.perf_counter()
            if ours.poll(seconds):
                answer = ours.recv()
            else:
                again = f"python scripts/doctor.py --only '{check.name}' --seconds {6 * seconds:g}"
                answer = _failed(check, f"took longer than {seconds:g} s", again)
    except EOFError:
        child.join()
        answer = _failed(check, f"ended its process (exit code {child.exitcode})")
    finally:
        if child.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # nothing is left of it
                os.killpg(child.pid, signal.SIGKILL)
            child.join()
    took = time.perf_counter() - started
    return [replace(finding, seconds=took) for finding in answer or []]


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """Signals that end a process are handled at the end of the block. For the main thread."""
    arrived: list[int] = []
    handlers = {n: signal.signal(n, lambda n, _: arrived.append(n)) for n in ENDING}
    try:
        yield
    finally:
        for ending, handler in handlers.items():
            signal.signal(ending, handler)
        for number in arrived:
            signal.raise_signal(number)


def _inside(check: Check, pipe: Connection) -> None:
    os.setpgid(0, 0)
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    try:
        for name in check.needs:
            importlib.import_module(name)
    except Exception as err:  # a broken installation raises anything
        missing = isinstance(err, ModuleNotFoundError)
        state: State = "missing" if missing else "failed"
        pipe.send([Finding(check.name, state, f"cannot be imported: {err}", SETUP)])
        return
    pipe.send(None)
    try:
        pipe.send(check.run())
    except Exception as err:
        pipe.send(_failed(check, f"{type(err).__name__}: {err}"))


def _failed(check: Check, detail: str, mend: str = SETUP) -> list[Finding]:
    return [Finding(check.name, "failed", detail, mend)]


def has_gpu() -> bool:
    """Whether training here goes to a GPU, asked without touching it (processes are forked)."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    from vimnas_ds.train import ranks

    return ranks.has_gpu()
