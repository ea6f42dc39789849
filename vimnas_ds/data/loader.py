"""Batches for training and evaluation: files are decoded ahead by threads, DALI does the rest.

Batch k of rank r among W holds the stream's positions k G + r G/W ... k G + (r+1) G/W - 1, with G
the global batch. Everything about a position is a function of the stream (see `order` and
`sampling`), so `seek(k)` is all there is to resuming.

An unusable file never ends a run and never enters DALI. Training takes the next sample of the list
in its place and evaluation leaves it out; both count and name it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from functools import partial

import torch

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.bad import BadFile, TooManyBadFiles
from vimnas_ds.data.batches import Batch, Graphs, Ready
from vimnas_ds.data.catalog import Sample
from vimnas_ds.data.order import Stream, locate
from vimnas_ds.data.prepare import FilePreparer, View
from vimnas_ds.data.sampling import draw_sample

__all__ = ["Batch", "EvalLoader", "TrainLoader", "View"]

#: Files tried for one place of a batch before the dataset counts as broken.
MAX_TRIES = 16
#: Samples seen before the share of bad ones is judged.
MIN_SEEN = 50


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
        fallbacks: batches that DALI refused and that were decoded without it.

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
        self.seen = self.bad_count = 0
        self.substitutions: dict[str, str] = {}
        self._section, self._stream = section, Stream(seed, name, split)
        self._files = FilePreparer(name, section, samples, device.type == "cuda")
        self._global_batch, self._batch = global_batch, global_batch // world_size
        self._rank, self._pool, self._prefetch = rank, pool, prefetch
        self._max_bad_share = max_bad_share
        self._graphs = Graphs(section, self._batch, device, threads, train=True)
        self._bad: dict[int, str] = {}  # sample index -> reason
        self._next = self._submitted = 0
        self._queue: deque[list[Future[Ready]]] = deque()

    @property
    def fallbacks(self) -> int:
        return self._graphs.fallbacks

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
            self._next = self._submitted = batch

    def next(self) -> Batch:
        """The next batch.

        Raises:
            TooManyBadFiles: the dataset has too many unusable files.
        """
        self._submit(1)
        futures = self._queue.popleft()
        number = self._next
        self._next += 1
        self._submit(self._prefetch)
        ready = [future.result() for future in futures]
        self._count(ready)
        redo = partial(self._redo, number)
        return self._graphs.run(ready, redo)

    def _submit(self, count: int) -> None:
        """Starts batches until `count` are on their way."""
        while len(self._queue) < count:
            self._queue.append(self._start(self._submitted, safe=False))
            self._submitted += 1

    def _start(self, batch: int, safe: bool) -> list[Future[Ready]]:
        begin = batch * self._global_batch + self._rank * self._batch
        return [
            self._pool.submit(self._prepare, position, safe)
            for position in range(begin, begin + self._batch)
        ]

    def _prepare(self, position: int, safe: bool) -> Ready:
        """One place of a batch, by the first usable file from the drawn one on."""
        samples = self._files.samples
        epoch, index = locate(self._stream, len(samples), position)
        draw = draw_sample(self._stream, epoch, index, self._section)
        failures: dict[str, str] = {}
        for step in range(min(MAX_TRIES, len(samples))):
            tried = (index + step) % len(samples)
            if tried not in self._bad:
                try:
                    return Ready(self._files.train(tried, draw, safe), samples[tried], failures)
                except BadFile as error:
                    self._bad[tried] = error.reason
            failures[samples[tried].path] = self._bad[tried]
        return Ready(None, samples[index], failures)

    def _redo(self, batch: int) -> list[Ready]:
        ready = [future.result() for future in self._start(batch, safe=True)]
        self.seen -= len(ready)
        self._count(ready)
        return ready

    def _count(self, ready: list[Ready]) -> None:
        self.seen += len(ready)
        for one in ready:
            self.bad_count += bool(one.failures)
            self.substitutions.update(one.failures)
        too_many = self.bad_count > self._max_bad_share * self.seen and self.seen >= MIN_SEEN
        if too_many or any(one.feed is None for one in ready):
            raise TooManyBadFiles(self.name, self.bad_count, self.seen, self.substitutions)

    def _cancel(self) -> None:
        for futures in self._queue:
            for future in futures:
                future.cancel()
        self._queue.clear()

    def close(self) -> None:
        """Drops what is decoded ahead and frees DALI; may be called again."""
        self._cancel()
        self._submitted = self._next
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
        self._graphs = Graphs(section, batch, device, threads, train=False)

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
                    queue.append((begin, self._start(begin, safe=False)))
                begin, futures = queue.popleft()
                ready = self._usable([future.result() for future in futures])
                self.seen += len(futures)
                if ready:
                    batch = self._graphs.run(ready, partial(self._redo, begin))
                    if len(batch.names):
                        yield batch
        finally:
            for _, futures in queue:
                for future in futures:
                    future.cancel()

    def _start(self, begin: int, safe: bool) -> list[Future[Ready]]:
        end = min(begin + self._batch, len(self._mine))
        return [self._pool.submit(self._prepare, index, safe) for index in range(begin, end)]

    def _prepare(self, index: int, safe: bool) -> Ready:
        assert self._files is not None
        sample = self._mine[index]
        try:
            return Ready(self._files.evaluate(index, self._view, safe), sample, {})
        except BadFile as error:
            return Ready(None, sample, {sample.path: error.reason})

    def _redo(self, begin: int) -> list[Ready]:
        return self._usable([future.result() for future in self._start(begin, safe=True)])

    def _usable(self, ready: list[Ready]) -> list[Ready]:
        for one in ready:
            self.skipped.update(one.failures)
        return [one for one in ready if one.feed is not None]

    def close(self) -> None:
        """Frees DALI; may be called again."""
        self._graphs.close()
