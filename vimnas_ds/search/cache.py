"""Evaluations that outlive their process: outcomes sample by sample, by candidate.

One file for a dataset's subset, FOLDER/DATASET-DIGEST.outcomes. The digest is of all that a result
depends on: weights, network, precision, kind of device, batch size, samples and how they are read.

    one line of JSON: {"names": [...], "left_out": {FILE: reason}}
    records of one size:  key 32 | loss float32 x N | flags uint8 x N | crc32 4

N samples; flags: 1 right, 2 among the five highest, 4 left out. Rank 0 appends a record as soon as
an evaluation is known; what a kill cuts off is dropped by the next reader.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vimnas_ds.config import ConfigError
from vimnas_ds.train.evaluate import Outcomes

FORMAT = 1
RIGHT, TOP5, LEFT_OUT = 1, 2, 4


def digest_of(value: Any) -> str:
    """A name for anything that JSON can hold."""
    return hashlib.sha256(json.dumps([FORMAT, value], sort_keys=True).encode()).hexdigest()


class OutcomeFile:
    """The outcomes of one subset, in memory and on disk.

    Args:
        path: where they are kept; None: in memory alone.
        names: the subset's files, in order.
        writes: this process appends what it is given (rank 0).

    Raises ConfigError when the file cannot be read or written.
    """

    def __init__(self, path: Path | None, names: Sequence[str], writes: bool):
        self._path, self._names, self._writes = path, tuple(names), writes
        self._records: dict[bytes, bytes] = {}
        self.left_out: dict[str, str] = {}
        if path is not None and path.exists():
            self._read(path)

    def __len__(self) -> int:
        return len(self._records)

    def keys(self) -> list[bytes]:
        return sorted(self._records)

    @property
    def _size(self) -> int:
        return 32 + 5 * len(self._names) + 4

    def _read(self, path: Path) -> None:
        try:
            head, _, body = path.read_bytes().partition(b"\n")
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        try:
            found = json.loads(head)
        except ValueError:
            found = None  # cut off within its first line: nothing follows
        if found is None or tuple(found["names"]) != self._names:
            if self._writes:
                path.unlink()
            return
        self.left_out = found["left_out"]
        whole = 0
        for begin in range(0, len(body) - self._size + 1, self._size):
            record = body[begin : begin + self._size]
            if zlib.crc32(record[:-4]).to_bytes(4, "little") != record[-4:]:
                break
            self._records[record[:32]] = record
            whole = begin + self._size
        if whole < len(body) and self._writes:  # appended records must start where readers look
            with path.open("r+b") as file:
                file.truncate(len(head) + 1 + whole)

    def get(self, key: str) -> Outcomes | None:
        record = self._records.get(hashlib.sha256(key.encode()).digest())
        if record is None:
            return None
        n = len(self._names)
        loss = np.frombuffer(record, np.float32, n, 32).astype(np.float64)
        flags = np.frombuffer(record, np.uint8, n, 32 + 4 * n)
        seen = flags & LEFT_OUT == 0

        def column(values: NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(values[seen].astype(np.float64))

        names = tuple(name for name, there in zip(self._names, seen, strict=True) if there)
        top1, top5 = column(flags & RIGHT != 0), column(flags & TOP5 != 0)
        return Outcomes(top1, top5, column(loss), names)

    def add(self, key: str, outcomes: Outcomes, left_out: Mapping[str, str]) -> None:
        """`left_out`: the subset's files that cannot be read, and why."""
        at = {name: i for i, name in enumerate(self._names)}
        places = [at[name] for name in outcomes.names]
        loss = np.zeros(len(self._names), np.float32)
        flags = np.full(len(self._names), LEFT_OUT, np.uint8)
        loss[places] = outcomes.loss.numpy()
        right, top5 = outcomes.top1.numpy() != 0, outcomes.top5.numpy() != 0
        flags[places] = RIGHT * right + TOP5 * top5
        digest = hashlib.sha256(key.encode()).digest()
        body = digest + loss.tobytes() + flags.tobytes()
        record = body + zlib.crc32(body).to_bytes(4, "little")
        if digest in self._records:
            return
        if not self._records:
            self.left_out = dict(left_out)
        self._records[digest] = record
        if self._path is not None and self._writes:
            self._append(self._path, record)

    def _append(self, path: Path, record: bytes) -> None:
        try:
            if len(self._records) == 1:
                path.parent.mkdir(parents=True, exist_ok=True)
                head = {"names": self._names, "left_out": self.left_out}
                record = json.dumps(head).encode() + b"\n" + record
            with path.open("ab" if len(self._records) > 1 else "wb") as file:
                file.write(record)
        except OSError as error:
            raise ConfigError(
                f"cannot write {path}: {error.strerror}; --cache names another folder, --no_cache "
                "keeps evaluations in memory only"
            ) from error
