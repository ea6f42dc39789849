"""Where a test looks: clips in time, crops along the longer side of the picture.

A video of D seconds is longer than a clip of T frames at F per second by the slack
L = max(D - T/F, 0). Clip i of N starts at

    even     i L / (N - 1)                                 from the first frame to the last
    dense    L/2 + (i - (N-1)/2) min(S, L / (N-1))         S seconds apart, centred

and a single clip at L/2. Even views see the whole video whatever its length (the published 4 x 3
and 2 x 3 protocols); dense views see its middle, closely. Where S would leave the video the two
are the same. S is ours: a quarter of a clip unless given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Placement = Literal["even", "dense"]


@dataclass(frozen=True)
class ViewPlan:
    """The views of one sample: `clips` x `crops`, clips first.

    Args:
        clips, crops: how many of each (images have one clip).
        placement: "even" or "dense", see above.
        stride: seconds between the starts of dense clips; None: a quarter of a clip.

    Raises:
        ValueError: no clip or crop, an unknown placement, a stride that is not positive or that
            goes with even views.
    """

    clips: int = 1
    crops: int = 1
    placement: Placement = "even"
    stride: float | None = None

    def __post_init__(self) -> None:
        if self.clips < 1 or self.crops < 1:
            raise ValueError(f"{self.clips} clips x {self.crops} crops: at least one of each")
        if self.placement not in get_args(Placement):
            raise ValueError(f"views are placed {get_args(Placement)}, not {self.placement!r}")
        if self.stride is not None and self.placement != "dense":
            raise ValueError("a stride is for dense views: even ones follow the video's length")
        if self.stride is not None and not 0 < self.stride < float("inf"):
            raise ValueError(f"a stride of {self.stride} s is not positive")

    def __len__(self) -> int:
        return self.clips * self.crops

    def describe(self) -> str:
        """In words: "4 x 3 even views", "1 central view"."""
        if len(self) == 1:
            return "1 central view"
        return f"{self.clips} x {self.crops} {self.placement} views"

    def times(self, duration: float, frames: int, fps: float) -> NDArray[np.float64]:
        """Seconds from the first frame on at which the clips look: shape (clips, frames).

        A video shorter than a clip starts at 0 (and repeats its last frame), as in training.
        """
        slack = max(duration - frames / fps, 0.0)
        return self._starts(slack, frames / fps)[:, None] + np.arange(frames) / fps

    def _starts(self, slack: float, clip: float) -> NDArray[np.float64]:
        if self.clips == 1:
            return np.array([slack / 2])
        numbers = np.arange(self.clips, dtype=np.float64)
        if self.placement == "even":
            return numbers / (self.clips - 1) * slack
        step = min(self.stride or clip / 4, slack / (self.clips - 1))
        starts: NDArray[np.float64] = slack / 2 + (numbers - (self.clips - 1) / 2) * step
        return starts.clip(0, slack)  # rounding

    def places(self, width: int, height: int) -> NDArray[np.float32]:
        """The crops' (y, x) in what is left over of height and width, 0 to 1: (crops, 2).

        They spread along the longer side from end to end; a single one is central.
        """
        along = np.linspace(0, 1, self.crops) if self.crops > 1 else np.array([0.5])
        places = np.full((self.crops, 2), 0.5, np.float32)
        places[:, 1 if width >= height else 0] = along
        return places
