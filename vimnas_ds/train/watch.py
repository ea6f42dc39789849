"""Watches over one rank from a thread of its own: launchers, signals, the other ranks.

What it hears of, it either asks the trainer to act on (a stop: save and leave) or, when the main
thread cannot be asked any more, ends the process itself: a collective that hangs cannot be
interrupted from Python, so the end is always `os._exit`, after the reason was said on stderr, in
the log and in status.json.

    SIGTERM, SIGINT, SIGHUP (a terminal that is closed; not under nohup), a launcher that is gone
        -> stop, agreed by all ranks before the next step; not saved within
        vimnas.faults.grace_seconds: the end
    a second signal                          -> the end
    a rank that died, fell silent, is stuck, or failed and said why -> the end, everywhere

All times are of an awake clock: what a suspended run could not do meanwhile is held against nobody.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing.connection import wait
from types import FrameType
from typing import NoReturn

import torch.distributed as dist

from vimnas_ds.config import FaultsSection
from vimnas_ds.train.awake import AwakeClock
from vimnas_ds.train.launchers import Launchers
from vimnas_ds.train.pulse import (
    BEAT,
    Beat,
    Hub,
    Line,
    Verdict,
    connect,
    died,
    fell_silent,
    shortened,
    verdict_of,
)
from vimnas_ds.train.ranks import CannotStart, Ranks
from vimnas_ds.train.status import Exit

#: Seconds in which a repeated signal belongs to the first: launchers pass on what their whole
#: group was sent.
ECHO = 2.0
#: Seconds in which a signal waits for the reason: a launcher that has seen a rank end sends one.
GLANCE = 0.2
#: Seconds that an error in a collective waits to hear which rank is behind it.
HEARSAY = 5.0
#: Seconds in which all ranks must have met: one that died before that is not heard of.
MEETING = 600.0
#: Seconds for the last words: log, TensorBoard and status.json may lie on a disk that is gone.
LAST_WORDS = 3.0


class Watch:
    """This rank's watch; does nothing until `start`. For the main thread unless said otherwise."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.limits = FaultsSection()
        self.launchers = Launchers()
        #: says what `end` says in the run's files: (first line, code); called on one rank
        self.last_words: Callable[[str, Exit], None] | None = None
        self._beat = Beat(self.rank, os.getpid(), platform.node())
        self._clock = AwakeClock()
        self._since = self._clock.now()  # when the activity began, or last went on
        self._stopped: tuple[str, float] | None = None  # why, and when
        self._leaving: tuple[Exit, float] | None = None
        self._begun = False
        self._met = os.environ.get("WORLD_SIZE", "1") == "1"  # one rank has nobody to meet
        self._hub: Hub | None = None
        self._line: Line | None = None
        self._zero: tuple[Beat, float] | None = None  # what rank 0 did, and when it said so
        self._first_signal: float | None = None
        self._posted = False  # a verdict of this rank's own
        self._heeded = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
        self._signals: int | None = None  # where the numbers of signals are read; None: not started
        self._ending = threading.Lock()
        self._telling = threading.Lock()  # beats are sent in the order in which they are made
        self._details = ""

    # -- what the trainer says ------------------------------------------------------------------

    def at(self, activity: str, step: int) -> None:
        """This rank begins with `activity` of `step` (counted from 1); all ranks begin the same
        ones in the same order."""
        self._since = self._clock.now()
        self._beat = replace(self._beat, activity=activity, step=step, begun=self._beat.begun + 1)

    def go_on(self) -> None:
        """The activity is getting on."""
        self._since = self._clock.now()

    def stop_asked(self) -> bool:
        """Whether some rank has been asked to stop. Ranks learn it at different times: what they
        do about it, they must agree on."""
        return self._stopped is not None

    # -- phases -----------------------------------------------------------------------------------

    def start(self) -> None:
        """From now on signals and launchers are watched, and the time until all ranks have met."""
        self._since = self._clock.now()
        self._signals, told = os.pipe()
        os.set_blocking(told, False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup
            self._heeded -= {signal.SIGHUP}
        for number in self._heeded:
            signal.signal(number, lambda *_: None)  # the thread reads the pipe
        args = (self._signals,)
        threading.Thread(target=self._run, args=args, name="watch", daemon=True).start()

    def join(self, ranks: Ranks) -> None:
        """From now on all ranks watch one another. Raises CannotStart."""
        store = dist.distributed_c10d._get_default_store()
        if ranks.is_main:
            self._hub = Hub(ranks.world_size, os.environ["MASTER_ADDR"])
            store.set("hub", f"{self._hub.port} {self._hub.key}")
        port, key = store.get("hub").decode().split()
        host = os.environ["MASTER_ADDR"].replace("localhost", "127.0.0.1")
        try:
            self._line = connect(host, int(port), key, self._beat)
        except OSError as error:
            raise CannotStart(
                f"rank {ranks.rank} cannot reach rank 0 at {host}, port {port} ({error}): ports "
                "between the machines must be open, as for NCCL and gloo"
            ) from error
        self._met = True

    def set_limits(self, limits: FaultsSection) -> None:
        self.limits = limits
        if self._hub is not None:
            self._hub.stuck, self._hub.silent = 60 * limits.stuck_minutes, limits.silent_seconds

    def begin(self, last_words: Callable[[str, Exit], None]) -> None:
        """The run has begun: a stop saves it."""
        self.last_words, self._begun, self._met = last_words, True, True
        self.at("start", 0)

    def leave(self, code: Exit) -> None:
        """This rank needs no other any more, and is needed by none: from now on whatever takes
        long is cut off, and signals are ignored (launchers pass them on to one after another)."""
        if self._signals is not None:
            for number in self._heeded:
                signal.signal(number, signal.SIG_IGN)
        self._leaving = (code, self._clock.now())
        self._send_beat()

    # -- the end ----------------------------------------------------------------------------------

    def fail(self, error: BaseException, code: Exit = Exit.FAILED) -> NoReturn:
        """`error` ends the run on all ranks; where it comes from a collective that another rank
        broke, that rank is named first."""
        self._details = "".join(traceback.format_exception(error)) if code == Exit.FAILED else ""
        if _is_of_collective(error):
            time.sleep(HEARSAY)  # the thread ends the process when the reason is known
        if code == Exit.FAILED:
            what = f"failed in {self._beat.place}: {type(error).__name__}: {error}"
        else:
            what = f"stopped: {error}"
        self._post(what, code)

    def _post(self, what: str, code: Exit) -> NoReturn:
        """End all ranks: what this one did."""
        text = f"rank {self.rank} {what}"
        verdict = Verdict(shortened(text), (self.rank,), code)
        if verdict.text != text:  # this rank says all of it
            self._details = self._details or f"{text}\n"
        self._posted = True
        if self._hub is not None:
            self._hub.find(verdict)
        elif self._line is not None:
            self._line.send(asdict(verdict))
        self._end(verdict.text, code, self._speaks(verdict))

    def _end(self, text: str, code: Exit, speaks: bool, dump: bool = False) -> NoReturn:
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # another thread is at it
        _shout(f"{text}\n{self._details}")
        if dump:
            faulthandler.dump_traceback(all_threads=True)
        if speaks and self.last_words is not None:
            words = threading.Thread(target=self._say_last, args=(text, code), daemon=True)
            words.start()
            words.join(LAST_WORDS)
        if self._hub is not None:
            self._hub.wait_until_told(LAST_WORDS)
        os._exit(code)

    def _say_last(self, text: str, code: Exit) -> None:
        assert self.last_words is not None
        try:
            self.last_words(text, code)
        except OSError as error:  # the disk may be the reason
            _shout(f"the run's files do not hold how it ended: {error}\n")

    def _speaks(self, verdict: Verdict) -> bool:
        """Rank 0 writes the run's files, unless it is what died."""
        return self.rank == (1 if verdict.ranks == (0,) and self.rank else 0)

    # -- the thread -------------------------------------------------------------------------------

    def _run(self, signals: int) -> None:
        sent = 0.0
        while True:
            line = self._line
            ready = wait([signals, *([line.connection] if line else [])], BEAT / 2)
            if line and line.connection in ready:
                self._hear(line.receive())
            if signals in ready:
                self._listen(GLANCE)
                for number in os.read(signals, 64):
                    if number in self._heeded:
                        self._signalled(signal.Signals(number))
            if self._clock.now() - sent >= BEAT:
                sent = self._clock.now()
                self._look_after_launchers()
                self._look_at_clock()
                self._send_beat()

    def _listen(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._line and wait([self._line.connection], max(end - time.monotonic(), 0)):
            self._hear(self._line.receive())

    def _signalled(self, number: signal.Signals) -> None:
        if self._leaving:
            return
        now = self._clock.now()
        self._first_signal = self._first_signal or now
        if now - self._first_signal > ECHO:
            self._post(f"received {number.name} again: ends at once", Exit.RESUMABLE)
        self._stop(f"rank {self.rank} received {number.name}")
        self._send_beat()

    def _look_after_launchers(self) -> None:
        missing = None if self._leaving or self._stopped else self.launchers.missing()
        if missing:
            self._stop(f"rank {self.rank}: {missing}")

    def _stop(self, why: str) -> None:
        if self._stopped or self._leaving:
            return
        self._stopped = why, self._clock.now()
        if self._begun:
            _shout(f"{why}: saving and stopping\n")
        else:
            self._post("stops before the run has begun: " + why, Exit.RESUMABLE)

    @property
    def reason(self) -> str:
        """Why this rank stops."""
        return self._stopped[0] if self._stopped else "another rank was asked to stop"

    def _look_at_clock(self) -> None:
        now, grace = self._clock.now(), self.limits.grace_seconds
        if not self._met and not self._leaving and now - self._since > MEETING:
            self._post(
                f"has waited {MEETING:g} s for the ranks to meet: one of "
                f"{os.environ.get('WORLD_SIZE')} did not start, or cannot reach "
                f"{os.environ.get('MASTER_ADDR')}, port {os.environ.get('MASTER_PORT')}; see what "
                "each machine printed",
                Exit.FAILED,
            )
        if self._leaving and now - self._leaving[1] > grace:
            self._end(f"rank {self.rank} did not get away by itself", self._leaving[0], False)
        if self._stopped and not self._leaving and now - self._stopped[1] > grace:
            self._post(
                f"is still in {self._beat.place}, vimnas.faults.grace_seconds ({grace:g} s) "
                f"after it was to stop ({self._stopped[0]}): ends without a checkpoint",
                Exit.RESUMABLE,
            )
        if self._zero and now - self._zero[1] > self.limits.silent_seconds and not self._leaving:
            self._obey(fell_silent(self._zero[0], self.limits.silent_seconds))

    def _hear(self, message: dict[str, object] | None) -> None:
        """What the hub says; None: it is gone."""
        if message is None:
            self._line = None
            last = self._zero[0] if self._zero else Beat(0, 0, os.environ["MASTER_ADDR"])
            if not last.leaving and not self._leaving:
                self._obey(died(last))
            return
        if isinstance(zero := message["zero"], dict):
            self._zero = Beat(**zero), self._clock.now()
        if isinstance(stop := message["stop"], str):
            self._stop(stop)
        if isinstance(verdict := message["verdict"], dict) and not self._leaving:
            self._obey(verdict_of(verdict))

    def _obey(self, verdict: Verdict) -> NoReturn:
        mine = self.rank in verdict.ranks and not self._posted
        self._end(verdict.text, Exit(verdict.code), self._speaks(verdict), dump=mine)

    def _send_beat(self) -> None:
        with self._telling:
            frame = sys._current_frames().get(threading.main_thread().ident or 0)
            beat = replace(
                self._beat,
                held=self._clock.now() - self._since,
                collective=_is_in_collective(frame),
                where=_name(frame),
                stop=self._stopped[0] if self._stopped else None,
                leaving=self._leaving is not None,
            )
            if self._line is not None:
                self._line.send(asdict(beat))


def _is_in_collective(frame: FrameType | None) -> bool:
    return frame is not None and "torch/distributed/" in frame.f_code.co_filename


def _is_of_collective(error: BaseException) -> bool:
    """Whether `error` was raised in a collective: then most likely by another rank's end."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return isinstance(error, RuntimeError) and _is_in_collective(place and place.tb_frame)


def _name(frame: FrameType | None) -> str:
    if frame is None:
        return "no Python code"
    return f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"


def _shout(text: str) -> None:
    """On stderr, which may be a terminal or a connection that is gone."""
    try:
        os.write(2, text.encode("utf-8", "backslashreplace"))
    except OSError:
        return
