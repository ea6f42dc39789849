"""ImageNet as it is unpacked: class folders for training, 50,000 validation files in one folder.

    root/TRAIN/n01440764/*.JPEG        root/TEST/ILSVRC2012_val_00000001.JPEG ...

What the validation files show stands in `annotations`, which may be

    a list of names and wnids          LOC_val_solution.csv:  ILSVRC2012_val_00000001,n01751748 ...
    a list of names and numbers        Caffe's val.txt: the place among the sorted wnids, from 0
    the devkit's list of numbers       ILSVRC2012_validation_ground_truth.txt: line k is file k

The devkit counts classes from 1 in an order of its own, so its list needs `synsets`: the devkit's
map_clsloc.txt (`wnid number name`), or a file whose line k opens with the wnid of number k.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.bad import BadAnnotations, DataMissing
from vimnas_ds.data.listing import (
    IMAGE_SUFFIXES,
    Listing,
    Sample,
    annotation_file,
    check_distinct,
    entries,
    has_suffix,
    read_text,
)

WNID = re.compile(r"n\d{8}")
NAMED = re.compile(r"(?P<name>\S*?ILSVRC2012_val_\d{8})(?:\.\w+)?[\s,]+(?P<what>n\d{8}|\d+)\b.*")


def list_imagenet(name: str, section: DatasetSection, root: Path) -> Listing:
    """Class folders for training, the official flat folder for test."""
    train_root, test_root = root / section.train_split, root / section.test_split
    for folder in (train_root, test_root):
        if not folder.is_dir():
            raise DataMissing(
                f"{name}: {folder} is not a folder; set vimnas.data.{name}.root "
                "(or train_split, test_split)"
            )
    pairs = [
        (wnid, f"{section.train_split}/{wnid}/{file}")
        for wnid in entries(train_root, folders=True)
        for file in entries(train_root / wnid, folders=False)
        if has_suffix(file, IMAGE_SUFFIXES)
    ]
    folders = sorted({wnid for wnid, _ in pairs})
    files = {
        file.rpartition(".")[0]: f"{section.test_split}/{file}"
        for file in entries(test_root, folders=False)
        if has_suffix(file, IMAGE_SUFFIXES)
    }
    if not files and entries(test_root, folders=True):
        raise DataMissing(
            f"{name}: {test_root} holds folders and no image files; for class folders set "
            f'vimnas.data.{name}.layout to "folders"'
        )
    truth = dict(_truth(name, section, root, folders))
    names = tuple(sorted({*folders, *truth.values()}))
    number = {wnid: i for i, wnid in enumerate(names)}
    train = [Sample(path, number[wnid]) for wnid, path in pairs]
    test: list[Sample] = []
    absent: list[Sample] = []
    for stem, wnid in truth.items():
        path = files.get(stem)
        sample = Sample(path or f"{section.test_split}/{stem}.JPEG", number[wnid])
        (absent if path is None else test).append(sample)
    check_distinct(name, root, train, test + absent)
    return Listing(names, train, test, [], absent)


def _truth(
    name: str, section: DatasetSection, root: Path, folders: list[str]
) -> Iterator[tuple[str, str]]:
    """(file name without its suffix, wnid) of every validation file."""
    what = (
        "what the validation files show: LOC_val_solution.csv, or the devkit's "
        "ILSVRC2012_validation_ground_truth.txt together with synsets"
    )
    file = annotation_file(name, root, section.annotations, "annotations", what)
    lines = [line.strip() for line in read_text(name, file).splitlines() if line.strip()]
    if lines and all(line.isdecimal() for line in lines):
        order = _synsets(name, section, root, file)
        for k, line in enumerate(lines, start=1):
            if int(line) not in order:
                raise BadAnnotations(
                    f"{name}: {file}, line {k}: the synsets have no number {line} "
                    f"(they hold {len(order)})"
                )
            yield f"ILSVRC2012_val_{k:08d}", order[int(line)]
        return
    matches = [NAMED.fullmatch(line) for line in lines]
    if lines and matches[0] is None and any(matches):  # a header
        lines, matches = lines[1:], matches[1:]
    for k, (line, match) in enumerate(zip(lines, matches, strict=True), start=1):
        if match is None:
            raise BadAnnotations(
                f"{name}: {file}: entry {k}, {line[:80]!r}, is neither `name wnid`, `name number` "
                f"nor a number alone; needed is {what}"
            )
        stem, label = match["name"].rpartition("/")[2], match["what"]
        if WNID.fullmatch(label):
            yield stem, label
        elif int(label) < len(folders):
            yield stem, folders[int(label)]
        else:
            raise BadAnnotations(
                f"{name}: {file}: entry {k} has the number {label}, but there are only "
                f"{len(folders)} training classes (numbers count the sorted wnids from 0)"
            )


def _synsets(name: str, section: DatasetSection, root: Path, truth: Path) -> dict[int, str]:
    """The devkit's numbers (from 1) and their wnids."""
    if section.synsets is None:
        raise DataMissing(
            f"{name}: {truth} holds the devkit's class numbers, and their order is needed: set "
            f"vimnas.data.{name}.synsets to the devkit's map_clsloc.txt or to a file whose line k "
            "opens with the wnid of number k; or use LOC_val_solution.csv as annotations"
        )
    file = annotation_file(name, root, section.synsets, "synsets", "the devkit's map_clsloc.txt")
    rows = [line.split() for line in read_text(name, file).splitlines() if line.strip()]
    for k, row in enumerate(rows, start=1):
        if not WNID.fullmatch(row[0]):
            raise BadAnnotations(f"{name}: {file}, line {k}: {row[0]!r} is not a wnid (n12345678)")
    if rows and all(len(row) > 1 and row[1].isdecimal() for row in rows):
        if len({row[1] for row in rows}) < len(rows):
            raise BadAnnotations(f"{name}: {file}: two wnids have one number")
        return {int(row[1]): row[0] for row in rows}
    wnids = [row[0] for row in rows]
    if len(wnids) > 2 and wnids == sorted(wnids):
        raise BadAnnotations(
            f"{name}: {file} is sorted by wnid (as LOC_synset_mapping.txt and synset_words.txt), "
            "which is not the devkit's order; use its map_clsloc.txt, or LOC_val_solution.csv as "
            "annotations"
        )
    return {k: row[0] for k, row in enumerate(rows, start=1)}
