"""What training takes from an index: one is built if there is none, one that does not fit refused.

The listing is made anew (cheap) and must be the one the index was made from; every file must have
the size and time it had. What changed is named together with the command that mends it. Shards have
both in one folder.

Rows are compared as columns: an equal digest means that the index has its rows in the listing's
order, and one object for each of half a million files would cost a gigabyte in every process.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vimnas_ds.config import LAYOUT_FILES, DataSection, DatasetSection
from vimnas_ds.data.bad import DataMissing, TooManyUnusable, UnfitIndex, are_too_many
from vimnas_ds.data.catalog import Catalog
from vimnas_ds.data.encoded import GPU_CODECS, GPU_PIXELS
from vimnas_ds.data.index_build import build_index, file_stats, locked
from vimnas_ds.data.index_file import (
    Header,
    listed,
    listing_digest,
    read_header,
    read_rows,
    read_table,
    read_verdicts,
    stored,
)
from vimnas_ds.data.listing import Sample, VideoFacts
from vimnas_ds.data.probe import CUT, MISSING, TIMED_OUT, UNREADABLE, USABLE, Verdict, can_be_read
from vimnas_ds.data.probe_pool import ProbeLimits
from vimnas_ds.data.shards import INDEX, MEMBERS

#: Keys of a dataset's section that decide what its listing is.
LISTING_KEYS = ("kind", "layout", *LAYOUT_FILES, "train_split", "test_split")
#: Columns that are compared with the files.
CHECKED = ("state", "reason", "size", "mtime")


@dataclass(frozen=True)
class Indexed:
    """A catalog without its unusable files, and what is wrong with those, by path."""

    catalog: Catalog
    unusable: Mapping[str, str]


def index_path(section: DataSection, name: str) -> Path:
    """Where the index of a dataset is."""
    shards = section.datasets[name].shards
    return section.index_dir / f"{name}.parquet" if shards is None else shards / INDEX


def open_index(
    name: str,
    catalog: Catalog,
    section: DataSection,
    build: bool = True,
    check: bool = True,
    gpu: bool = False,
) -> Indexed:
    """The usable files of a catalog, by its index.

    Args:
        catalog: the listing of the dataset `name` of `section`.
        build: make the index if there is none (one process does, others wait); without it a
            dataset that has none is taken as it is listed.
        check: ask for every file's size and time; without it another process has just done so.
        gpu: give the samples what the GPU's decoder needs to know of their videos.

    Raises:
        UnfitIndex: the index is of other files; the message names the command that mends it.
        DataMissing: the index cannot be written, a split has no usable file, or more files are
            unusable than `section.max_bad_share` allows.
    """
    dataset, file = section.datasets[name], index_path(section, name)
    if dataset.shards is None and not file.exists():
        if not build:
            return Indexed(catalog, {})
        with locked(file):
            if not file.exists():
                count = len(catalog.train) + len(catalog.test)
                say = f"{name}: no index at {file}; building it from {count:,} files"
                print(say, file=sys.stderr, flush=True)  # noqa: T201
                workers = section.workers or len(os.sched_getaffinity(0))  # other ranks wait
                build_index(name, dataset, file, ProbeLimits(workers))
    header = read_header(file)
    if dataset.shards is None:
        _check_header(name, dataset, file, header)
    if header.listing != listing_digest(catalog):
        if dataset.shards is not None:
            raise UnfitIndex(
                f"{name}: {file} and {MEMBERS} beside it were not written together; copy both "
                f"there again, or make the shards anew: scripts/make_shards.py --overwrite"
            )
        raise _unfit(name, file, [], _listing_changes(catalog, file))
    timelines = gpu and not dataset.is_image
    rows = _present(catalog, file, None if timelines else CHECKED)
    if check and dataset.shards is None:  # the sizes of shards were checked when they were opened
        _check_files(name, file, catalog, rows)
    indexed = _without_unusable(catalog, rows, dataset, timelines)
    seen = len(rows)
    if are_too_many(len(indexed.unusable), seen, section.max_bad_share):
        raise TooManyUnusable(name, indexed.unusable, seen, section.max_bad_share, file)
    return indexed


def check_indexed(section: DataSection, config: Path) -> None:
    """Raises DataMissing, naming the commands to run first, if a dataset has no index.

    `config` is the file that the section comes from.
    """
    commands = []
    for name, dataset in section.datasets.items():
        if dataset.shards is None and dataset.root and not index_path(section, name).exists():
            command = ["python", "scripts/index_data.py", "--deepspeed_config", str(config)]
            command += ["--dataset", name, "--root", str(dataset.root)]
            command += ["--index_dir", str(section.index_dir)]
            for key, value in dataset.model_dump(mode="json", include=set(LISTING_KEYS)).items():
                command += ["--set", f"{key}={'null' if value is None else value}"]
            commands.append(f"  {shlex.join(command)}")
    if commands:
        raise DataMissing(
            f"no index in {section.index_dir} for a run on several machines; first run there (once "
            "if all machines share vimnas.data.index_dir, else on each of them):\n"
            + "\n".join(commands)
        )


def _check_header(name: str, section: DatasetSection, file: Path, header: Header) -> None:
    assert section.root is not None
    root = str(section.root.resolve())
    wanted = section.model_dump(mode="json")
    options, reasons = [], []
    if header.name != name:
        raise UnfitIndex(
            f"{name}: the index {file} is of the dataset {header.name}; delete it or move it away, "
            "and the next run builds a new one"
        )
    if header.root != root:
        options += ["--root", root]
        reasons.append(f"it was made from {header.root}, this run reads {root}")
    for key in LISTING_KEYS:
        if header.section.get(key) != wanted[key]:
            value = "null" if wanted[key] is None else str(wanted[key])
            options += ["--set", f"{key}={value}"]
            reasons.append(f"its {key} is {header.section.get(key)}, this run's is {wanted[key]}")
    if header.limit is not None:
        reasons.append(f"it is a trial of {header.limit} files (--limit)")
    if reasons:
        raise _unfit(name, file, options, reasons)


def _present(catalog: Catalog, file: Path, columns: Sequence[str] | None) -> pa.Table:
    """The rows of the training and test files that are there, in the catalog's order: with an equal
    digest the index has its rows in the order of `listed`."""
    table, sizes = read_table(file, columns), [len(part) for part in _parts(catalog)]
    if len(table) != sum(sizes):
        raise UnfitIndex(
            f"the index {file} has {len(table):,} rows instead of {sum(sizes):,}; delete it, and "
            "the next run builds a new one"
        )
    train, absent, test, _ = sizes
    return pa.concat_tables([table.slice(0, train), table.slice(train + absent, test)])


def _parts(catalog: Catalog) -> tuple[tuple[Sample, ...], ...]:
    return catalog.train, catalog.absent_train, catalog.test, catalog.absent_test


def _listing_changes(catalog: Catalog, file: Path) -> list[str]:
    now = {stored(s.path): (split, s.label, there) for split, s, there in listed(catalog)}
    before = {
        row.path: (row.split, row.label, row.verdict.state != MISSING) for row in read_rows(file)
    }
    there = {path for path, (*_, present) in now.items() if present}
    had = {path for path, (*_, present) in before.items() if present}
    changes = {
        "added": sorted(there - had),
        "no longer there": sorted(had - there),
        "labelled otherwise": sorted(p for p in there & had if now[p] != before[p]),
        "no longer listed or newly listed without being there": sorted(
            (now.keys() ^ before.keys()) - there - had
        ),
    }
    return [_count(what, paths) for what, paths in changes.items() if paths]


def _check_files(name: str, file: Path, catalog: Catalog, rows: pa.Table) -> None:
    paths = [s.path for s in catalog.train + catalog.test]
    before = np.stack([rows[key].to_numpy() for key in ("size", "mtime")], 1)
    differs = (file_stats(catalog.root, paths) != before).any(1) & (before[:, 0] >= 0)
    changed = [paths[i] for i in differs.nonzero()[0]]
    refused = _in_state(rows, UNREADABLE) & np.asarray(pc.not_equal(rows["reason"], TIMED_OUT))
    unread = [paths[i] for i in refused.nonzero()[0] if can_be_read(catalog.root / paths[i])]
    reasons = [(changed, "changed"), (unread, "could not be read then and can be now")]
    if any(found for found, _ in reasons):
        raise _unfit(name, file, [], [_count(what, found) for found, what in reasons if found])


def _count(what: str, paths: list[str]) -> str:
    files = "1 file" if len(paths) == 1 else f"{len(paths):,} files"
    return f"{files} {what} (first: {paths[0]})"


def _unfit(name: str, file: Path, options: list[str], reasons: list[str]) -> UnfitIndex:
    command = shlex.join(["python", "scripts/index_data.py", "--update", str(file), *options])
    return UnfitIndex(
        f"{name}: the index {file} does not fit: {'; '.join(reasons)}.\n  Mend it: {command}"
    )


def _in_state(rows: pa.Table, state: str) -> NDArray[np.bool_]:
    """Which rows are in it: shape (rows,)."""
    return np.asarray(pc.equal(rows["state"], state))


def _without_unusable(
    catalog: Catalog, rows: pa.Table, section: DatasetSection, timelines: bool
) -> Indexed:
    unusable: dict[str, str] = {}

    def usable(split: str, samples: tuple[Sample, ...], rows: pa.Table) -> tuple[Sample, ...]:
        fine = _in_state(rows, USABLE)
        bad = (~fine).nonzero()[0]
        reasons = rows["reason"].take(pa.array(bad)).to_pylist()
        unusable.update(zip((samples[i].path for i in bad), reasons, strict=True))
        if not fine.any():
            first = samples[0].path
            raise DataMissing(
                f'{catalog.name}: no usable file in the split "{split}" of {catalog.root}: '
                f"{len(samples)} are unusable (first: {first}: {unusable[first]})"
            )
        if timelines:
            facts = map(video_facts, read_verdicts(rows))
            samples = tuple(s._replace(video=f) for s, f in zip(samples, facts, strict=True))
        return tuple(compress(samples, fine))

    count = len(catalog.train)
    train = usable(section.train_split, catalog.train, rows.slice(0, count))
    test = usable(section.test_split, catalog.test, rows.slice(count))
    return Indexed(replace(catalog, train=train, test=test), unusable)


def video_facts(verdict: Verdict) -> VideoFacts | None:
    """What the GPU path needs; None for what it leaves to PyAV (see `encoded`)."""
    known = verdict.codec in GPU_CODECS and verdict.pixels in GPU_PIXELS
    upright = not verdict.rotation and not verdict.mirrored
    odd = verdict.container == "avi" or verdict.container.startswith(CUT)
    if verdict.timeline is None or not known or not upright or odd:
        return None
    return VideoFacts(verdict.width, verdict.height, verdict.size, verdict.timeline)
