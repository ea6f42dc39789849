"""Which files a dataset has and what they show: one cheap listing, no file is opened.

A `Catalog` is the sorted list of (path, label) of the official training and test splits. It comes
from folder names or annotations (`layouts`, `kinetics`, `imagenet`). Folders are listed once each,
so that a listing of half a million names costs seconds, and annotated files that are not on the
disk are counted and named instead of used. Shards bring their listing with them (`shards`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.bad import BadAnnotations, DataMissing
from vimnas_ds.data.imagenet import list_imagenet
from vimnas_ds.data.kinetics import list_kinetics
from vimnas_ds.data.layouts import list_csv, list_folders, list_lists, list_ssv2
from vimnas_ds.data.listing import Listing, Sample
from vimnas_ds.data.shards import list_shards

__all__ = ["Catalog", "Sample", "scan_dataset"]

LAYOUTS: dict[str, Callable[[str, DatasetSection, Path], Listing]] = {
    "folders": list_folders,
    "csv": list_csv,
    "lists": list_lists,
    "kinetics": list_kinetics,
    "ssv2": list_ssv2,
    "imagenet": list_imagenet,
}


@dataclass(frozen=True)
class Catalog:
    """A dataset's files, sorted by path.

    `class_names[label]` is a class's name; `absent_*` are the annotated files that are not on the
    disk; `video_ids` gives the YouTube id of files whose name alone does not say it.
    """

    name: str
    root: Path
    class_names: tuple[str, ...]
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    absent_train: tuple[Sample, ...] = ()
    absent_test: tuple[Sample, ...] = ()
    video_ids: Mapping[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """Annotated files that are not on the disk."""
        return len(self.absent_train) + len(self.absent_test)

    @property
    def missing_names(self) -> tuple[str, ...]:
        """The first few of them."""
        return tuple(s.path for s in (self.absent_train + self.absent_test)[:5])


def scan_dataset(name: str, section: DatasetSection) -> Catalog:
    """Lists the dataset `name` (its key in `vimnas.data`).

    Raises:
        DataMissing: the root is not set or not there, or a split has no file on the disk.
        BadAnnotations: more classes than `num_classes`, or annotations that cannot be understood.
    """
    key = f"vimnas.data.{name}." + ("root" if section.shards is None else "shards")
    folder = section.folder
    if folder is None:
        raise DataMissing(f"{name}: no data folder; set {key}")
    list_files = LAYOUTS[section.layout] if section.shards is None else list_shards
    try:
        if not folder.is_dir():
            raise DataMissing(f"{name}: {folder} is not a folder; set {key}")
        found = list_files(name, section, folder)
    except OSError as error:
        raise DataMissing(
            f"{name}: cannot list {error.filename or folder}: {error.strerror}"
        ) from error
    if len(found.class_names) > section.num_classes:
        raise BadAnnotations(
            f"{name}: {len(found.class_names)} classes found, but vimnas.data.{name}.num_classes "
            f"is {section.num_classes}"
        )
    absent = found.absent_train + found.absent_test
    for split, samples in (
        (section.train_split, found.train),
        (section.test_split, found.test),
    ):
        if not samples:
            shown = ", ".join(s.path for s in absent[:3])
            note = f" ({len(absent)} annotated files are missing: {shown}, ...)"
            raise DataMissing(
                f'{name}: no usable file in the split "{split}" of {folder}'
                f"{note if absent else ''}; check {key}"
            )
    return Catalog(
        name=name,
        root=folder,
        class_names=found.class_names,
        train=_ordered(found.train),
        test=_ordered(found.test),
        absent_train=_ordered(found.absent_train),
        absent_test=_ordered(found.absent_test),
        video_ids=found.video_ids,
    )


def _ordered(samples: list[Sample]) -> tuple[Sample, ...]:
    return tuple(sorted(set(samples)))
