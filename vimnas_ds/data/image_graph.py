"""The training graph of images on the CPU, in three parts.

    DALI: decode the crop -> torch: resize it to (size, size) -> DALI: augment, normalise, erase

torch resizes 8-bit pixels in integers (the filter of DALI and Pillow, at most one grey level from
Pillow, the same bits on every processor) in a quarter of the time of DALI's float code. It leaves
planes, as video frames are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.pipelines import Feed, Graph, build_crop_pipeline, build_train_pipeline

CROP = ("encoded", "anchor", "extent")


class ImageGraph:
    """Takes the feeds of `build_train_pipeline`'s source "image"; used as a `Graph` is."""

    def __init__(self, section: DatasetSection, batch: int, threads: int) -> None:
        self._size = (section.size, section.size)
        self._crops = Graph(partial(build_crop_pipeline, batch, threads))
        self._rest = Graph(
            partial(build_train_pipeline, section, "frames", batch, "cpu", threads, None)
        )

    def build(self) -> None:
        """Both of DALI's pipelines; else the first batch does it."""
        self._crops.build()
        self._rest.build()

    def run(self, feeds: Sequence[Feed]) -> Tensor:
        """One batch, float32 (B, 3, H, W). Raises GraphError: DALI cannot process an input."""
        crops = self._crops.run_each([{name: feed[name] for name in CROP} for feed in feeds])
        others = [{name: feed[name] for name in feed if name not in CROP} for feed in feeds]
        return self._rest.run(
            [{**rest, "frames": self._resized(c)} for rest, c in zip(others, crops, strict=True)]
        )

    def _resized(self, crop: Tensor) -> NDArray[np.uint8]:
        """(h, w, 3) -> (3, size, size)"""
        planes = crop.permute(2, 0, 1)[None]
        resized = F.interpolate(planes, self._size, mode="bilinear", antialias=True)
        return np.ascontiguousarray(resized[0].numpy())

    def close(self) -> None:
        self._crops.close()
        self._rest.close()
