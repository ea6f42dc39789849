"""From prepared samples to a batch, with a second way for what DALI refuses.

DALI's decoders are the fast way. A sound file that they cannot read (an odd JPEG, a codec that the
GPU lacks) must neither end the run nor be lost: its batch is prepared once more with the decoding
done by Pillow or PyAV, and the same graph does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.catalog import Sample
from vimnas_ds.data.pipelines import (
    Graph,
    GraphError,
    Source,
    build_eval_pipeline,
    build_train_pipeline,
)
from vimnas_ds.data.prepare import Feed


@dataclass(frozen=True)
class Batch:
    """x: float32 (B, 3, H, W) or (B, 3, T, H, W), normalised; y: int64 (B,); both on the loader's
    device. names: the files' paths relative to the dataset's root."""

    x: Tensor
    y: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True)
class Ready:
    """One prepared sample: None if no usable file was found; and what was wrong with others."""

    feed: Feed | None
    sample: Sample
    failures: dict[str, str]


class Graphs:
    """The graph of a loader, and the one that takes a batch DALI's decoder refused."""

    def __init__(
        self,
        section: DatasetSection,
        batch: int,
        device: torch.device,
        threads: int,
        train: bool,
    ) -> None:
        self.fallbacks = 0
        gpu = device.type == "cuda"
        build = build_train_pipeline if train else build_eval_pipeline
        self._source: Source = "image" if section.is_image else "nvdec" if gpu else "frames"
        self._safe: Source = "image" if section.is_image else "frames"
        self._graphs = {
            source: Graph(
                partial(
                    build, section, source, batch, "gpu" if gpu else "cpu", threads, device.index
                )
            )
            for source in dict.fromkeys((self._source, self._safe))
        }

    def run(self, ready: list[Ready], redo: Callable[[], list[Ready]]) -> Batch:
        """The batch; empty if `redo` leaves nothing.

        A batch that holds a file which is not for the GPU's decoder, or that DALI refuses, is
        prepared again by `redo` without DALI's decoders.
        """
        feeds = [one.feed for one in ready if one.feed is not None]
        if self._source != "nvdec" or all("encoded" in feed for feed in feeds):
            try:
                return make_batch(self._graphs[self._source].run(feeds), ready)
            except GraphError:
                if self._source == "frames":
                    raise  # nothing is decoded there: another attempt would fail as well
        self.fallbacks += 1
        ready = redo()
        feeds = [one.feed for one in ready if one.feed is not None]
        if not feeds:
            return make_batch(torch.empty(0), [])
        return make_batch(self._graphs[self._safe].run(feeds), ready)

    def close(self) -> None:
        for graph in self._graphs.values():
            graph.close()


def make_batch(x: Tensor, ready: list[Ready]) -> Batch:
    y = torch.tensor([one.sample.label for one in ready], dtype=torch.int64, device=x.device)
    return Batch(x, y, tuple(one.sample.path for one in ready))
