"""All datasets of a run: found, split, and read through one pool of decoding threads."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from vimnas_ds.config import DataSection
from vimnas_ds.data.ahead import Ahead, Wanted
from vimnas_ds.data.bad import DataMissing
from vimnas_ds.data.batches import Batch
from vimnas_ds.data.capacity import Capacity, decoding_threads, plan_ahead, plan_capacity
from vimnas_ds.data.catalog import Catalog, scan_dataset
from vimnas_ds.data.footprint import sample_bytes
from vimnas_ds.data.index import open_index
from vimnas_ds.data.listing import ABSENT
from vimnas_ds.data.loader import EvalLoader, TrainLoader
from vimnas_ds.data.readers import Readers
from vimnas_ds.data.splits import Splits, drop_overlap, split_catalog, with_bare_ids

#: samples of a select split of which a score says little: its standard error is up to 9 points
FEW = 30


@dataclass(frozen=True)
class JointData:
    """What a run reads: catalogs (of usable files), the four splits of each dataset, videos dropped
    as overlap, and by dataset and path what is wrong with the unusable files; `untested` are those
    of the official test list, and its files that are not on the disk."""

    section: DataSection
    catalogs: dict[str, Catalog]
    splits: dict[str, Splits]
    dropped: dict[str, int]
    unusable: dict[str, dict[str, str]] = field(default_factory=dict)
    untested: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Training files per dataset, after hold-out and de-duplication: the sampling weights."""
        return {name: len(parts["train"]) for name, parts in self.splits.items()}

    def fingerprint(self) -> int:
        """63 bits of every split's file list: ranks, and a resumed run, must agree on it."""
        digest = hashlib.sha256()
        for name in sorted(self.splits):
            for split, samples in sorted(self.splits[name].items()):
                digest.update(f"{name}/{split}/{len(samples)}\n".encode())
                for sample in samples:
                    digest.update(f"{sample.label} {sample.path}\n".encode("utf-8", "replace"))
        return int.from_bytes(digest.digest()[:8], "big") >> 1

    def describe(self) -> list[str]:
        """One line per dataset: classes, files per split, what is missing, unusable or dropped."""
        lines = []
        for name, catalog in self.catalogs.items():
            counts = ", ".join(f"{k} {len(v)}" for k, v in self.splits[name].items())
            line = f"{name}: {len(catalog.class_names)} classes; {counts}"
            if catalog.missing:
                shown = ", ".join(catalog.missing_names)
                line += f"; {catalog.missing} listed files are not on disk (first: {shown})"
            bad = self.unusable.get(name)
            if bad:
                path, reason = next(iter(bad.items()))
                line += f"; {len(bad)} unusable files left out (first: {path}: {reason})"
            if self.dropped[name]:
                line += f"; {self.dropped[name]} videos dropped: held out or tested on elsewhere"
            lines.append(line)
        return lines

    def doubts(self) -> list[str]:
        """What is likely not meant, in words."""
        found = []
        for name, catalog in self.catalogs.items():
            count = len(self.splits[name]["select"])
            if count < FEW:
                found.append(
                    f"{name}: select has {count} samples: scores on them mean little (more files, "
                    "or a larger vimnas.data.held_out)"
                )
            classes, heads = len(catalog.class_names), self.section.datasets[name].num_classes
            if heads > classes:
                found.append(
                    f"{name}: {classes} classes found, vimnas.data.{name}.num_classes is {heads}: "
                    f"{heads - classes} of its head are never right"
                )
        return found


def open_datasets(
    section: DataSection, build: bool = True, check: bool = True, gpu: bool = False
) -> JointData:
    """Find and split every dataset, by its index (see `index`).

    Args:
        build: make the indexes that are not there; without it (a dry run) such datasets are taken
            as they are listed.
        check, gpu: see `open_index`.

    Raises DataMissing with one line for each dataset that is not there, ValueError for
    annotations, classes or indexes that do not fit.
    """
    listed, missing = {}, []
    for name, dataset in section.datasets.items():
        try:
            catalog = scan_dataset(name, dataset)
            listed[name] = catalog if dataset.is_image else with_bare_ids(catalog)
        except DataMissing as error:
            missing.append(str(error))
    if missing:
        raise DataMissing("\n".join(missing))
    indexed = {name: open_index(name, c, section, build, check, gpu) for name, c in listed.items()}
    splits, dropped = drop_overlap(
        {name: split_catalog(one.catalog, section.held_out) for name, one in indexed.items()},
        listed,
    )
    catalogs = {name: one.catalog for name, one in indexed.items()}
    unusable = {name: dict(one.unusable) for name, one in indexed.items()}
    untested = {name: _untested(listed[name], unusable[name]) for name in listed}
    return JointData(section, catalogs, splits, dropped, unusable, untested)


def _untested(listed: Catalog, unusable: Mapping[str, str]) -> dict[str, str]:
    """Why files of the official test list cannot be scored."""
    found = {s.path: unusable[s.path] for s in listed.test if s.path in unusable}
    return found | dict.fromkeys((s.path for s in listed.absent_test), ABSENT)


class Loaders:
    """Every loader of this process, built when first asked for, on one pool of threads."""

    def __init__(
        self, data: JointData, seed: int, rank: int, world_size: int, device: torch.device
    ):
        self.data, self.seed = data, seed
        self.rank, self.world_size, self.device = rank, world_size, device
        self.workers = decoding_threads(data.section, world_size)
        self.pool = Readers(self.workers, data.section.file_timeout)
        self._training: dict[tuple[str, str], TrainLoader] = {}
        self._evaluated: dict[tuple[str, str], int] = {}  # bytes of a decoded sample
        self._ahead: Ahead | None = None
        #: asked while a planned batch is waited for; see `Ahead.take`
        self.give_up: Callable[[], bool] = lambda: False

    def follow(self, plan: Iterable[Wanted], global_batches: Mapping[str, int]) -> Capacity:
        """From now on makes the batches of `plan` ahead; `batch` must ask for them in its order.

        Args:
            global_batches: samples of all processes per batch of each split in the plan.
        """
        # no two threads may be at a loader; a run's watch, which has a thread of its own, ends the
        # run if this takes too long
        self._stop_following(free=True)
        sizes = [size // self.world_size for size in global_batches.values()]
        section, gpu = self.data.section, self.device.type == "cuda"
        needed = {
            name: sample_bytes(name, d, self.data.splits[name]["train"], gpu, self.pool)
            for name, d in section.datasets.items()
        }
        capacity = plan_capacity(section, needed, sizes, self.world_size, self.device)
        for name in self.data.splits:  # all are there and built before the first step
            for split, size in global_batches.items():
                self.training(name, split, size).build()
        self._ahead = Ahead(
            plan,
            lambda name, split: self._training[name, split],
            capacity.decoding,
            capacity.ready,
        )
        return capacity

    def batch(self, name: str, split: str, global_batch: int, number: int) -> Batch:
        """Batch `number` of a dataset's `train` or `alpha` split: made ahead if a plan is followed,
        else now. Errors as `TrainLoader.next` and `Ahead.take`; only a `train` batch, with which a
        step begins, is given up: a step that has begun is finished (see `wait_for_next`)."""
        if self._ahead is not None:
            give_up = self.give_up if split == "train" else lambda: False
            return self._ahead.take(Wanted(name, split, number), give_up)
        loader = self.training(name, split, global_batch)
        loader.seek(number)
        return loader.next()

    def wait_for_next(self) -> None:
        """Until the batch that the plan has next need not be waited for: what a step will ask for
        once it has begun. Raises GivenUp."""
        if self._ahead is not None:
            self._ahead.wait(self.give_up)

    def take_back(self, name: str, split: str) -> None:
        """The last batch of a stream was not used: the run that goes on will ask for it again."""
        self._training[name, split].take_back()

    def _stop_following(self, free: bool = False) -> None:
        if self._ahead is not None:
            self._ahead.close(free)
            self._ahead = None

    def training(self, name: str, split: str, global_batch: int) -> TrainLoader:
        """The stream of a dataset's `train` or `alpha` split."""
        key = (name, split)
        if key not in self._training:
            section = self.data.section
            self._training[key] = TrainLoader(
                name,
                section.datasets[name],
                self.data.splits[name][split],
                split,
                self.seed,
                global_batch,
                self.rank,
                self.world_size,
                self.device,
                self.pool,
                section.prefetch,
                section.max_bad_share,
                self.workers,
            )
        return self._training[key]

    def evaluation(self, name: str, split: str, batch: int) -> EvalLoader:
        """A fresh pass over a dataset's `select` or `test` split, central views; the caller closes
        it. It decodes `vimnas.data.prefetch` batches ahead, fewer where memory is short."""
        section, samples = self.data.section, self.data.splits[name][split]
        if (name, split) not in self._evaluated:
            self._evaluated[name, split] = sample_bytes(
                name, section.datasets[name], samples, self.device.type == "cuda", self.pool
            )
        each = batch * self._evaluated[name, split]
        return EvalLoader(
            name,
            section.datasets[name],
            samples,
            self.rank,
            self.world_size,
            batch,
            self.device,
            self.pool,
            prefetch=plan_ahead(section.prefetch, each, self.world_size),
            threads=self.workers,
        )

    def substitutions(self) -> dict[str, dict[str, str]]:
        """Unusable files met so far in training: dataset -> path -> reason."""
        found: dict[str, dict[str, str]] = {}
        for (name, _), loader in self._training.items():
            found.setdefault(name, {}).update(loader.substitutions)
        return found

    def replaced(self) -> dict[str, int]:
        """Samples replaced so far in training, by dataset."""
        return self._sum(lambda loader: loader.bad_count)

    def reasons(self) -> dict[str, Counter[str]]:
        """Samples replaced so far in training, by dataset and by what was wrong."""
        found: dict[str, Counter[str]] = {}
        for (name, _), loader in self._training.items():
            found.setdefault(name, Counter()).update(loader.reasons)
        return found

    def fallbacks(self) -> dict[str, int]:
        """Training batches of which DALI refused a file, by dataset."""
        return self._sum(lambda loader: loader.fallbacks)

    def _sum(self, value: Callable[[TrainLoader], int]) -> dict[str, int]:
        found: dict[str, int] = {}
        for (name, _), loader in self._training.items():
            found[name] = found.get(name, 0) + value(loader)
        return found

    def close(self) -> None:
        self._stop_following()
        for loader in self._training.values():
            loader.close()
        self.pool.shutdown()
