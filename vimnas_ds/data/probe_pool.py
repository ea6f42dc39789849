"""Many files probed by several processes: none that hangs, crashes or eats memory ends the run.

A file that takes longer than the limit, or takes its process with it twice (the first time may have
been the kernel, short of memory), gets that as its verdict; the process is replaced and the others
never notice.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import NamedTuple

from vimnas_ds.data.bad import DataMissing
from vimnas_ds.data.probe import TIMED_OUT, UNREADABLE, UNUSABLE, Verdict
from vimnas_ds.data.probe_worker import READY, decode_verdict

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
#: Requests that lie ready for a process, so that it never waits for its parent.
QUEUED = 8
#: Files of one process before it is replaced: what a decoder leaks is given back.
LIFETIME = 20_000
#: Address space of one process, in bytes.
MEMORY = 6 << 30


class ProbeLimits(NamedTuple):
    """How files are probed: processes, seconds per file, and whether images are read through."""

    workers: int
    seconds: float = 60.0
    thorough: bool = False


def probe_files(
    root: Path, paths: Iterable[str], is_image: bool, limits: ProbeLimits
) -> Generator[tuple[str, Verdict], None, None]:
    """Probes root/path for every path, in no certain order; close the iterator to stop early.

    Raises:
        DataMissing: a process cannot be started at all.
    """
    waiting = deque(paths)
    suspects: set[str] = set()  # at hand when a process died
    workers: list[_Worker] = []
    try:
        while waiting or any(w.given for w in workers):
            while waiting and len(workers) < min(limits.workers, -(-len(waiting) // QUEUED)):
                workers.append(_start(is_image, limits))
            for worker in workers:
                worker.give(root, waiting)
            ready = wait(
                [w.answers for w in workers if w.given], timeout=_patience(workers, limits)
            )
            for worker in list(workers):
                verdict = worker.answer(limits, worker.answers in ready, suspects)
                if verdict is not None:
                    yield verdict
                if not worker.alive:
                    waiting.extendleft(reversed(worker.given))
                    worker.stop()
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.stop()


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    requests: Connection
    answers: Connection
    given: deque[str] = field(default_factory=deque)
    done: int = 0
    since: float = 0.0  # when the first of `given` was begun, as far as this process knows
    started: bool = False
    alive: bool = True

    def give(self, root: Path, waiting: deque[str]) -> None:
        while waiting and len(self.given) < QUEUED and self.done + len(self.given) < LIFETIME:
            if not self.given:
                self.since = time.monotonic()
            self.given.append(path := waiting.popleft())
            try:
                self.requests.send_bytes(os.fsencode(root / path))
            except BrokenPipeError:
                return  # its death shows when its answer is read

    def answer(
        self, limits: ProbeLimits, ready: bool, suspects: set[str]
    ) -> tuple[str, Verdict] | None:
        """The verdict of the file that this process is at, if there is one by now."""
        if not self.given:
            self.alive = self.done < LIFETIME
            return None
        if ready or self.answers.poll():  # it may have answered since
            try:
                message = self.answers.recv_bytes()
            except (EOFError, OSError):
                self._mourn()
                if self.given[0] not in suspects:
                    suspects.add(self.given[0])
                    return None
                verdict = Verdict(UNUSABLE, "the decoder crashed")
            else:
                if message == READY:
                    self.started, self.since = True, time.monotonic()
                    return None
                verdict = decode_verdict(message)
        elif time.monotonic() - self.since > (limits.seconds if self.started else STARTUP):
            self.alive = False
            if not self.started:
                raise DataMissing(
                    f"a probing process did not start in {STARTUP:.0f} s on this busy machine; try "
                    "again later, or with fewer of them (vimnas.data.workers, or --workers of "
                    "scripts/index_data.py)"
                )
            verdict = Verdict(UNREADABLE, TIMED_OUT)
        else:
            return None
        self.done += 1
        self.since = time.monotonic()
        return self.given.popleft(), verdict

    def _mourn(self) -> None:
        self.alive = False
        code = self.process.wait()
        if not self.started:
            raise DataMissing(
                f"a probing process ended with code {code} before it had started; what it said "
                "stands above"
            )

    def stop(self) -> None:
        self.requests.close()
        self.answers.close()
        self.process.kill()
        self.process.wait()


#: Seconds that a process may take to start on a busy machine.
STARTUP = 60.0


def _start(is_image: bool, limits: ProbeLimits) -> _Worker:
    try:
        return _started(is_image, limits)
    except OSError as error:
        raise DataMissing(f"cannot start a probing process: {error}") from error


def _started(is_image: bool, limits: ProbeLimits) -> _Worker:
    take, requests = Pipe(duplex=False)
    answers, give = Pipe(duplex=False)
    paths = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with take, give:
        numbers = [str(take.fileno()), str(give.fileno())]
        options = [str(int(is_image)), str(int(limits.thorough)), str(MEMORY)]
        process = subprocess.Popen(
            [sys.executable, "-m", "vimnas_ds.data.probe_worker", *numbers, *options],
            pass_fds=(take.fileno(), give.fileno()),
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    return _Worker(process, requests, answers)


def _patience(workers: list[_Worker], limits: ProbeLimits) -> float:
    """Seconds until the next process may have overstepped its limit."""
    begun = [w.since for w in workers if w.given]
    left = min(begun, default=time.monotonic()) + limits.seconds - time.monotonic()
    return min(max(left, 0.05), 1.0)
