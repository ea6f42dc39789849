r"""Threads that read and decode files, any of which may block for ever.

A dead network mount holds a thread inside the kernel, and nothing but the mount can free it. So a
file has a time limit, and one that oversteps it is given up together with its thread: a new thread
does the same job once more, and there the file is a bad one like any other. That verdict stays for
as long as the pool lives, whatever the file does later.

    job -> reader: begin_reading(name) ... read, decode ... -> result
                        \- too long: the reader is lost, its job goes to a new one -> BadFile

Time is counted in the rounds of a watching thread, so that a process that was suspended loses
nothing. All threads are daemons: a blocked one keeps no process alive.
"""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from vimnas_ds.data.bad import TOO_SLOW, BadFile, BlockedFiles

#: So many files in a row that block one job, or as many lost readers as the pool has threads (two
#: at least), mean that the disk is gone: known before three time limits are over.
MOST_IN_A_ROW = 3
#: Seconds that `shutdown` waits for what is being read.
PATIENCE = 3.0


def begin_reading(name: str) -> None:
    """To be called before anything is read of a file: in a `Readers` job its time runs from here to
    the next call or the job's end.

    Raises:
        BadFile: it has blocked a reader before.
    """
    thread = threading.current_thread()
    if isinstance(thread, _Reader):
        thread.begin(name)


def begin_file(path: Path) -> Path:
    """`begin_reading` of a file on the disk, before it is opened; returns the path.

    Raises:
        BadFile: it cannot be found, is no regular file (opening a pipe waits for who writes into
            it), or has blocked a reader before.
    """
    begin_reading(str(path))
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise BadFile(str(path), getattr(error, "strerror", None) or str(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise BadFile(str(path), "not a regular file")
    return path


class Readers(Executor):
    """A pool of reading threads. A job may be begun twice, so it must be a function of its inputs.

    Args:
        threads: jobs done at the same time.
        seconds: time limit of one file, `vimnas.data.file_timeout`.

    Once too many readers are lost, all jobs fail with `BlockedFiles`.
    """

    def __init__(self, threads: int, seconds: float) -> None:
        self._seconds = seconds
        self._most_lost = max(2, threads)
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._readers: list[_Reader] = []
        self._lost: list[_Reader] = []  # given up and still blocked
        self._blocking: set[str] = set()  # files that have cost a reader
        self._error: Exception | None = None  # why no more jobs are taken
        self._closed = threading.Event()
        for _ in range(threads):
            self._add_reader(None)
        self._watcher = threading.Thread(target=self._watch, name="readers", daemon=True)
        self._watcher.start()

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As every executor's. Raises BlockedFiles if too many readers are lost."""
        with self._lock:
            if self._error is not None:
                raise self._error
            job = _Job(function, args, kwargs)
            self._jobs.put(job)
        return job.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Jobs that are not begun fail with CancelledError, always; the others are waited for, but
        only for `PATIENCE` seconds, then they fail as well. May be called again."""
        with self._lock:
            self._error = self._error or RuntimeError("these readers were shut down")
            self._end_queued(CancelledError())
        self._closed.set()
        until = time.monotonic() + PATIENCE * wait
        for reader in (*self._readers, self._watcher):
            reader.join(max(0.0, until - time.monotonic()))
        with self._lock:
            self._end_running(CancelledError())

    def is_blocking(self, path: str) -> bool:
        """Whether this file has cost a reader."""
        return path in self._blocking

    def next_job(self) -> _Job | None:
        """For a reader: waits for a job; None: it is time to end."""
        while (job := self._jobs.get()) is not None:
            if job.future.set_running_or_notify_cancel():
                return job
        return None

    def settle(self, reader: _Reader, result: Any, error: BaseException | None) -> bool:
        """For a reader: the outcome of its job. False if it was given up meanwhile."""
        with self._lock:
            job, reader.job, reader.file = reader.job, None, None
            if reader.is_lost:
                if reader in self._lost:
                    self._lost.remove(reader)
                return False
            assert job is not None
            if error is None:
                job.future.set_result(result)
            else:
                job.future.set_exception(error)
            return True

    def _add_reader(self, job: _Job | None) -> None:
        self._readers.append(_Reader(self, job))
        self._readers[-1].start()

    def _watch(self) -> None:
        round_seconds = min(1.0, self._seconds / 4)
        while not self._closed.wait(round_seconds):
            with self._lock:
                for reader in list(self._readers):
                    if (file := reader.file) is not None:
                        file.age += round_seconds
                        if file.age > self._seconds:
                            self._give_up(reader, file.path)

    def _give_up(self, reader: _Reader, path: str) -> None:
        job, reader.is_lost = reader.job, True
        self._readers.remove(reader)
        self._lost.append(reader)
        self._blocking.add(path)
        assert job is not None
        job.lost += 1
        fine = len(self._lost) < self._most_lost and job.lost < MOST_IN_A_ROW
        if self._error is None and fine:
            self._add_reader(job)
            return
        if self._error is None:
            self._error = BlockedFiles(sorted(self._blocking), self._seconds)
            self._end_queued(self._error)
            self._end_running(self._error)
        job.future.set_exception(self._error)

    def _end_queued(self, error: BaseException) -> None:
        """Fails the jobs that nobody has begun, and sends the readers home."""
        with suppress(Empty):  # readers take jobs meanwhile
            while True:
                job = self._jobs.get_nowait()
                if job is not None and job.future.set_running_or_notify_cancel():
                    job.future.set_exception(error)
        for _ in self._readers:
            self._jobs.put(None)

    def _end_running(self, error: BaseException) -> None:
        """Fails the jobs that are being done; their readers are lost."""
        for reader in self._readers:
            if reader.job is not None:
                reader.is_lost = True
                reader.job.future.set_exception(error)
        self._readers = [reader for reader in self._readers if not reader.is_lost]


class _Job:
    """A function with its arguments, and what becomes of it."""

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.future: Future[Any] = Future()
        self.lost = 0  # readers it has cost


class _File:
    """A file that is being read, and for how many seconds."""

    def __init__(self, path: str) -> None:
        self.path, self.age = path, 0.0


class _GivenUp(BaseException):
    """Ends the job of a reader that has woken up too late; nobody waits for it."""


class _Reader(threading.Thread):
    """One thread of a pool, the job that it does, and the file that it reads for it."""

    def __init__(self, pool: Readers, job: _Job | None) -> None:
        super().__init__(name="decode", daemon=True)
        self._pool, self.job = pool, job
        self.file: _File | None = None
        self.is_lost = False

    def begin(self, path: str) -> None:
        if self.is_lost:
            raise _GivenUp
        self.file = None
        if self._pool.is_blocking(path):
            raise BadFile(path, TOO_SLOW)
        self.file = _File(path)

    def run(self) -> None:
        if self.job is not None and not self._work(self.job):
            return
        while (job := self._pool.next_job()) is not None:
            self.job = job
            if not self._work(job):
                return
            del job  # or its arrays would live on until the next one comes

    def _work(self, job: _Job) -> bool:
        try:
            result, error = job.function(*job.args, **job.kwargs), None
        except BaseException as raised:
            result, error = None, raised
        try:
            return self._pool.settle(self, result, error)
        finally:
            del job, result, error  # a raised error holds this frame: no circles
