"""The endless stream of a split: position p shows sample permutation_(p // N)[p mod N].

A position is a pure function of (seed, dataset, split, N, p). Neither the number of processes nor
the number of threads appears in it, so a run that is stopped, resumed, or moved to another machine
reads the same samples in the same order.

Every random number of the data path comes from Philox, a counter-based generator. Its key is the
SHA-256 of the words that name the stream, and its counter is (epoch, index): no state is kept.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Stream:
    """The name of one stream of samples: (seed, dataset, split)."""

    seed: int
    dataset: str
    split: str

    def generator(self, purpose: str, epoch: int, index: int = 0) -> np.random.Generator:
        """The generator of `purpose` ("order", "draw") at this place of the stream."""
        key = _key(self.seed, self.dataset, self.split, purpose)
        counter = np.array([0, 0, index, epoch], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))


@lru_cache(maxsize=256)
def _key(seed: int, dataset: str, split: str, purpose: str) -> int:
    words = f"{seed}\n{dataset}\n{split}\n{purpose}".encode()
    return int.from_bytes(hashlib.sha256(words).digest()[:16], "little")


def locate(stream: Stream, count: int, position: int) -> tuple[int, int]:
    """(epoch, index into the split's `count` samples) of a position of the stream.

    Raises:
        ValueError: an empty split or a negative position.
    """
    if count < 1:
        raise ValueError(f"{stream.dataset}/{stream.split} has no samples")
    if position < 0:
        raise ValueError(f"position {position} is negative")
    epoch = position // count
    return epoch, int(_permutation(stream, count, epoch)[position % count])


@lru_cache(maxsize=16)  # a batch may straddle two epochs of each of several streams
def _permutation(stream: Stream, count: int, epoch: int) -> NDArray[np.int32]:
    return stream.generator("order", epoch).permutation(np.arange(count, dtype=np.int32))
