"""From a file to the arrays a graph is fed with; runs in the decoding threads, knows no torch.

`FilePreparer` knows one split's files and what the graph's source wants (encoded bytes, frames or
bytes and frame numbers). In `safe` mode it does the decoding itself, for the rare file that DALI
cannot read although it is sound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.catalog import Sample
from vimnas_ds.data.decode import read_clip
from vimnas_ds.data.encoded import read_encoded, read_indexed
from vimnas_ds.data.images import read_image
from vimnas_ds.data.sampling import Cut, SampleDraw, whole_picture

Feed = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class View:
    """Where an evaluation looks: clip start in the video's slack, and crop along the longer side.

    Both run from 0 to 1; 0.5 is the middle.
    """

    start: float = 0.5
    crop: float = 0.5


class FilePreparer:
    """Reads the files of one split.

    Args:
        name: the dataset, for messages.
        section: its recipe; `section.root` is the folder that the samples' paths start from.
        samples: the split.
        gpu: clips go to the GPU's decoder as encoded bytes.

    Raises:
        ValueError: no samples, or no root.
    """

    def __init__(
        self, name: str, section: DatasetSection, samples: Sequence[Sample], gpu: bool
    ) -> None:
        if section.root is None:
            raise ValueError(f"{name}: no data folder; set vimnas.data.{name}.root")
        if not samples:
            raise ValueError(f"{name}: the split has no samples")
        self.samples = samples
        self._root: Path = section.root
        self._section = section
        self._nvdec = gpu and not section.is_image
        self._verified = bytearray(len(samples))

    def train(self, index: int, draw: SampleDraw, safe: bool = False) -> Feed:
        """The training graph's inputs for sample `index`.

        Raises:
            BadFile: the file cannot be used.
        """
        section = self._section
        feed: Feed = {"flip": np.array(draw.flip, np.int32)}
        if section.randaugment is not None:
            feed["ops"] = np.array(draw.ops, np.int32)
            feed["bins"] = np.array(draw.bins, np.int32)
            feed["signs"] = np.array(draw.signs, np.int32)
        if section.random_erasing:
            feed["erase_anchor"] = np.array([draw.erase.top, draw.erase.left], np.float32)
            feed["erase_extent"] = np.array([draw.erase.height, draw.erase.width], np.float32)
        width, height = self._read(feed, index, draw.start, safe, draw)
        if "frames" not in feed:
            window = draw.window(width, height)
            feed["anchor"] = np.array([window.top, window.left], np.int32)
            feed["extent"] = np.array([window.height, window.width], np.int32)
        return feed

    def evaluate(self, index: int, view: View, safe: bool = False) -> Feed:
        """The evaluation graph's inputs for sample `index`.

        Raises:
            BadFile: the file cannot be used.
        """
        feed: Feed = {}
        width, height = self._read(feed, index, view.start, safe, None)
        place = (0.5, view.crop) if width >= height else (view.crop, 0.5)
        feed["place"] = np.array(place, np.float32)
        return feed

    def _read(
        self, feed: Feed, index: int, start: float, safe: bool, draw: SampleDraw | None
    ) -> tuple[int, int]:
        """Adds the pixels' inputs to `feed`; returns the picture's (width, height)."""
        section, path = self._section, self._root / self.samples[index].path
        if section.is_image:
            image = read_image(path, verify=not self._verified[index], transcode=safe)
            self._verified[index] = 1
            feed["encoded"] = image.data
            return image.width, image.height
        assert section.frames is not None
        assert section.fps is not None
        if self._nvdec and not safe:
            facts = self.samples[index].video
            clip = None
            if facts is not None:
                clip = read_indexed(path, facts, section.frames, section.fps, start)
            if clip is None:
                clip = read_encoded(path, section.frames, section.fps, start)
            if clip is not None:
                feed["encoded"], feed["numbers"] = clip.data, clip.numbers
                return clip.width, clip.height

        def cut(width: int, height: int) -> Cut:
            if draw is None:
                return whole_picture(width, height, section.test_resize)
            return Cut(draw.window(width, height), section.size, section.size)

        frames = read_clip(path, section.frames, section.fps, start, cut)
        feed["frames"] = frames
        return frames.shape[2], frames.shape[1]
