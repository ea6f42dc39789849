"""Batches for training and evaluation: files are decoded ahead by threads, DALI does the rest.

Batch k of rank r among W holds the stream's positions k G + r G/W ... k G + (r+1) G/W - 1, with G
the global batch. Everything about a position is a function of the stream (see `order` and
`sampling`), so `seek(k)` is all there is to resuming.

An unusable file never ends a run and never enters DALI. Training takes the next sample of the list
in its place and evaluation leaves it out; both count and name it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial

import torch

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.bad import BadFile, TooManyBadFiles, are_too_many, kind_of
from vimnas_ds.data.batches import Batch, Graphs, Made, Ready, hand_over, source_of
from vimnas_ds.data.catalog import Sample
from vimnas_ds.data.order import Stream, locate
from vimnas_ds.data.prepare import FilePreparer, View
from vimnas_ds.data.sampling import draw_sample

__all__ = ["Batch", "EvalLoader", "TrainLoader", "View"]

#: Files tried for one place of a batch before the dataset counts as broken.
MAX_TRIES = 16


@dataclass(frozen=True)
class Started:
    """A batch whose files are being decoded: its number and one future a sample."""

    number: int
    futures: list[Future[Ready]]

    def cancel(self) -> None:
        """Drops the files that no thread has begun with."""
        for future in self.futures:
            future.cancel()


class TrainLoader:
    """An endless, seekable stream of training batches of one dataset's split.

    Args:
        name: the dataset's key in `vimnas.data`.
        section: its recipe.
        samples: the split's files; the same list in every process.
        split: "train" or "alpha": the split's part in the stream's name.
        seed: `vimnas.seed`.
        global_batch: samples per batch of all processes together.
        rank, world_size: this process.
        device: where batches are made: "cpu", or a CUDA device.
        pool: threads that read and decode; shared, not shut down here.
        prefetch: batches decoded ahead.
        max_bad_share: substituted share of at least 50 samples that ends the run.
        threads: DALI's own threads.

    Attributes:
        seen: samples delivered; bad_count: how many of them are substitutes.
        substitutions: what is wrong with each unusable file, by path.
        reasons: how many samples were substituted, by what was wrong with the drawn file.
        fallbacks: batches of which DALI refused a file, which is decoded without it from then on.

    Raises:
        ValueError: no samples, or a global batch that the processes cannot share evenly.
    """

    def __init__(
        self,
        name: str,
        section: DatasetSection,
        samples: Sequence[Sample],
        split: str,
        seed: int,
        global_batch: int,
        rank: int,
        world_size: int,
        device: torch.device,
        pool: Executor,
        prefetch: int = 2,
        max_bad_share: float = 0.05,
        threads: int = 1,
    ) -> None:
        if global_batch < 1 or global_batch % world_size:
            raise ValueError(f"{name}: {world_size} processes cannot share {global_batch} samples")
        self.name = name
        self.seen = self.bad_count = self.fallbacks = 0
        self.substitutions: dict[str, str] = {}
        self.reasons: Counter[str] = Counter()
        self._before = (0, 0, 0, self.substitutions, self.reasons)  # the last batch delivered
        self._section, self._stream = section, Stream(seed, name, split)
        self._files = FilePreparer(name, section, samples, device.type == "cuda")
        self._global_batch, self._batch = global_batch, global_batch // world_size
        self._rank, self._pool, self._prefetch = rank, pool, prefetch
        self._max_bad_share = max_bad_share
        self._graphs = Graphs(
            section, source_of(section, device), self._batch, device, threads, train=True
        )
        self._bad: dict[int, str] = {}  # sample index -> reason
        self._refused: set[str] = set()  # files that DALI's decoder cannot read
        self._next = 0
        self._queue: deque[Started] = deque()

    @property
    def position(self) -> int:
        """Number of the batch that `next` gives."""
        return self._next

    def seek(self, batch: int) -> None:
        """Makes `batch` the next one; costs nothing if it already is."""
        if batch < 0:
            raise ValueError(f"batch {batch} is negative")
        if batch != self._next:
            self._cancel()
            self._next = batch

    def build(self) -> None:
        """Builds what makes the batches, which otherwise the first one waits for."""
        self._graphs.build()

    def next(self) -> Batch:
        """The next batch.

        Raises:
            TooManyBadFiles: the dataset has too many unusable files.
        """
        started = self._queue.popleft() if self._queue else self.start(self._next)
        self._next += 1
        while len(self._queue) < self._prefetch:
            self._queue.append(self.start(self._next + len(self._queue)))
        return self.deliver(self.make(started))

    def start(self, batch: int) -> Started:
        """Has the files of a batch decoded by the pool. Any number of batches, in any order."""
        return Started(batch, self._submit(batch, range(self._batch), safe=False))

    def make(self, started: Started) -> Made:
        """Waits for a started batch's files and lets DALI make the batch; one thread at a time.

        Counts nothing and judges nothing, so that it may be called ahead: see `deliver`.
        """
        ready = [future.result() for future in started.futures]
        if any(one.feed is None for one in ready):
            return Made(None, ready)
        made = self._graphs.run(ready, partial(self._redo, started.number))
        self._refused.update(made.refused)
        return made

    def deliver(self, made: Made) -> Batch:
        """Counts a batch's samples and substitutes as seen.

        Raises:
            TooManyBadFiles: with them, the dataset has too many unusable files.
        """
        counted = self.seen, self.bad_count, self.fallbacks
        self._before = *counted, self.substitutions.copy(), self.reasons.copy()
        self.seen += len(made.ready)
        self.fallbacks += bool(made.refused)
        for one in made.ready:
            self.substitutions.update(one.failures)
            if one.failures:
                self.bad_count += 1
                self.reasons[kind_of(next(iter(one.failures.values())))] += 1
        too_many = are_too_many(self.bad_count, self.seen, self._max_bad_share)
        if too_many or made.batch is None or len(made.batch.names) < len(made.ready):
            raise TooManyBadFiles(
                self.name, self.bad_count, self.seen, self.substitutions, self._section.folder
            )
        return hand_over(made.batch)

    def take_back(self) -> None:
        """The batch delivered last was not used and will be asked for again: it does not count."""
        self.seen, self.bad_count, self.fallbacks, self.substitutions, self.reasons = self._before

    def _submit(self, batch: int, places: Iterable[int], safe: bool) -> list[Future[Ready]]:
        begin = batch * self._global_batch + self._rank * self._batch
        return [self._pool.submit(self._prepare, begin + place, safe) for place in places]

    def _prepare(self, position: int, safe: bool) -> Ready:
        """One place of a batch, by the first usable file from the drawn one on."""
        samples = self._files.samples
        epoch, index = locate(self._stream, len(samples), position)
        draw = draw_sample(self._stream, epoch, index, self._section)
        failures: dict[str, str] = {}
        for step in range(min(MAX_TRIES, len(samples))):
            tried = (index + step) % len(samples)
            if tried not in self._bad:
                safely = safe or samples[tried].path in self._refused
                try:
                    return Ready(self._files.train(tried, draw, safely), samples[tried], failures)
                except BadFile as error:
                    self._bad.setdefault(tried, error.reason)
            failures[samples[tried].path] = self._bad[tried]
        return Ready(None, samples[index], failures)

    def _redo(self, batch: int, places: list[int]) -> list[Ready]:
        return [future.result() for future in self._submit(batch, places, safe=True)]

    def _cancel(self) -> None:
        for started in self._queue:
            started.cancel()
        self._queue.clear()

    def close(self) -> None:
        """Drops what is decoded ahead and frees DALI; may be called again."""
        self._cancel()
        self._graphs.close()


class EvalLoader:
    """A split in order, once per iteration, without anything random.

    Process `rank` takes every `world_size`-th sample. The last batch is as long as it is; unusable
    files are left out, so accuracies must be divided by the labels received.

    Args:
        batch: samples per batch of this process.
        view: which clip and crop (default: the central ones).
        others: as for `TrainLoader`.

    Attributes:
        seen: samples asked for, and skipped: reasons by path, both of the latest iteration.
    """

    def __init__(
        self,
        name: str,
        section: DatasetSection,
        samples: Sequence[Sample],
        rank: int,
        world_size: int,
        batch: int,
        device: torch.device,
        pool: Executor,
        view: View | None = None,
        prefetch: int = 2,
        threads: int = 1,
    ) -> None:
        self.name = name
        self.seen = 0
        self.skipped: dict[str, str] = {}
        if not samples:
            raise ValueError(f"{name}: the split has no samples")
        self._mine = samples[rank::world_size]
        self._files = (
            FilePreparer(name, section, self._mine, device.type == "cuda") if self._mine else None
        )
        self._batch, self._view, self._pool = batch, view or View(), pool
        self._prefetch = prefetch
        self._graphs = Graphs(
            section, source_of(section, device), batch, device, threads, train=False
        )

    def __len__(self) -> int:
        """Batches of this process, if no file is unusable."""
        return -(-len(self._mine) // self._batch)

    def __iter__(self) -> Iterator[Batch]:
        self.seen, self.skipped = 0, {}
        starts = deque(range(0, len(self._mine), self._batch))
        queue: deque[tuple[int, list[Future[Ready]]]] = deque()
        try:
            while starts or queue:
                while starts and len(queue) <= self._prefetch:
                    begin = starts.popleft()
                    end = min(begin + self._batch, len(self._mine))
                    queue.append((begin, self._submit(range(begin, end), safe=False)))
                begin, futures = queue.popleft()
                ready = [future.result() for future in futures]
                made = self._graphs.run(ready, partial(self._redo, begin))
                self.seen += len(futures)
                for one in made.ready:
                    self.skipped.update(one.failures)
                if made.batch is not None:
                    yield hand_over(made.batch)
        finally:
            for _, futures in queue:
                for future in futures:
                    future.cancel()

    def _submit(self, indices: Iterable[int], safe: bool) -> list[Future[Ready]]:
        return [self._pool.submit(self._prepare, index, safe) for index in indices]

    def _prepare(self, index: int, safe: bool) -> Ready:
        assert self._files is not None
        sample = self._mine[index]
        try:
            return Ready(self._files.evaluate(index, self._view, safe), sample, {})
        except BadFile as error:
            return Ready(None, sample, {sample.path: error.reason})

    def _redo(self, begin: int, places: list[int]) -> list[Ready]:
        again = self._submit((begin + place for place in places), safe=True)
        return [future.result() for future in again]

    def close(self) -> None:
        """Frees DALI; may be called again."""
        self._graphs.close()
