"""Layouts of general use: class folders, CSV with a header, `path label` lists, SSV2's JSON files.

Every function here lists a dataset from its annotations and folder listings; no media file is
opened. `kinetics.py` and `imagenet.py` hold the official forms of those two.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.bad import BadAnnotations, DataMissing
from vimnas_ds.data.listing import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Listing,
    Sample,
    annotation_file,
    check_distinct,
    check_label,
    entries,
    has_suffix,
    present,
    read_text,
)

#: A file name with a class number after it; the name may hold spaces and commas itself.
LIST_LINE = re.compile(r"(?P<path>.*?\S)(?:\s*[,;]\s*|\s+)(?P<label>-?\d+)")
QUOTED = re.compile(r'"(?P<path>(?:[^"]|"")*)"\s*[\s,;]\s*(?P<label>-?\d+)')


def list_folders(name: str, section: DatasetSection, root: Path) -> Listing:
    """`root/SPLIT/CLASS/FILE`; the sorted folder names of both splits are the classes."""
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
            for label in entries(root / split, folders=True)
            for file in entries(root / split / label, folders=False)
            if has_suffix(file, suffixes)
        ]
    class_names = tuple(sorted({label for pairs in found.values() for label, _ in pairs}))
    number = {label: i for i, label in enumerate(class_names)}
    train, test = (
        [Sample(path, number[label]) for label, path in found[split]]
        for split in (section.train_split, section.test_split)
    )
    return Listing(class_names, train, test)


def list_csv(name: str, section: DatasetSection, root: Path) -> Listing:
    """A CSV file with the columns path, class (or label) and split; numbers keep their meaning."""
    file = annotation_file(name, root, section.annotations, "annotations", "the CSV file")
    reader = csv.DictReader(io.StringIO(read_text(name, file), newline=""))
    columns = set(reader.fieldnames or ())
    column = next((c for c in ("class", "label") if c in columns), None)
    if column is None or not {"path", "split"} <= columns:
        hint = '; this is Kinetics\' official form: layout "kinetics"'
        raise BadAnnotations(
            f"{name}: {file} needs a header with the columns path, class (or label) and split; "
            f"it has {', '.join(sorted(columns)) or 'none'}"
            f"{hint if 'youtube_id' in columns else ''}"
        )
    try:
        rows = [(row["path"], row[column], row["split"]) for row in reader]
    except csv.Error as error:
        raise BadAnnotations(f"{name}: {file}, row {reader.line_num}: {error}") from error
    for line, row in enumerate(rows, start=2):
        if not all(row):
            raise BadAnnotations(f"{name}: {file}, row {line}: path, {column} or split is empty")
    labels = {label for _, label, _ in rows}
    if all(label.isdecimal() for label in labels):
        class_names = tuple(map(str, range(max(map(int, labels), default=-1) + 1)))
        number = {label: int(label) for label in labels}
        for line, (_, label, _) in enumerate(rows, start=2):
            check_label(name, f"{file}, row {line}", int(label), section.num_classes)
    else:
        class_names = tuple(sorted(labels))
        number = {label: i for i, label in enumerate(class_names)}
    train, test = (
        [
            Sample(_inside(name, file, root, path), number[label])
            for path, label, of in rows
            if of == split
        ]
        for split in (section.train_split, section.test_split)
    )
    return _on_disk(name, file, root, class_names, train, test)


def list_lists(name: str, section: DatasetSection, root: Path) -> Listing:
    """Headerless `path label` lists (VideoMAE, InternVideo), one for training and one for test.

    Space, tab, comma or semicolon before the number at the end of the line; paths start from
    root/videos, absolute ones must lie under the root.
    """
    train_file = annotation_file(
        name, root, section.annotations, "annotations", "the training list"
    )
    test_file = annotation_file(
        name, root, section.test_annotations, "test_annotations", "the test list"
    )
    train = list(_read_list(name, section, root, train_file))
    test = list(_read_list(name, section, root, test_file))
    class_names = tuple(map(str, range(section.num_classes)))
    return _on_disk(name, train_file, root, class_names, train, test)


def _read_list(name: str, section: DatasetSection, root: Path, file: Path) -> Iterator[Sample]:
    prefix, base = section.videos or Path(), root.absolute()
    for number, line in enumerate(read_text(name, file).splitlines(), start=1):
        if not line.strip():
            continue
        match = QUOTED.fullmatch(line.strip()) or LIST_LINE.fullmatch(line.rstrip())
        where = f"{file}, line {number}"
        if match is None:
            raise BadAnnotations(
                f"{name}: {where}: {line.strip()[:80]!r} is not `path label` with a class number "
                "at the end"
            )
        label = int(match["label"])
        check_label(name, where, label, section.num_classes)
        text = match["path"]
        if match.re is QUOTED:
            text = text.replace('""', '"')
        path = PurePosixPath(os.path.normpath(PurePosixPath(prefix.as_posix(), text)))
        if path.is_absolute():
            if not path.is_relative_to(base):
                raise BadAnnotations(
                    f"{name}: {where}: {path} does not lie under the root {root}; set "
                    f"vimnas.data.{name}.root to the folder that the list's paths start from, e.g. "
                    "/ (and vimnas.data."
                    f"{name}.videos to a prefix for relative paths)"
                )
            path = path.relative_to(base)
        yield Sample(_inside(name, file, root, str(path)), label)


def _inside(name: str, file: Path, root: Path, path: str) -> str:
    """One form of a listed path, relative to the root. Raises BadAnnotations if it leaves it."""
    plain = os.path.normpath(path)
    if os.path.isabs(plain) or plain.split("/")[0] == "..":  # noqa: PTH117 (a Path a file is slow)
        raise BadAnnotations(f"{name}: {file}: {path!r} does not lie under the root {root}")
    return plain


def list_ssv2(name: str, section: DatasetSection, root: Path) -> Listing:
    """Something-Something V2's labels.json, train.json and validation.json, and the webm folder."""
    folder = root / (section.annotations or "labels")
    videos = (section.videos or Path("20bn-something-something-v2")).as_posix()
    for wanted in ("labels.json", "train.json", "validation.json"):
        if not (folder / wanted).is_file():
            raise DataMissing(
                f"{name}: {folder / wanted} is not there; set vimnas.data.{name}.root "
                f"(or vimnas.data.{name}.annotations)"
            )
    numbers = _json(name, folder / "labels.json", dict)
    try:
        number = {text: int(i) for text, i in numbers.items()}
    except (TypeError, ValueError):
        number = {}
    if not number or sorted(number.values()) != list(range(len(number))):
        raise BadAnnotations(
            f"{name}: the numbers in {folder / 'labels.json'} are not 0, 1, 2, ..."
        )
    class_names = tuple(sorted(number, key=number.__getitem__))

    def samples(file: Path) -> Iterator[Sample]:
        for place, entry in enumerate(_json(name, file, list), start=1):
            if not isinstance(entry, dict) or not {"id", "template"} <= entry.keys():
                raise BadAnnotations(f"{name}: {file}: entry {place} has no id or no template")
            label = str(entry["template"]).replace("[", "").replace("]", "")
            if label not in number:
                raise BadAnnotations(f"{name}: {file}: the label {label!r} is not in labels.json")
            if "/" in (video := str(entry["id"])):
                raise BadAnnotations(f"{name}: {file}: entry {place} has the id {video!r}")
            yield Sample(f"{videos}/{video}.webm", number[label])

    train = list(samples(folder / "train.json"))
    test = list(samples(folder / "validation.json"))
    return _on_disk(name, folder, root, class_names, train, test)


def _json(name: str, file: Path, kind: type) -> Any:
    try:
        content = json.loads(read_text(name, file))
    except json.JSONDecodeError as error:
        raise BadAnnotations(f"{name}: {file} is not valid JSON: {error}") from error
    if not isinstance(content, kind):
        expected = "an object" if kind is dict else "a list"
        raise BadAnnotations(f"{name}: {file} does not hold {expected}")
    return content


def _on_disk(
    name: str,
    source: Path,
    root: Path,
    class_names: tuple[str, ...],
    train: list[Sample],
    test: list[Sample],
) -> Listing:
    check_distinct(name, source, train, test)
    train, absent_train = present(root, train)
    test, absent_test = present(root, test)
    return Listing(class_names, train, test, absent_train, absent_test)
