"""All randomness of one training sample, drawn before its file is opened.

`draw_sample` is a pure function of (seed, dataset, split, epoch, index) and of the recipe. It holds
the clip's start, the crop, the mirror, RandAugment's operations and the erased rectangle, so no
operator of the pipeline draws anything and nothing about the machine can change a sample.

Crop and erasing follow torchvision's RandomResizedCrop and RandomErasing: up to ten tries of a
rectangle of random area and log-uniform aspect ratio, then (crop only) a central one. The crop
needs the picture's size, so the draw keeps the ten tries and `SampleDraw.window` resolves them.

Clips are taken by *time*: frame i is what a player shows at start + i / fps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vimnas_ds.config import DatasetSection, RandAugmentSection
from vimnas_ds.data.order import Stream

TRIES = 10
ERASE_SCALE = (0.02, 0.33)
ERASE_RATIO = (0.3, 3.3)
#: RandAugment: operations of the suite, and bins of the magnitude scale 0..10 (see `augment`).
NUM_OPS = 14
NUM_BINS = 31


@dataclass(frozen=True)
class Window:
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


NOTHING = Window(0, 0, 0, 0)


@dataclass(frozen=True)
class Cut:
    """A part of a picture, and the height and width in pixels that it is scaled to."""

    window: Window
    height: int
    width: int


def whole_picture(width: int, height: int, shorter: int) -> Cut:
    """All of a picture of this size, its shorter side scaled to `shorter` pixels."""
    ratio = shorter / min(width, height)
    scaled = (max(shorter, round(side * ratio)) for side in (height, width))
    return Cut(Window(0, 0, height, width), *scaled)


@dataclass(frozen=True)
class Try:
    """One proposed rectangle: share of the area, width / height, and place in [0, 1)."""

    area: float
    ratio: float
    y: float
    x: float


@dataclass(frozen=True)
class SampleDraw:
    """One sample's randomness.

    Attributes:
        start: place of the clip in the video's slack, 0 first, 1 last.
        flip: mirror left and right.
        crops: the tries of the random resized crop.
        crop_ratio: the allowed width / height, for the fallback.
        ops, bins, signs: per RandAugment step, the operation, its strength and 1 to negate it.
        erase: what random erasing blanks in the (size, size) output; `NOTHING` when off.
    """

    start: float
    flip: bool
    crops: tuple[Try, ...]
    crop_ratio: tuple[float, float]
    ops: tuple[int, ...]
    bins: tuple[int, ...]
    signs: tuple[int, ...]
    erase: Window

    def window(self, width: int, height: int) -> Window:
        """The crop of a picture of this size in pixels; always inside and at least 1x1."""
        for t in self.crops:
            w = round(math.sqrt(width * height * t.area * t.ratio))
            h = round(math.sqrt(width * height * t.area / t.ratio))
            if 0 < w <= width and 0 < h <= height:
                return _place(t, h, w, height, width)
        low, high = self.crop_ratio
        w, h = width, height
        if width / height < low:
            h = max(1, round(width / low))
        elif width / height > high:
            w = max(1, round(height * high))
        return Window((height - h) // 2, (width - w) // 2, h, w)


def draw_sample(stream: Stream, epoch: int, index: int, section: DatasetSection) -> SampleDraw:
    """Draws everything random about sample `index` in `epoch` of a training stream.

    Each ingredient has its own place in the stream of numbers: switching one off (flip, erasing,
    RandAugment) leaves the others as they were.
    """
    rng = stream.generator("draw", epoch, index)
    u = rng.random(4 + 8 * TRIES).tolist()
    crop, erase = u[4 : 4 + 4 * TRIES], u[4 + 4 * TRIES :]
    ops, bins, signs = _draw_operations(rng, section.randaugment)
    erased = NOTHING
    if u[2] < section.random_erasing:
        erased = _erase_window(_tries(erase, ERASE_SCALE, ERASE_RATIO), section.size)
    return SampleDraw(
        start=u[0],
        flip=section.flip and u[1] < 0.5,
        crops=tuple(_tries(crop, section.crop_scale, section.crop_ratio)),
        crop_ratio=section.crop_ratio,
        ops=ops,
        bins=bins,
        signs=signs,
        erase=erased,
    )


def _tries(u: list[float], scale: tuple[float, float], ratio: tuple[float, float]) -> list[Try]:
    low, high = math.log(ratio[0]), math.log(ratio[1])
    return [
        Try(scale[0] + a * (scale[1] - scale[0]), math.exp(low + r * (high - low)), y, x)
        for a, r, y, x in zip(u[0::4], u[1::4], u[2::4], u[3::4], strict=True)
    ]


def _erase_window(tries: list[Try], size: int) -> Window:
    for t in tries:
        h = round(size * math.sqrt(t.area * t.ratio))
        w = round(size * math.sqrt(t.area / t.ratio))
        if 0 < h < size and 0 < w < size:
            return _place(t, h, w, size, size)
    return NOTHING


def _place(t: Try, h: int, w: int, height: int, width: int) -> Window:
    return Window(int(t.y * (height - h + 1)), int(t.x * (width - w + 1)), h, w)


def _draw_operations(
    rng: np.random.Generator, section: RandAugmentSection | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    if section is None:
        return (), (), ()
    ops = rng.integers(NUM_OPS, size=section.n)
    signs = rng.integers(2, size=section.n)
    levels = np.clip(section.m + section.std * rng.standard_normal(section.n), 0, 10)
    bins = np.rint(levels / 10 * (NUM_BINS - 1)).astype(int)
    return tuple(ops.tolist()), tuple(bins.tolist()), tuple(signs.tolist())


def frame_times(duration: float, frames: int, fps: float, start: float) -> NDArray[np.float64]:
    """Times in seconds, from the first frame on, of a clip of `frames` at `fps`: shape (T,).

    Args:
        duration: length of the video in seconds.
        start: place of the clip in what the video is longer than the clip, 0 to 1; 0.5 is the
            centred clip. A video shorter than the clip starts at 0 (and repeats its last frame).
    """
    slack = max(duration - frames / fps, 0.0)
    return start * slack + np.arange(frames) / fps
