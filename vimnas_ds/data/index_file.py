"""The index of one dataset: a Parquet file with a row for every file its listing names.

    path split label | state reason | size mtime | container codec pixels width height rotation
    mirrored duration | frames tick_num tick_den first_tick deltas   (see `Timeline`)

Rows of missing and unusable files are there too. The header (in the Parquet metadata) says what the
index is of: the root, the section that it was listed by, and a digest of that listing. Files are
written beside their place and renamed, so an index is whole or not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vimnas_ds.data.bad import UnfitIndex
from vimnas_ds.data.catalog import Catalog
from vimnas_ds.data.listing import LOSSLESS, Sample
from vimnas_ds.data.probe import Verdict
from vimnas_ds.data.timeline import Timeline

FORMAT = 1
METADATA = b"vimnas_index"
_WORDS = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("split", _WORDS),
        ("label", pa.int32()),
        ("state", _WORDS),
        ("reason", _WORDS),
        ("size", pa.int64()),
        ("mtime", pa.int64()),
        ("container", _WORDS),
        ("codec", _WORDS),
        ("pixels", _WORDS),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("rotation", pa.int16()),
        ("mirrored", pa.bool_()),
        ("duration", pa.float64()),
        ("frames", pa.int32()),
        ("tick_num", pa.int64()),
        ("tick_den", pa.int64()),
        ("first_tick", pa.int64()),
        ("deltas", pa.large_list(pa.int32())),  # in all, more than 2^31 timestamps are possible
    ]
)
_TICKS = ("tick_num", "tick_den", "first_tick", "frames")
_VERDICT = "state reason size mtime container codec pixels width height rotation mirrored".split()


class Row(NamedTuple):
    """One file of a split ("train" or "test")."""

    path: str
    split: str
    label: int
    verdict: Verdict


@dataclass(frozen=True)
class Header:
    """What an index is of.

    Attributes:
        name, root: the dataset and its resolved folder.
        section: the dataset's configuration, as JSON values.
        listing: digest of every path, label and split that the listing named.
        limit: None, or how many files were probed as a trial.
        thorough: images were read through, not just their headers.
    """

    name: str
    root: str
    section: dict[str, Any]
    listing: str
    limit: int | None = None
    thorough: bool = False
    format: int = FORMAT


def listed(catalog: Catalog) -> Iterator[tuple[str, Sample, bool]]:
    """(split, sample, whether it is on the disk) of everything a catalog names."""
    for split, there, absent in (
        ("train", catalog.train, catalog.absent_train),
        ("test", catalog.test, catalog.absent_test),
    ):
        yield from ((split, sample, True) for sample in there)
        yield from ((split, sample, False) for sample in absent)


def listing_digest(catalog: Catalog) -> str:
    """Changes with every file that is added, removed, renamed or labelled otherwise."""
    digest = hashlib.sha256()
    for split, sample, there in listed(catalog):
        digest.update(f"{split} {there:d} {sample.label} {sample.path}\0".encode(*LOSSLESS))
    return digest.hexdigest()


def stored(path: str) -> str:
    r"""A path as the index spells it: bytes that are no UTF-8 are written as \xNN."""
    return path.encode(*LOSSLESS).decode("utf-8", "backslashreplace")


def write_rows(file: Path, header: Header, rows: Sequence[Row]) -> None:
    """Writes an index, atomically."""
    verdicts = [row.verdict for row in rows]
    columns: dict[str, Any] = {
        "path": [stored(row.path) for row in rows],
        "split": [row.split for row in rows],
        "label": [row.label for row in rows],
        "duration": [v.duration for v in verdicts],
    }
    for key in _VERDICT:
        columns[key] = [getattr(v, key) for v in verdicts]
    lines = [v.timeline for v in verdicts]
    columns["frames"] = [None if t is None else t.frames for t in lines]
    columns["tick_num"] = [None if t is None else t.num for t in lines]
    columns["tick_den"] = [None if t is None else t.den for t in lines]
    columns["first_tick"] = [None if t is None else t.first for t in lines]
    columns["deltas"] = _lists([b"" if t is None else t.deltas for t in lines])
    arrays = [
        columns[field.name]
        if field.name == "deltas"
        else pa.array(columns[field.name], field.type.value_type).dictionary_encode()
        if field.type == _WORDS
        else pa.array(columns[field.name], field.type)
        for field in SCHEMA
    ]
    meta = {METADATA: json.dumps(asdict(header)).encode()}
    table = pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata(meta))
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        pq.write_table(table, partial, compression="zstd")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def read_header(file: Path) -> Header:
    """Raises UnfitIndex if the file is no index of this format."""
    with _damage_in_words(file):
        meta = (pq.read_schema(file).metadata or {}).get(METADATA)
        values = None if meta is None else dict(json.loads(meta))
    if values is None or values.get("format") != FORMAT:
        found = "none" if values is None else values.get("format")
        raise UnfitIndex(
            f"{file} is of index format {found}, this program reads {FORMAT}; delete it, and the "
            "next run builds a new one"
        )
    if (
        not {"name", "root", "section", "listing"}
        <= values.keys()
        <= {f.name for f in fields(Header)}
    ):
        raise UnfitIndex(f"{file} has a header of other keys: {sorted(values)}; delete it")
    return Header(**values)


def read_table(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows as Arrow columns, in the order of `listed`; all of them, or those that are named.

    Raises UnfitIndex if the file is damaged.
    """
    with _damage_in_words(file):
        return pq.read_table(file, columns=None if columns is None else list(columns))


def read_rows(file: Path) -> Iterator[Row]:
    """Every row, in the file's order. Raises UnfitIndex if the file is damaged."""
    table = read_table(file)
    path, split, label = (table[name].to_pylist() for name in ("path", "split", "label"))
    yield from map(Row, path, split, label, read_verdicts(table))


def read_verdicts(table: pa.Table) -> Iterator[Verdict]:
    """The verdict of every row of a table that has all columns."""
    for batch in table.to_batches(max_chunksize=1 << 14):  # few objects at a time
        values = [batch[key].to_pylist() for key in _VERDICT]
        yield from map(Verdict, *values, _timelines(batch), batch["duration"].to_pylist())


def _timelines(batch: pa.RecordBatch) -> Iterator[Timeline | None]:
    ticks = zip(*(batch[key].to_pylist() for key in _TICKS), strict=True)
    deltas = batch["deltas"]
    flat, offsets = deltas.values.to_numpy(zero_copy_only=False), deltas.offsets.to_pylist()
    for (num, den, first, frames), (begin, end) in zip(ticks, pairwise(offsets), strict=True):
        packed = flat[begin:end].tobytes()
        yield None if frames is None else Timeline(num, den, first, frames, packed)


def _lists(deltas: Iterable[bytes]) -> pa.Array:
    parts = [np.frombuffer(d, np.int32) for d in deltas]
    offsets = np.cumsum([0, *map(len, parts)])
    flat = np.concatenate(parts) if parts else np.empty(0, np.int32)
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(flat, pa.int32()))


@contextlib.contextmanager
def _damage_in_words(file: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise UnfitIndex(
            f"cannot read the index {file} (Permission denied); give this user the right to read it"
        ) from error
    except (pa.ArrowException, OSError, ValueError, TypeError, RecursionError) as error:
        raise UnfitIndex(
            f"cannot read the index {file} ({str(error).splitlines()[0]}); delete it, and the next "
            "run builds a new one"
        ) from error
