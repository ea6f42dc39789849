"""Which files a dataset has and what they show: one cheap listing, no file is opened.

A `Catalog` is the sorted list of (path, label) of the official training and test splits. It comes
from folder names, from a CSV file or from Something-Something V2's own JSON files. Folders are
listed once each, so that a listing of half a million names costs seconds, and annotated files that
are not on the disk are counted and named instead of used.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.bad import BadAnnotations, DataMissing

IMAGE_SUFFIXES = frozenset(".jpg .jpeg .png .bmp .webp .tif .tiff .gif".split())
VIDEO_SUFFIXES = frozenset(
    ".mp4 .webm .mkv .avi .mov .m4v .mpg .mpeg .wmv .flv .3gp .ts .ogv".split()
)


class Sample(NamedTuple):
    """One file: its path relative to the dataset's root (with "/") and its class number."""

    path: str
    label: int


@dataclass(frozen=True)
class Catalog:
    """A dataset's files, sorted by path.

    `class_names[label]` is a class's name; `missing` counts the annotated files that are not on
    the disk and `missing_names` names the first few of them.
    """

    name: str
    root: Path
    class_names: tuple[str, ...]
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    missing: int = 0
    missing_names: tuple[str, ...] = ()


def scan_dataset(name: str, section: DatasetSection) -> Catalog:
    """Lists the dataset `name` (its key in `vimnas.data`).

    Raises:
        DataMissing: the root is not set or not there, or a split has no usable file.
        BadAnnotations: more classes than `num_classes`, or annotations that cannot be understood.
    """
    key = f"vimnas.data.{name}.root"
    if section.root is None:
        raise DataMissing(f"{name}: no data folder; set {key}")
    if not section.root.is_dir():
        raise DataMissing(f"{name}: {section.root} is not a folder; set {key}")
    listing = {"folders": _scan_folders, "csv": _scan_csv, "ssv2": _scan_ssv2}[section.layout]
    class_names, train, test = listing(name, section, section.root)
    if len(class_names) > section.num_classes:
        raise BadAnnotations(
            f"{name}: {len(class_names)} classes found, but vimnas.data.{name}.num_classes "
            f"is {section.num_classes}"
        )
    absent: list[str] = []
    if section.layout != "folders":
        train, absent_train = _present(section.root, train)
        test, absent_test = _present(section.root, test)
        absent = absent_train + absent_test
    for split, samples in ((section.train_split, train), (section.test_split, test)):
        if not samples:
            note = f" ({len(absent)} annotated files are missing: {', '.join(absent[:3])}, ...)"
            raise DataMissing(
                f'{name}: no usable file in the split "{split}" of {section.root}'
                f"{note if absent else ''}; check {key}"
            )
    return Catalog(
        name=name,
        root=section.root,
        class_names=class_names,
        train=tuple(sorted(set(train))),
        test=tuple(sorted(set(test))),
        missing=len(absent),
        missing_names=tuple(absent[:5]),
    )


Listing = tuple[tuple[str, ...], list[Sample], list[Sample]]


def _scan_folders(name: str, section: DatasetSection, root: Path) -> Listing:
    suffixes = IMAGE_SUFFIXES if section.is_image else VIDEO_SUFFIXES
    found: dict[str, list[tuple[str, str]]] = {}  # split -> (class, path)
    for split in (section.train_split, section.test_split):
        if not (root / split).is_dir():
            raise DataMissing(
                f"{name}: {root / split} is not a folder; set vimnas.data.{name}.root "
                "(or train_split, test_split)"
            )
        found[split] = [
            (label, f"{split}/{label}/{file}")
            for label in _entries(root / split, folders=True)
            for file in _entries(root / split / label, folders=False)
            if os.path.splitext(file)[1].lower() in suffixes  # noqa: PTH122 (a Path per file is slow)
        ]
    class_names = tuple(sorted({label for pairs in found.values() for label, _ in pairs}))
    number = {label: i for i, label in enumerate(class_names)}
    train, test = (
        [Sample(path, number[label]) for label, path in found[split]]
        for split in (section.train_split, section.test_split)
    )
    return class_names, train, test


def _scan_csv(name: str, section: DatasetSection, root: Path) -> Listing:
    assert section.annotations is not None  # the configuration sees to it
    file = root / section.annotations
    if not file.is_file():
        raise DataMissing(f"{name}: {file} is not a file; set vimnas.data.{name}.annotations")
    with file.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        columns = set(reader.fieldnames or ())
        column = next((c for c in ("class", "label") if c in columns), None)
        if column is None or not {"path", "split"} <= columns:
            raise BadAnnotations(
                f"{name}: {file} needs a header with the columns path, class (or label) and split; "
                f"it has {', '.join(sorted(columns)) or 'none'}"
            )
        rows = [(row["path"], row[column], row["split"]) for row in reader]
    labels = {label for _, label, _ in rows}
    if all(label.isdecimal() for label in labels):  # numbers keep their meaning
        class_names = tuple(map(str, range(max(map(int, labels), default=-1) + 1)))
        number = {label: int(label) for label in labels}
    else:
        class_names = tuple(sorted(labels))
        number = {label: i for i, label in enumerate(class_names)}
    train, test = (
        [Sample(path, number[label]) for path, label, of in rows if of == split]
        for split in (section.train_split, section.test_split)
    )
    return class_names, train, test


def _scan_ssv2(name: str, section: DatasetSection, root: Path) -> Listing:
    folder = root / (section.annotations or "labels")
    videos = (section.videos or Path("20bn-something-something-v2")).as_posix()
    for wanted in ("labels.json", "train.json", "validation.json"):
        if not (folder / wanted).is_file():
            raise DataMissing(
                f"{name}: {folder / wanted} is not there; set vimnas.data.{name}.root "
                f"(or vimnas.data.{name}.annotations)"
            )
    number = {text: int(i) for text, i in _json(folder / "labels.json").items()}
    class_names = tuple(sorted(number, key=number.__getitem__))
    if sorted(number.values()) != list(range(len(number))):
        raise BadAnnotations(
            f"{name}: the numbers in {folder / 'labels.json'} are not 0, 1, 2, ..."
        )

    def samples(file: Path) -> Iterator[Sample]:
        for entry in _json(file):
            label = entry["template"].replace("[", "").replace("]", "")
            if label not in number:
                raise BadAnnotations(f"{name}: {file}: the label {label!r} is not in labels.json")
            yield Sample(f"{videos}/{entry['id']}.webm", number[label])

    return (
        class_names,
        list(samples(folder / "train.json")),
        list(samples(folder / "validation.json")),
    )


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _entries(folder: Path, folders: bool) -> list[str]:
    with os.scandir(folder) as entries:
        return [e.name for e in entries if e.is_dir() == folders and not e.name.startswith(".")]


def _present(root: Path, samples: list[Sample]) -> tuple[list[Sample], list[str]]:
    """Splits an annotated list into what is on the disk and the paths that are not."""
    listed: dict[str, set[str]] = {}
    present, absent = [], []
    for sample in samples:
        folder, _, file = sample.path.rpartition("/")
        if folder not in listed:
            there = root / folder
            listed[folder] = set(_entries(there, folders=False)) if there.is_dir() else set()
        if file in listed[folder]:
            present.append(sample)
        else:
            absent.append(sample.path)
    return present, absent
