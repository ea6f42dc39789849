"""A video's timestamps in a few bytes: what the index keeps and frame numbers are looked up in.

    tick of frame i = first + d_0 + ... + d_{i-1}           seconds = tick * num / den

with d_i the gap to the next frame and the last d the last frame's duration. At a constant frame
rate all d are equal and only one is kept, so an hour costs as much as a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Timeline(NamedTuple):
    """Sorted presentation times; `deltas` holds int32 gaps, one for all if they are equal."""

    num: int
    den: int
    first: int
    frames: int
    deltas: bytes

    @classmethod
    def pack(cls, ticks: Sequence[int], end: int, base: Fraction) -> Timeline:
        """From sorted distinct ticks and the end of the last frame, in units of `base` seconds.

        Raises ValueError if a gap does not fit in 32 bits (days at the usual time bases).
        """
        gaps = np.diff(np.array([*ticks, max(end, ticks[-1])], np.int64))
        if len(gaps) and gaps.max() > np.iinfo(np.int32).max:
            raise ValueError("timestamps too far apart")
        if len(gaps) and (gaps == gaps[0]).all():
            gaps = gaps[:1]
        packed = gaps.astype(np.int32).tobytes()
        return cls(base.numerator, base.denominator, int(ticks[0]), len(ticks), packed)

    @property
    def gaps(self) -> NDArray[np.int64]:
        """All gaps in ticks, shape (frames,); the last one is the last frame's duration."""
        gaps = np.frombuffer(self.deltas, np.int32).astype(np.int64)
        return np.repeat(gaps, self.frames) if len(gaps) == 1 else gaps

    def ticks(self) -> NDArray[np.int64]:
        """Every frame's time in ticks, shape (frames,)."""
        return self.first + np.concatenate(([0], np.cumsum(self.gaps[:-1])))

    def seconds(self) -> NDArray[np.float64]:
        """Every frame's time in seconds, shape (frames,)."""
        return self.ticks().astype(np.float64) * (self.num / self.den)

    @property
    def duration(self) -> float:
        """From the first frame's time to the last one's end, in seconds."""
        return float(self.gaps.sum()) * (self.num / self.den)
