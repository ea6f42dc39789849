"""Makes and renews an index: parallel, resumable, incremental.

A file whose size and time have not changed keeps the verdict it has, from the index that is there
or from the parts that an interrupted run left (`NAME.parquet.parts/`, one part every half minute).
A killed run therefore loses half a minute, and its successor's result is the same as if it had
never been killed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.bad import DataMissing, UnfitIndex
from vimnas_ds.data.catalog import Catalog, scan_dataset
from vimnas_ds.data.index_file import (
    Header,
    Row,
    listed,
    listing_digest,
    read_header,
    read_rows,
    stored,
    write_rows,
)
from vimnas_ds.data.listing import ABSENT, Sample
from vimnas_ds.data.probe import MISSING, UNREADABLE, USABLE, Verdict
from vimnas_ds.data.probe_pool import ProbeLimits, probe_files

#: Seconds, and files, between two parts.
PART_SECONDS, PART_FILES = 30.0, 20_000
#: Files whose size and time one thread asks for in a row.
STATS = 1000


@dataclass(frozen=True)
class Built:
    """A finished index: its rows, how many files were probed, and how many kept their verdict."""

    header: Header
    catalog: Catalog
    rows: list[Row]
    probed: int
    kept: int
    seconds: float

    def unusable(self) -> dict[str, str]:
        """What is wrong with each file that is there and cannot be used, by path."""
        fine = (USABLE, MISSING)
        return {r.path: r.verdict.reason for r in self.rows if r.verdict.state not in fine}


def build_index(
    name: str,
    section: DatasetSection,
    file: Path,
    limits: ProbeLimits,
    limit: int | None = None,
    recheck: bool = False,
    show: bool = True,
) -> Built:
    """Probes what has to be probed of a dataset and writes its index; see `locked` for many.

    Args:
        file: where the index is, or will be.
        limit: probe at most so many files, evenly chosen: a trial, refused for training.
        recheck: probe all files again.
        show: a progress bar on stderr.

    Raises:
        DataMissing, BadAnnotations: as `scan_dataset`; DataMissing also if `file` cannot be
            written or no probing process be started.
    """
    started = time.monotonic()
    catalog = scan_dataset(name, section)
    assert section.root is not None
    root = section.root.resolve()
    header = Header(
        name,
        str(root),
        section.model_dump(mode="json"),
        listing_digest(catalog),
        limit,
        limits.thorough,
    )
    chosen = _thin_out(list(listed(catalog)), limit)
    parts = file.with_name(file.name + (".recheck-parts" if recheck else ".parts"))
    old = [] if recheck else [file]
    known = _known([*old, *(sorted(parts.glob("*.parquet")) if parts.is_dir() else [])], header)
    paths = [sample.path for _, sample, there in chosen if there]
    verdicts = _unchanged(root, paths, known)
    left = [path for path in paths if path not in verdicts]
    kept = len(verdicts)
    with _written(file):
        parts.mkdir(parents=True, exist_ok=True)
    parted = _Parts(parts, header)
    probing = probe_files(root, left, section.is_image, limits)
    bar = tqdm(
        probing,
        desc=f"index {name}",
        total=len(paths),
        initial=kept,
        unit="file",
        disable=not show or not left,
        mininterval=0.5,
        dynamic_ncols=True,
    )
    try:
        for path, verdict in bar:
            verdicts[path] = verdict
            parted.add(path, verdict)
    finally:
        probing.close()
        parted.write()
    rows = [
        Row(
            sample.path,
            split,
            sample.label,
            verdicts[sample.path] if there else Verdict(MISSING, ABSENT),
        )
        for split, sample, there in chosen
    ]
    with _written(file):
        write_rows(file, header, rows)
    shutil.rmtree(parts, ignore_errors=True)
    return Built(header, catalog, rows, len(left), kept, time.monotonic() - started)


REMEDY = "set vimnas.data.index_dir to a folder that can be written"


@contextmanager
def _written(file: Path, remedy: str = REMEDY) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataMissing(f"cannot write {file}: {error.strerror or error}; {remedy}") from error


@contextmanager
def locked(file: Path, remedy: str = REMEDY) -> Iterator[None]:
    """One process at a time works at `file`; the others wait here.

    Raises DataMissing, with what helps, if the folder cannot be written.
    """
    with _written(lock_file := file.with_name(file.name + ".lock"), remedy):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_file.open("w")
    with lock:
        begun, said = time.monotonic(), False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError as error:
                raise DataMissing(
                    f"{file.parent} does not support file locks ({error.strerror}); {remedy}"
                ) from error
            if not said and time.monotonic() - begun > 10:
                said = True
                print(f"waiting for another process that works at {file}", file=sys.stderr)  # noqa: T201
        yield


class _Parts:
    """Verdicts on their way into part files."""

    def __init__(self, folder: Path, header: Header) -> None:
        self._folder, self._header = folder, header
        self._rows: list[Row] = []
        self._next = 1 + max((int(f.stem) for f in folder.glob("[0-9]*.parquet")), default=0)
        self._since = time.monotonic()

    def add(self, path: str, verdict: Verdict) -> None:
        self._rows.append(Row(path, "train", 0, verdict))
        full = len(self._rows) >= PART_FILES
        if full or time.monotonic() - self._since > PART_SECONDS:
            self.write()

    def write(self) -> None:
        if self._rows:
            file = self._folder / f"{self._next:06d}.parquet"
            with _written(file):
                write_rows(file, self._header, self._rows)
            self._next += 1
            self._rows = []
        self._since = time.monotonic()


def _known(files: Sequence[Path], header: Header) -> dict[str, Verdict]:
    """Earlier verdicts by stored path, of this root and no less thorough."""
    known: dict[str, Verdict] = {}
    for file in files:
        if not file.exists():
            continue
        try:
            before = read_header(file)
            kind = before.section.get("kind")
            same = before.root == header.root and kind == header.section["kind"]
            if same and before.thorough >= header.thorough:
                known.update((row.path, row.verdict) for row in read_rows(file))
        except UnfitIndex:
            continue  # a damaged or older file tells nothing: its files are probed again
    return {p: v for p, v in known.items() if v.state not in (MISSING, UNREADABLE)}


def _unchanged(root: Path, paths: Sequence[str], known: dict[str, Verdict]) -> dict[str, Verdict]:
    """The verdicts of files whose size and time are as they were."""
    candidates = [(path, known[key]) for path in paths if (key := stored(path)) in known]
    current = file_stats(root, [path for path, _ in candidates]).tolist()
    return {
        path: verdict
        for (path, verdict), now in zip(candidates, current, strict=True)
        if now == [verdict.size, verdict.mtime]
    }


def file_stats(root: Path, paths: Sequence[str]) -> NDArray[np.int64]:
    """(size in bytes, time of the last change in ns) of each file: shape (files, 2); -1 where it
    cannot be asked."""
    found = np.full((len(paths), 2), -1, np.int64)

    def ask(begin: int) -> None:
        for i in range(begin, min(begin + STATS, len(paths))):
            try:
                status = os.stat(f"{root}/{paths[i]}")  # noqa: PTH116 (a Path a file is slow)
            except OSError:
                continue
            found[i] = status.st_size, status.st_mtime_ns

    with ThreadPoolExecutor(16) as pool:  # network file systems answer many at once
        list(pool.map(ask, range(0, len(paths), STATS)))
    return found


def _thin_out(
    files: list[tuple[str, Sample, bool]], limit: int | None
) -> list[tuple[str, Sample, bool]]:
    if limit is None or limit >= len(files):
        return files
    return [files[i * len(files) // limit] for i in range(limit)]
