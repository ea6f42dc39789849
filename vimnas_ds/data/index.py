"""What training takes from an index: one is built if there is none, one that does not fit refused.

The listing is made anew (cheap) and must be the one the index was made from; every file must have
the size and time it had. What changed is named together with the command that mends it.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vimnas_ds.config import LAYOUT_FILES, DataSection, DatasetSection
from vimnas_ds.data.bad import DataMissing, TooManyUnusable, UnfitIndex, are_too_many
from vimnas_ds.data.catalog import Catalog
from vimnas_ds.data.encoded import GPU_CODECS, GPU_PIXELS
from vimnas_ds.data.index_build import build_index, file_stats, locked
from vimnas_ds.data.index_file import (
    Header,
    Row,
    listed,
    listing_digest,
    read_header,
    read_rows,
    stored,
)
from vimnas_ds.data.listing import Sample, VideoFacts
from vimnas_ds.data.probe import CUT, MISSING, UNREADABLE, USABLE, Verdict
from vimnas_ds.data.probe_pool import ProbeLimits

#: Keys of a dataset's section that decide what its listing is.
LISTING_KEYS = ("kind", "layout", *LAYOUT_FILES, "train_split", "test_split")


@dataclass(frozen=True)
class Indexed:
    """A catalog without its unusable files, and what is wrong with those, by path."""

    catalog: Catalog
    unusable: Mapping[str, str]


def index_path(section: DataSection, name: str) -> Path:
    """Where the index of a dataset is."""
    return section.index_dir / f"{name}.parquet"


def open_index(name: str, catalog: Catalog, section: DataSection, build: bool = True) -> Indexed:
    """The usable files of a catalog, by its index.

    Args:
        catalog: the listing of the dataset `name` of `section`.
        build: make the index if there is none (one process does, others wait); without it a
            dataset that has none is taken as it is listed.

    Raises:
        UnfitIndex: the index is of other files; the message names the command that mends it.
        DataMissing: the index cannot be written, a split has no usable file, or more files are
            unusable than `section.max_bad_share` allows.
    """
    dataset, file = section.datasets[name], index_path(section, name)
    if not file.exists():
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
    _check_header(name, dataset, file, header)
    rows = {row.path: row for row in read_rows(file)}
    if header.listing != listing_digest(catalog):
        raise _unfit(name, file, [], _listing_changes(catalog, rows))
    _check_files(name, file, catalog, rows)
    indexed = _without_unusable(catalog, rows, dataset)
    seen = len(catalog.train) + len(catalog.test)
    if are_too_many(len(indexed.unusable), seen, section.max_bad_share):
        raise TooManyUnusable(name, indexed.unusable, seen, section.max_bad_share, file)
    return indexed


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


def _listing_changes(catalog: Catalog, rows: Mapping[str, Row]) -> list[str]:
    now = {stored(s.path): (split, s.label, there) for split, s, there in listed(catalog)}
    before = {
        row.path: (row.split, row.label, row.verdict.state != MISSING) for row in rows.values()
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


def _check_files(name: str, file: Path, catalog: Catalog, rows: Mapping[str, Row]) -> None:
    paths = [s.path for s in catalog.train + catalog.test]
    changed = []
    for path, now in zip(paths, file_stats(catalog.root, paths), strict=True):
        verdict = rows[stored(path)].verdict
        if verdict.size >= 0 and now != (verdict.size, verdict.mtime):
            changed.append(path)
    unread = [
        path
        for path in paths
        if rows[stored(path)].verdict.state == UNREADABLE
        and os.access(catalog.root / path, os.R_OK)
    ]
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


def _without_unusable(
    catalog: Catalog, rows: Mapping[str, Row], section: DatasetSection
) -> Indexed:
    unusable: dict[str, str] = {}

    def usable(split: str, samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
        found = []
        for sample in samples:
            verdict = rows[stored(sample.path)].verdict
            if verdict.state == USABLE:
                found.append(sample._replace(video=video_facts(verdict)))
            else:
                unusable[sample.path] = verdict.reason
        if not found:
            first = samples[0].path
            raise DataMissing(
                f'{catalog.name}: no usable file in the split "{split}" of {catalog.root}: '
                f"{len(samples)} are unusable (first: {first}: {unusable[first]})"
            )
        return tuple(found)

    train = usable(section.train_split, catalog.train)
    test = usable(section.test_split, catalog.test)
    return Indexed(replace(catalog, train=train, test=test), unusable)


def video_facts(verdict: Verdict) -> VideoFacts | None:
    """What the GPU path needs; None for what it leaves to PyAV (see `encoded`)."""
    known = verdict.codec in GPU_CODECS and verdict.pixels in GPU_PIXELS
    upright = not verdict.rotation and not verdict.mirrored
    odd = verdict.container == "avi" or verdict.container.startswith(CUT)
    if verdict.timeline is None or not known or not upright or odd:
        return None
    return VideoFacts(verdict.width, verdict.height, verdict.size, verdict.timeline)
