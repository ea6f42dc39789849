"""Evaluations that outlive their process: outcomes sample by sample, by candidate.

One file for a dataset's subset, FOLDER/DATASET-DIGEST.outcomes. The digest is of all that a result
depends on: weights, network, precision, kind of device, batch size, torch, the files (size and time
of change) and how they are read.

    one line of JSON: the samples' names
    records of one size:  key 32 | loss float32 x N | flags uint8 x N | crc32 4

N samples; flags: 1 right, 2 among the five highest. Rank 0 reads the file for all ranks and appends
a record as soon as an evaluation is known; several searches may append to one file. What a kill cut
off is dropped. An evaluation that lost a file (a time limit, a disk) is not kept: the file may be
back the next time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vimnas_ds.config import ConfigError
from vimnas_ds.train.evaluate import Outcomes

#: Raised whenever the same file would give other pixels, or the same logits other outcomes.
FORMAT = 2
RIGHT, TOP5 = 1, 2
KEY = 32


def digest_of(value: Any) -> str:
    """A name for anything that JSON can hold."""
    return hashlib.sha256(json.dumps([FORMAT, value], sort_keys=True).encode()).hexdigest()


class OutcomeFile:
    """The outcomes of one subset, in memory and on disk.

    Args:
        names: the subset's files, in order.
        path: where they are kept (rank 0); None: in memory alone.

    Raises ConfigError when the file cannot be read or written.
    """

    def __init__(self, names: Sequence[str], path: Path | None = None):
        self._names, self._path = tuple(names), path
        self._head = json.dumps(self._names).encode() + b"\n"
        self._size = KEY + 5 * len(self._names) + 4
        self.records: dict[bytes, bytes] = {}
        self._partial: dict[bytes, Outcomes] = {}  # of those that lost a file
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("ab").close()  # whether it can be written shows now, not after an hour
                self._read(path.read_bytes())
            except OSError as error:
                raise self._refused(error) from error

    def _refused(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"cannot use {self._path}: {error.strerror}; --cache names another folder, --no_cache "
            "keeps evaluations in memory only"
        )

    def _read(self, content: bytes) -> None:
        if not content.startswith(self._head):
            return  # cut off within its first line: `_append` begins anew
        for begin in range(len(self._head), len(content) - self._size + 1, self._size):
            record = content[begin : begin + self._size]
            if zlib.crc32(record[:-4]).to_bytes(4, "little") == record[-4:]:
                self.records[record[:KEY]] = record

    def __contains__(self, key: str) -> bool:
        digest = _digest(key)
        return digest in self.records or digest in self._partial

    def get(self, key: str) -> Outcomes:
        """Raises KeyError if it is not there."""
        digest = _digest(key)
        if digest in self._partial:
            return self._partial[digest]
        record, n = self.records[digest], len(self._names)
        loss = np.frombuffer(record, np.float32, n, KEY)
        flags = np.frombuffer(record, np.uint8, n, KEY + 4 * n)
        top1, top5, loss64 = (
            torch.from_numpy(column.astype(np.float64))
            for column in (flags & RIGHT != 0, flags & TOP5 != 0, loss)
        )
        return Outcomes(top1, top5, loss64, self._names)

    def add(self, key: str, outcomes: Outcomes) -> None:
        digest = _digest(key)
        if outcomes.names != self._names:
            self._partial[digest] = outcomes
            return
        loss = outcomes.loss.numpy().astype(np.float32)
        right, top5 = outcomes.top1.numpy() != 0, outcomes.top5.numpy() != 0
        flags = (RIGHT * right + TOP5 * top5).astype(np.uint8)
        body = digest + loss.tobytes() + flags.tobytes()
        record = body + zlib.crc32(body).to_bytes(4, "little")
        self.records[digest] = record
        if self._path is not None:
            try:
                self._append(self._path, record)
            except OSError as error:
                raise self._refused(error) from error

    def _append(self, path: Path, record: bytes) -> None:
        """Behind the last whole record; one process at a time."""
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.read(len(self._head)) != self._head:
                file.seek(0)
                file.write(self._head)
            length = file.seek(0, 2) - len(self._head)
            file.seek(len(self._head) + length // self._size * self._size)
            file.truncate()
            file.write(record)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
