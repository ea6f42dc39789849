"""What every layout of a dataset yields, and the pieces that layouts are read with."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vimnas_ds.data.bad import BadAnnotations, DataMissing
from vimnas_ds.data.timeline import Timeline

#: What is wrong with an annotated file that is not there.
ABSENT = "not on the disk"
IMAGE_SUFFIXES = frozenset(".jpg .jpeg .png .bmp .webp .tif .tiff .gif".split())
VIDEO_SUFFIXES = frozenset(
    ".mp4 .webm .mkv .avi .mov .m4v .mpg .mpeg .wmv .flv .3gp .ts .ogv".split()
)

#: How a file name that is no UTF-8 is encoded.
LOSSLESS = ("utf-8", "surrogateescape")


class VideoFacts(NamedTuple):
    """What the index knows of a sound video that the GPU can decode: upright size, timestamps.

    `size` is the file's length in bytes when it was probed.
    """

    width: int
    height: int
    size: int
    timeline: Timeline


class Sample(NamedTuple):
    """One file: its path relative to the dataset's root (with "/") and its class number.

    `video` is there where an index says that the GPU can decode the file.
    """

    path: str
    label: int
    video: VideoFacts | None = None


@dataclass(frozen=True)
class Listing:
    """Both official splits as the annotations have them.

    `absent_*` are the listed files that are not on the disk; `video_ids` gives the YouTube id of
    files whose name alone does not say it.
    """

    class_names: tuple[str, ...]
    train: list[Sample]
    test: list[Sample]
    absent_train: list[Sample] = field(default_factory=list)
    absent_test: list[Sample] = field(default_factory=list)
    video_ids: Mapping[str, str] = field(default_factory=dict)


def entries(folder: Path, folders: bool) -> list[str]:
    """The names in a folder: its folders, or everything else; hidden ones are passed over."""
    with os.scandir(folder) as found:
        return [e.name for e in found if e.is_dir() == folders and not e.name.startswith(".")]


def has_suffix(name: str, suffixes: frozenset[str]) -> bool:
    """Whether a file's name ends in one of `suffixes`, in whatever case."""
    return os.path.splitext(name)[1].lower() in suffixes  # noqa: PTH122 (a Path per file is slow)


def files_below(root: Path, start: str, suffixes: frozenset[str], depth: int) -> Iterator[str]:
    """Paths relative to `root` of the media files in root/start, at most `depth` folders deep."""
    here = root / start
    for name in sorted(entries(here, folders=False)):
        if has_suffix(name, suffixes):
            yield f"{start}/{name}" if start else name
    if depth > 0:
        for name in sorted(entries(here, folders=True)):
            yield from files_below(root, f"{start}/{name}" if start else name, suffixes, depth - 1)


def present(root: Path, samples: Iterable[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Splits an annotated list into what is on the disk and what is not; each folder is listed
    once, no file is touched."""
    listed: dict[str, set[str]] = {}
    there: list[Sample] = []
    absent: list[Sample] = []
    for sample in samples:
        folder, _, file = sample.path.rpartition("/")
        if folder not in listed:
            place = root / folder
            listed[folder] = set(entries(place, folders=False)) if place.is_dir() else set()
        (there if file in listed[folder] else absent).append(sample)
    return there, absent


def check_distinct(name: str, source: Path, train: list[Sample], test: list[Sample]) -> None:
    """Raises BadAnnotations where one file stands in both splits or with two labels.

    A row that is merely repeated counts once.
    """
    seen: dict[str, tuple[str, int]] = {}
    for split, samples in (("training", train), ("test", test)):
        for sample in samples:
            before = seen.setdefault(sample.path, (split, sample.label))
            if before != (split, sample.label):
                raise BadAnnotations(
                    f"{name}: {source}: {sample.path} stands there twice: as {before[0]} file of "
                    f"class {before[1]} and as {split} file of class {sample.label}"
                )


def check_label(name: str, where: str, label: int, num_classes: int) -> None:
    """Raises BadAnnotations for a class number that the head has no output for."""
    if not 0 <= label < num_classes:
        raise BadAnnotations(
            f"{name}: {where}: the label {label} is outside the head: "
            f"vimnas.data.{name}.num_classes is {num_classes}, so labels run from 0 to "
            f"{num_classes - 1}"
        )


def annotation_file(name: str, root: Path, path: Path | None, key: str, wanted: str) -> Path:
    """root/path (or `path`, if absolute); raises DataMissing naming the key if it is no file."""
    full = f"vimnas.data.{name}.{key}"
    if path is None:
        raise DataMissing(f"{name}: no {wanted}; set {full}")
    file = root / path
    if not file.is_file():
        raise DataMissing(f"{name}: {file} is not a file; set {full} to {wanted}")
    return file


def read_text(name: str, file: Path) -> str:
    """A text file's content. Raises BadAnnotations if it cannot be read as UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadAnnotations(f"{name}: cannot read {file}: {reason}") from error
