"""Kinetics' official annotations: `label,youtube_id,time_start,time_end,split` and its files.

    ID_SSSSSS_EEEEEE.mp4        six digits of seconds; ID.mp4 in some copies

One CSV file may hold all splits, or each split its own (`annotations`, `test_annotations`, or a
folder of CSV files). Files lie flat or in class folders, with or without a folder per split: the
root is walked once and files are found by name.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.bad import BadAnnotations, DataMissing
from vimnas_ds.data.listing import (
    VIDEO_SUFFIXES,
    Listing,
    Sample,
    check_distinct,
    files_below,
    read_text,
)

COLUMNS = frozenset("label youtube_id time_start time_end split".split())
#: The official validation split has had these names.
VALIDATION = frozenset("val validate validation valid".split())


class _Row(NamedTuple):
    label: str
    youtube_id: str
    stem: str
    split: str


def list_kinetics(name: str, section: DatasetSection, root: Path) -> Listing:
    """The official CSV files; the sorted labels of train and validation are the classes."""
    rows = [row for file in _files(name, section, root) for row in _rows(name, file)]
    start = (section.videos or Path()).as_posix()
    if not (root / start).is_dir():
        raise DataMissing(f"{name}: {root / start} is not a folder; set vimnas.data.{name}.videos")
    places: dict[str, list[str]] = {}
    for path in files_below(root, "" if start == "." else start, VIDEO_SUFFIXES, depth=3):
        places.setdefault(path.rpartition("/")[2].rpartition(".")[0], []).append(path)
    wanted = {section.train_split: _same(section.train_split)}
    wanted[section.test_split] = _same(section.test_split)
    chosen = {split: [r for r in rows if r.split in names] for split, names in wanted.items()}
    class_names = tuple(sorted({r.label for part in chosen.values() for r in part}))
    number = {label: i for i, label in enumerate(class_names)}
    ids: dict[str, str] = {}
    found: dict[str, list[Sample]] = {}
    absent: dict[str, list[Sample]] = {}
    for split, part in chosen.items():
        found[split], absent[split] = [], []
        for row in part:
            label = number[row.label]
            place = _choose(places.get(row.stem) or places.get(row.youtube_id), wanted[split])
            sample = Sample(place or f"{row.stem}.mp4", label)
            ids[sample.path] = row.youtube_id
            (absent if place is None else found)[split].append(sample)
    train, test = section.train_split, section.test_split
    annotations = root / (section.annotations or "")
    check_distinct(name, annotations, found[train] + absent[train], found[test] + absent[test])
    return Listing(class_names, found[train], found[test], absent[train], absent[test], ids)


def is_kinetics(file: Path) -> bool:
    """Whether a file opens with the official header."""
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        return set(next(csv.reader(lines), [])) >= COLUMNS


def _same(split: str) -> frozenset[str]:
    return VALIDATION | {split} if split in VALIDATION else frozenset({split})


def _choose(paths: list[str] | None, split_names: frozenset[str]) -> str | None:
    """The copy under the split's own folder, else the first."""
    if not paths:
        return None
    own = (p for p in paths if split_names & set(p.split("/")[:-1]))
    return next(own, paths[0])


def _files(name: str, section: DatasetSection, root: Path) -> list[Path]:
    files: list[Path] = []
    for key in ("annotations", "test_annotations"):
        path: Path | None = getattr(section, key)
        if path is None:
            continue
        if (root / path).is_dir():
            files += [f for f in sorted((root / path).glob("*.csv")) if is_kinetics(f)]
        elif (root / path).is_file():
            files.append(root / path)
        else:
            raise DataMissing(
                f"{name}: {root / path} is neither a file nor a folder; set "
                f"vimnas.data.{name}.{key} to Kinetics' official CSV"
            )
    if not files:
        raise DataMissing(
            f"{name}: no CSV file with the columns {', '.join(sorted(COLUMNS))}; set "
            f"vimnas.data.{name}.annotations"
        )
    return files


def _rows(name: str, file: Path) -> Iterator[_Row]:
    reader = csv.DictReader(io.StringIO(read_text(name, file), newline=""))
    columns = set(reader.fieldnames or ())
    if not columns >= COLUMNS:
        raise BadAnnotations(
            f"{name}: {file} needs the columns {', '.join(sorted(COLUMNS))}; it has "
            f"{', '.join(sorted(columns)) or 'none'}"
        )
    try:
        rows = list(reader)
    except csv.Error as error:
        raise BadAnnotations(f"{name}: {file}, row {reader.line_num}: {error}") from error
    for line, row in enumerate(rows, start=2):
        try:
            begin, end = (int(float(row[column])) for column in ("time_start", "time_end"))
        except (TypeError, ValueError, OverflowError) as error:
            raise BadAnnotations(
                f"{name}: {file}, row {line}: time_start and time_end must be seconds"
            ) from error
        if "/" in (row["youtube_id"] or ""):
            raise BadAnnotations(
                f"{name}: {file}, row {line}: {row['youtube_id']!r} is not a YouTube id"
            )
        if not row["label"] or not row["youtube_id"]:
            raise BadAnnotations(f"{name}: {file}, row {line}: label or youtube_id is empty")
        stem = f"{row['youtube_id']}_{begin:06d}_{end:06d}"
        yield _Row(row["label"], row["youtube_id"], stem, row["split"])
