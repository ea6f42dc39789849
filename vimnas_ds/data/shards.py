"""A dataset as tar shards: NAME-000000.tar ..., members.parquet and index.parquet in one folder.

The tars are plain archives of the usable files. members.parquet replaces the annotations: it has a
row for every file that the listing named,

    path split label video_id there | shard offset size crc

whose last four say where a usable file's data lie and what their CRC-32 is; its metadata (`About`)
says the rest. A shard is known by its number alone, so nothing in there can point out of the
folder. index.parquet is a copy of the dataset's index; it is written last.

A file is one `pread` of its shard: no path is looked up and no file is opened for it.
"""

from __future__ import annotations

import json
import os
import zlib
from bisect import bisect_left
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.bad import BadAnnotations, BadFile, DataMissing, UnfitIndex
from vimnas_ds.data.blob import Blob
from vimnas_ds.data.listing import LOSSLESS, Listing, Sample
from vimnas_ds.data.readers import begin_reading

FORMAT = 1
METADATA = b"vimnas_shards"
MEMBERS, INDEX = "members.parquet", "index.parquet"
SCHEMA = pa.schema(
    [
        ("path", pa.binary()),  # file names need not be UTF-8
        ("split", pa.string()),
        ("label", pa.int32()),
        ("video_id", pa.string()),
        ("there", pa.bool_()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("crc", pa.uint32()),
    ]
)
#: Shards of one dataset that a process keeps open.
MAX_OPEN = 128
AGAIN = "the scripts/make_shards.py that made the folder writes what is missing when run again"


@dataclass(frozen=True)
class About:
    """What a folder of shards is of.

    Attributes:
        name, kind, layout: the dataset's, as in its configuration.
        class_names: by class number.
        shard_sizes: of every shard, in bytes.
        plan: digest of which files lie where (see `shard_build`).
    """

    name: str
    kind: str
    layout: str
    class_names: list[str]
    shard_sizes: list[int]
    plan: str
    format: int = FORMAT


def shard_name(name: str, number: int) -> str:
    """The file of a dataset's shard."""
    return f"{name}-{number:06d}.tar"


def write_members(folder: Path, about: About, table: pa.Table) -> None:
    """Writes members.parquet, atomically; the table is of `SCHEMA`."""
    partial = folder / f".{MEMBERS}.partial"
    try:
        meta = {METADATA: json.dumps(asdict(about)).encode()}
        pq.write_table(table.replace_schema_metadata(meta), partial, compression="zstd")
        partial.replace(folder / MEMBERS)
    finally:
        partial.unlink(missing_ok=True)


def read_members(folder: Path) -> tuple[About, pa.Table]:
    """members.parquet. Raises UnfitIndex if it is damaged, of another format, or names a file
    outside the dataset's root."""
    file = folder / MEMBERS
    anew = "make the shards anew: scripts/make_shards.py --overwrite"
    try:
        table = pq.read_table(file).combine_chunks()
        values = dict(json.loads((table.schema.metadata or {}).get(METADATA, b"{}")))
    except (pa.ArrowException, OSError, ValueError, TypeError, RecursionError) as error:
        raise UnfitIndex(
            f"cannot read {file} ({str(error).splitlines()[0]}); copy it there again, or {anew}"
        ) from error
    if values.get("format") != FORMAT:
        raise UnfitIndex(
            f"{file} is of shard format {values.get('format')}, this program reads {FORMAT}; {anew}"
        )
    if values.keys() != {f.name for f in fields(About)} or not table.schema.equals(SCHEMA):
        raise UnfitIndex(f"{file} has not the contents of its format; {anew}")
    leaves = pc.match_substring_regex(table["path"], rb"^/|(^|/)\.\.(/|$)")
    if pc.any(leaves).as_py():
        path = table["path"].filter(leaves)[0].as_py().decode(*LOSSLESS)
        raise UnfitIndex(f"{file} names {path!r}, which is not under the dataset's root; {anew}")
    return About(**values), table


def list_shards(name: str, section: DatasetSection, folder: Path) -> Listing:
    """The listing that the shards in `folder` were made from.

    Raises:
        DataMissing: no finished shards there, or one that is missing or has lost its end.
        BadAnnotations: shards of another dataset, or a damaged members.parquet.
    """
    about = open_shards(name, folder).about
    for what in ("kind", "layout"):
        if getattr(about, what) != getattr(section, what):
            raise BadAnnotations(
                f'{name}: the shards in {folder} were made with {what} "{getattr(about, what)}", '
                f'this run has "{getattr(section, what)}"; set vimnas.data.{name}.{what}'
            )
    _, table = read_members(folder)
    found: dict[tuple[str, bool], list[Sample]] = {
        (split, there): [] for split in ("train", "test") for there in (True, False)
    }
    video_ids = {}
    for row in zip(*(table[key].to_pylist() for key in SCHEMA.names[:5]), strict=True):
        path, split, label, video_id, there = row
        sample = Sample(path.decode(*LOSSLESS), label)
        found[split, there].append(sample)
        if video_id is not None:
            video_ids[sample.path] = video_id
    return Listing(
        tuple(about.class_names),
        found["train", True],
        found["test", True],
        found["train", False],
        found["test", False],
        video_ids,
    )


def open_shards(name: str, folder: Path) -> Shards:
    """The shards of the dataset `name` in a folder, opened once per process.

    Raises:
        DataMissing, BadAnnotations: as `list_shards`.
    """
    key = f"vimnas.data.{name}.shards"
    for file in (folder / MEMBERS, folder / INDEX):
        if not file.is_file():
            raise DataMissing(
                f"{name}: {file} is not there: no shards, or not finished; set {key} to the folder "
                f"of finished ones ({AGAIN})"
            )
    status = (folder / MEMBERS).stat()
    return _opened(name, folder.absolute(), (status.st_ino, status.st_mtime_ns))


@lru_cache(maxsize=64)
def _opened(name: str, folder: Path, version: tuple[int, int]) -> Shards:
    return Shards(name, folder)


class Shards:
    """The bytes of the files in a dataset's shards, for any number of threads.

    Raises:
        DataMissing: a shard is missing or has not the size that it was written with.
        BadAnnotations: they are of another dataset, or members.parquet is damaged.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.about, table = read_members(folder)
        if self.about.name != name:
            raise BadAnnotations(
                f"{name}: {folder} holds the shards of the dataset {self.about.name}; check "
                f"vimnas.data.{name}.shards"
            )
        self._files = [folder / shard_name(name, i) for i in range(len(self.about.shard_sizes))]
        for file, size in zip(self._files, self.about.shard_sizes, strict=True):
            _check_shard(name, file, size)
        inside = table.filter(table["shard"].is_valid()).sort_by("path").combine_chunks()
        self._paths = inside["path"].combine_chunks()  # looked up by bisection: no string a file
        self._shard, self._offset, self._size, self._crc = (
            inside[key].to_numpy() for key in ("shard", "offset", "size", "crc")
        )
        self._check_places(folder / MEMBERS)
        self._verified = bytearray(len(self._paths))
        self._descriptor = lru_cache(MAX_OPEN)(self._open)

    def _check_places(self, file: Path) -> None:
        sizes = np.array(self.about.shard_sizes)
        known = (self._shard >= 0) & (self._shard < len(sizes))
        ends = sizes[np.where(known, self._shard, 0)]
        inside = (self._offset >= 0) & (self._size >= 0) & (self._offset <= ends - self._size)
        if not (known & inside).all():
            raise UnfitIndex(f"{file} names places that the shards do not have; copy it there anew")

    def file(self, path: str) -> Blob:
        """A file's bytes; checked by their CRC-32 the first time it is asked for.

        Raises:
            BadFile: it cannot be read, is damaged, or is not in the shards.
        """
        key = path.encode(*LOSSLESS)
        row = bisect_left(self._paths, key, key=pa.BinaryScalar.as_py)
        if row == len(self._paths) or self._paths[row].as_py() != key:
            raise BadFile(path, "not in the shards")
        shard = int(self._shard[row])
        file = self._files[shard]
        begin_reading(f"{file}/{path}")
        try:
            data = self._read(shard, int(self._offset[row]), int(self._size[row]))
        except OSError as error:
            raise BadFile(path, f"{error.strerror or error} ({file.name})") from error
        if not self._verified[row]:
            if zlib.crc32(data) != self._crc[row]:
                raise BadFile(path, f"damaged in its shard ({file.name})")
            self._verified[row] = 1
        return Blob(f"{file}/{path}", data)

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        """So many bytes, fewer only at the end of the shard."""
        descriptor = self._descriptor(shard)
        data = os.pread(descriptor.number, size, offset)
        while len(data) < size:  # one call gives at most 2 GiB
            more = os.pread(descriptor.number, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def _open(self, shard: int) -> _Descriptor:
        return _Descriptor(os.open(self._files[shard], os.O_RDONLY))


class _Descriptor:
    """An open file, closed when its last user lets go: a thread may be reading what the cache has
    already dropped."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def _check_shard(name: str, file: Path, size: int) -> None:
    try:
        now = file.stat().st_size
    except OSError as error:
        raise DataMissing(
            f"{name}: the shard {file} cannot be used: {error.strerror}; copy it there again "
            f"({AGAIN}), or check vimnas.data.{name}.shards"
        ) from error
    if now != size:
        raise DataMissing(
            f"{name}: the shard {file} has {now:,} bytes and was written with {size:,}; copy it "
            f"there again ({AGAIN})"
        )
