"""Which layout annotations are in, by their content."""

from __future__ import annotations

import csv
from pathlib import Path

from vimnas_ds.data.bad import DataMissing
from vimnas_ds.data.imagenet import NAMED
from vimnas_ds.data.kinetics import COLUMNS, is_kinetics


def recognise_layout(annotations: Path) -> str:
    """The layout that `annotations`, a file or folder, is the key of.

    Raises DataMissing if it is not there, cannot be read or is a folder without anything known.
    """
    try:
        return _recognise(annotations)
    except OSError as error:
        raise DataMissing(f"cannot read {annotations}: {error.strerror}") from error


def _recognise(annotations: Path) -> str:
    if annotations.is_dir():
        if (annotations / "labels.json").is_file():
            return "ssv2"
        if any(is_kinetics(file) for file in annotations.glob("*.csv")):
            return "kinetics"
        raise DataMissing(
            f"{annotations} holds neither SSV2's labels.json nor a CSV with the columns "
            f"{', '.join(sorted(COLUMNS))}"
        )
    if not annotations.is_file():
        raise DataMissing(f"{annotations} is neither a file nor a folder; see --annotations")
    with annotations.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        lines = [line.strip() for line, _ in zip(file, range(2), strict=False)]
    if not any(lines):
        raise DataMissing(f"{annotations} is empty")
    columns = set(next(csv.reader(lines[:1]), []))
    if columns >= COLUMNS:
        return "kinetics"
    if {"path", "split"} <= columns:
        return "csv"
    if any(NAMED.fullmatch(line) for line in lines) or all(line.isdecimal() for line in lines):
        return "imagenet"
    return "lists"
