"""Batches made ahead in a thread of their own, in the order in which the run will ask for them.

The joint schedule is known in advance, so the coming batches of all datasets form one list, the
plan. Its next `decoding` batches have their files decoded by the pool; one thread takes them in
turn, lets DALI make the batch and holds at most `ready` of them:

    plan -> [decoding: files being decoded, on the pool] -> DALI, this thread -> [ready] -> take

That is all the memory there is to it, whatever the number of datasets. What goes wrong in the
thread is raised by the `take` that asks for that batch, never earlier; nothing about a batch
depends on when it was made.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import wait
from itertools import islice
from typing import NamedTuple

from vimnas_ds.data.batches import Batch, Made
from vimnas_ds.data.loader import Started, TrainLoader

#: Seconds between two looks at whether it is time to end, while files are waited for.
GLANCE = 0.2
#: Seconds that `close` waits for a batch that DALI is at, if nobody needs its loader any more.
PATIENCE = 5.0


class Wanted(NamedTuple):
    """One batch of the plan."""

    dataset: str
    split: str  #: "train" or "alpha"
    number: int


class GivenUp(Exception):
    """A batch that is not waited for any longer."""


class Ahead:
    """Follows a plan; `take` gives its batches one by one.

    Args:
        plan: the batches in the order of their use.
        loader: the loader of (dataset, split); its `start` and `make` are called by this object's
            thread only, from now until `close`.
        decoding: batches whose files are decoded or being decoded.
        ready: finished batches that wait to be taken.
    """

    def __init__(
        self,
        plan: Iterable[Wanted],
        loader: Callable[[str, str], TrainLoader],
        decoding: int,
        ready: int,
    ) -> None:
        self._plan, self._loader = iter(plan), loader
        self._decoding, self._room = decoding, ready
        self._made: deque[tuple[Wanted, Made]] = deque()
        self._error: BaseException | None = None
        self._making = False  # the next batch of the plan, whose files are there
        self._ended = self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Finished batches that wait to be taken."""
        return len(self._made)

    def wait(self, give_up: Callable[[], bool]) -> None:
        """Until nothing about the plan's next batch can take long: its files are there, or `take`
        will raise why they are not. Raises GivenUp as `take`."""
        self._wait(lambda: self._made or self._making, give_up, "the next batch")

    def _wait(self, there: Callable[[], object], give_up: Callable[[], bool], what: str) -> None:
        with self._changed:
            while not self._changed.wait_for(lambda: there() or self._ended, GLANCE):
                if give_up():
                    raise GivenUp(f"{what} is not there yet")

    def take(self, wanted: Wanted, give_up: Callable[[], bool] = lambda: False) -> Batch:
        """The plan's next batch, which must be `wanted`.

        Raises:
            GivenUp: it was not there when `give_up` became true.
            TooManyBadFiles: its dataset has too many unusable files.
            ValueError: it is not what the plan has next, or the plan has ended.
            Anything else that happened while the batch was made.
        """
        self._wait(lambda: self._made, give_up, f"{wanted}")
        with self._changed:
            if not self._made:
                if self._error is not None:
                    raise self._error
                raise ValueError(f"{wanted} was asked for, but the plan has ended")
            planned, made = self._made[0]
            if planned != wanted:
                raise ValueError(f"{wanted} was asked for, but the plan has {planned} next")
            self._made.popleft()
            self._changed.notify_all()
        return self._loader(wanted.dataset, wanted.split).deliver(made)

    def close(self, free: bool = False) -> None:
        """Ends the thread, whatever its files do, and drops what is ready; may be called again.

        `free`: the loaders are to be used again: a batch that the thread has DALI make is waited
        for, however long that takes.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(None if free else PATIENCE)
        self._made.clear()

    def _run(self) -> None:
        started: deque[tuple[Wanted, Started]] = deque()
        try:
            while self._wait_for_room():
                for wanted in islice(self._plan, self._decoding - len(started)):
                    loader = self._loader(wanted.dataset, wanted.split)
                    started.append((wanted, loader.start(wanted.number)))
                if not started:
                    return
                wanted, first = started[0]
                if not self._wait_for_files(first):
                    return
                started.popleft()
                with self._changed:
                    self._making = True
                    self._changed.notify_all()
                made = self._loader(wanted.dataset, wanted.split).make(first)
                with self._changed:
                    self._made.append((wanted, made))
                    self._making = False
                    self._changed.notify_all()
        except BaseException as error:
            self._error = error  # for the consumer, who may well be waiting
        finally:
            for _, left in started:
                left.cancel()
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        """False when it is time to end. Batches are decoded while waiting."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or len(self._made) < self._room)
            return not self._closing

    def _wait_for_files(self, batch: Started) -> bool:
        """False when it is time to end: a file may block for longer than anyone wants to wait."""
        while wait(batch.futures, GLANCE).not_done:
            if self._closing:
                return False
        return True
