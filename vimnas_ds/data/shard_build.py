"""Writes a dataset's usable files as tar shards (see `shards`): parallel reading, resumable.

Sizes are known from the index, so that it is decided before anything is written which file lies
where and how long every shard will be. A shard appears whole or not at all; a killed run's
successor keeps those that have their length and writes the others, byte for byte as if nothing had
happened. Checksums of finished shards wait in `.parts/` until members.parquet holds them.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import tarfile
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from vimnas_ds.config import DataSection
from vimnas_ds.data.bad import DataMissing
from vimnas_ds.data.catalog import Catalog, scan_dataset
from vimnas_ds.data.index import index_path, open_index
from vimnas_ds.data.index_build import locked
from vimnas_ds.data.index_file import listed, read_rows, stored
from vimnas_ds.data.listing import LOSSLESS
from vimnas_ds.data.probe import USABLE, Verdict
from vimnas_ds.data.shards import (
    INDEX,
    MEMBERS,
    SCHEMA,
    About,
    read_members,
    shard_name,
    write_members,
)
from vimnas_ds.durable import flush

#: What a folder of shards consists of.
OURS = re.compile(r"\w+-\d{6}\.tar|members\.parquet|index\.parquet")
PARTS = ".parts"
#: Files read ahead, and threads that read them: network file systems answer many at once.
AHEAD, READERS = 32, 8

Checksums = NDArray[np.uint32]


class Member(NamedTuple):
    """A usable file and where its data begin: bytes from the start of its shard."""

    path: str
    size: int
    offset: int


@dataclass(frozen=True)
class Plan:
    """The members of every shard, the shards' sizes in bytes, and a digest of all that goes in."""

    shards: list[list[Member]]
    sizes: list[int]
    digest: str


@dataclass(frozen=True)
class Written:
    """Finished shards.

    Attributes:
        files, bytes: of the dataset, without the tars' own.
        shards: how many there are; kept: how many of them were there already.
        left_out: files on the disk that are unusable; missing: listed ones that are not there.
        copied: files copied by this run, in so many `seconds`.
    """

    files: int
    bytes: int
    shards: int
    kept: int
    left_out: int
    missing: int
    copied: int
    seconds: float


def build_shards(
    name: str,
    section: DataSection,
    out: Path,
    shard_bytes: int,
    overwrite: bool = False,
    show: bool = True,
) -> Written:
    """Writes the dataset `name` of `section` into the folder `out`; its index is built if missing.

    Args:
        shard_bytes: a shard is as long at most, unless it holds a single file.
        overwrite: delete shards that are there.
        show: a progress bar on stderr.

    Raises:
        DataMissing: no data, a file that has changed since it was indexed, or a folder that is
            full, cannot be written or holds something else.
        BadAnnotations, UnfitIndex: as `scan_dataset` and `open_index`.
    """
    started = time.monotonic()
    dataset = section.datasets[name]
    catalog = scan_dataset(name, dataset)
    open_index(name, catalog, section)
    index = index_path(section, name)
    verdicts = {row.path: row.verdict for row in read_rows(index)}
    plan = plan_shards(catalog, verdicts, shard_bytes)
    files = [out / shard_name(name, i) for i in range(len(plan.shards))]
    try:
        out.mkdir(parents=True, exist_ok=True)
        _check_own(name, out)
        with locked(out / ".make_shards", "choose another folder with --out"):
            _claim(name, out, plan, overwrite)
            (out / PARTS).mkdir(exist_ok=True)
            (out / PARTS / "plan").write_text(plan.digest)
            shutil.copyfile(index, out / PARTS / INDEX)
            checksums = _finished(out, files, plan)
            kept, copied = len(checksums), _count(plan, checksums)
            _check_space(name, out, plan, checksums)
            bar = tqdm(
                desc=f"shards {name}",
                total=sum(map(len, plan.shards)),
                initial=sum(map(len, plan.shards)) - copied,
                unit="file",
                disable=not show or not copied,
                mininterval=0.5,
                dynamic_ncols=True,
            )
            with bar, ThreadPoolExecutor(READERS) as pool:
                for i, members in enumerate(plan.shards):
                    if i not in checksums:
                        data = _read_ahead(pool, name, catalog.root, members)
                        checksums[i] = _write_shard(out, i, files[i], members, data, bar)
            names = list(catalog.class_names)
            about = About(name, dataset.kind, dataset.layout, names, plan.sizes, plan.digest)
            write_members(out, about, _table(catalog, plan, checksums))
            (out / PARTS / INDEX).replace(out / INDEX)
            shutil.rmtree(out / PARTS)
    except OSError as error:
        raise DataMissing(
            f"{name}: cannot write in {error.filename or out}: {error.strerror}; make room there "
            "or choose another folder with --out, the same command goes on from here"
        ) from error
    usable = sum(map(len, plan.shards))
    return Written(
        files=usable,
        bytes=sum(member.size for members in plan.shards for member in members),
        shards=len(files),
        kept=kept,
        left_out=len(catalog.train) + len(catalog.test) - usable,
        missing=catalog.missing,
        copied=copied,
        seconds=time.monotonic() - started,
    )


def plan_shards(catalog: Catalog, verdicts: dict[str, Verdict], shard_bytes: int) -> Plan:
    """Puts the usable files of a catalog in its order into shards.

    Args:
        verdicts: the index's, by stored path.
    """
    shards: list[list[Member]] = []
    sizes: list[int] = []
    digest = hashlib.sha256(repr((catalog.class_names, shard_bytes)).encode())
    end = 0
    for split, sample, there in listed(catalog):
        verdict = verdicts[stored(sample.path)]
        facts = (split, sample.label, catalog.video_ids.get(sample.path), there, verdict.state)
        digest.update(repr((sample.path, *facts, verdict.size, verdict.mtime)).encode())
        if verdict.state != USABLE:
            continue
        head = len(_header(sample.path, verdict.size))
        if not shards or _closed(end + head + _padded(verdict.size)) > shard_bytes:
            end = 0
            shards.append([])
            sizes.append(0)
        shards[-1].append(Member(sample.path, verdict.size, end + head))
        end += head + _padded(verdict.size)
        sizes[-1] = _closed(end)
    return Plan(shards, sizes, digest.hexdigest())


def _header(path: str, size: int) -> bytes:
    """A member's POSIX header: nothing in it depends on when and by whom it is written."""
    info = tarfile.TarInfo(path)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT, *LOSSLESS)


def _padded(size: int, block: int = tarfile.BLOCKSIZE) -> int:
    return -(-size // block) * block


def _closed(end: int) -> int:
    """The length of a tar whose members end there: two empty blocks, then full records."""
    return _padded(end + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)


def _visible(out: Path) -> list[str]:
    return sorted(file.name for file in out.iterdir() if not file.name.startswith("."))


def _check_own(name: str, out: Path) -> None:
    """Raises DataMissing if the folder is not one of shards; nothing is written into it."""
    foreign = [file for file in _visible(out) if not OURS.fullmatch(file)]
    if foreign:
        raise DataMissing(
            f"{name}: {out} holds other files too (first: {foreign[0]}); give the shards a folder "
            "of their own with --out"
        )


def _claim(name: str, out: Path, plan: Plan, overwrite: bool) -> None:
    """Raises DataMissing unless the folder is empty or these shards' own."""
    names = _visible(out)
    if overwrite:
        for file in sorted(names, key=lambda file: file != INDEX):  # it first: no longer finished
            (out / file).unlink()
        shutil.rmtree(out / PARTS, ignore_errors=True)
    elif names and _digest(out) != plan.digest:
        raise DataMissing(
            f"{name}: {out} holds shards of other data, of other settings or of files that have "
            "changed since; choose another folder with --out, or replace them with --overwrite"
        )


def _digest(out: Path) -> str | None:
    """What the folder's shards follow: begun ones, else finished ones."""
    begun = out / PARTS / "plan"
    if begun.is_file():
        return begun.read_text()
    return read_members(out)[0].plan if (out / MEMBERS).is_file() else None


def _finished(out: Path, files: Sequence[Path], plan: Plan) -> dict[int, Checksums]:
    """The checksums of the shards that have their length, by number."""
    known: dict[int, Checksums] = {}
    if (out / MEMBERS).is_file():
        flat = read_members(out)[1]["crc"].drop_null().to_numpy()
        ends = itertools.accumulate(map(len, plan.shards))
        known = dict(enumerate(np.split(flat, list(ends)[:-1])))
    finished = {}
    for i, (file, size) in enumerate(zip(files, plan.sizes, strict=True)):
        if file.is_file() and file.stat().st_size == size:
            checksums = _read_part(_part(out, i), len(plan.shards[i]))
            if checksums is None:
                checksums = known.get(i)
            if checksums is not None:
                finished[i] = checksums
    return finished


def _read_part(part: Path, members: int) -> Checksums | None:
    """None where it is not there, or was cut short by a power cut."""
    if not part.is_file():
        return None
    data = part.read_bytes()
    return np.frombuffer(data, np.uint32) if len(data) == 4 * members else None


def _part(out: Path, number: int) -> Path:
    return out / PARTS / f"{number:06d}.crc"


def _count(plan: Plan, finished: dict[int, Checksums]) -> int:
    return sum(len(members) for i, members in enumerate(plan.shards) if i not in finished)


def _check_space(name: str, out: Path, plan: Plan, finished: dict[int, Checksums]) -> None:
    wanted = sum(size for i, size in enumerate(plan.sizes) if i not in finished)
    free = shutil.disk_usage(out).free
    if wanted > free:
        raise DataMissing(
            f"{name}: the shards still need {wanted / 1e9:,.1f} GB, {out} has {free / 1e9:,.1f} GB "
            "free; make room there or choose another folder with --out"
        )


def _write_shard(
    out: Path, number: int, file: Path, members: Sequence[Member], data: Iterator[bytes], bar: tqdm
) -> Checksums:
    """Writes one shard, atomically, its checksums before it."""
    checksums = np.empty(len(members), np.uint32)
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as tar:
            for i, (member, content) in enumerate(zip(members, data, strict=True)):
                tar.write(_header(member.path, member.size))
                tar.write(content)
                tar.write(bytes(_padded(member.size) - member.size))
                checksums[i] = zlib.crc32(content)
                bar.update()
            tar.write(bytes(_closed(tar.tell()) - tar.tell()))
            tar.flush()
            os.fsync(tar.fileno())
        part = _part(out, number)
        part.write_bytes(checksums.tobytes())
        flush(part)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return checksums


def _read_ahead(
    pool: ThreadPoolExecutor, name: str, root: Path, members: Sequence[Member]
) -> Iterator[bytes]:
    """The members' data in their order."""
    queue: deque[Future[bytes]] = deque()
    try:
        for member in members:
            queue.append(pool.submit(_read, name, root, member))
            if len(queue) == AHEAD:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        for future in queue:
            future.cancel()


def _read(name: str, root: Path, member: Member) -> bytes:
    """Raises DataMissing for a file that is not as the index has it."""
    try:
        data = (root / member.path).read_bytes()
        reason = None if len(data) == member.size else "its size has changed"
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise DataMissing(
            f"{name}: {root / member.path} was usable when it was indexed: {reason}; the same "
            "command goes on from here, after scripts/index_data.py --update if the file stays so"
        )
    return data


def _table(catalog: Catalog, plan: Plan, checksums: dict[int, Checksums]) -> pa.Table:
    """members.parquet: everything the catalog names, in its order."""
    places = {
        member.path: (i, member.offset, member.size, int(crc))
        for i, members in enumerate(plan.shards)
        for member, crc in zip(members, checksums[i], strict=True)
    }
    nowhere = (None, None, None, None)
    rows = [
        (
            sample.path.encode(*LOSSLESS),
            split,
            sample.label,
            catalog.video_ids.get(sample.path),
            there,
            *places.get(sample.path, nowhere),
        )
        for split, sample, there in listed(catalog)
    ]
    columns = zip(*rows, strict=True)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)
