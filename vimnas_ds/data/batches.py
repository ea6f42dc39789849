"""From prepared samples to a batch, with a second way for what DALI's decoders cannot read.

DALI's decoders are the fast way. A sound file that they cannot read (an odd JPEG, a codec that the
GPU lacks, a rotated video) must neither end the run nor be lost: Pillow or PyAV decode it and the
same graph does the rest. A clip known to be odd goes that way alone, its batch's others do not.
When DALI refuses what it was given it does not say why: halves are tried until the files are found.
So which way a file goes is a matter of that file alone, and a resumed run repeats it.

On a GPU everything happens on a stream of its own, so that batches made ahead in another thread
neither wait for the network nor hold it up; `hand_over` says who uses them next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.catalog import Sample
from vimnas_ds.data.image_graph import ImageGraph
from vimnas_ds.data.pipelines import (
    Device,
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


@dataclass(frozen=True)
class Made:
    """A batch of the samples that have a feed (None if there are none), the samples it was asked
    for, and the files that DALI's decoder refused."""

    batch: Batch | None
    ready: list[Ready]
    refused: tuple[str, ...] = ()


#: Samples of a batch: their places in it, and their pixels.
Part = tuple[list[int], Tensor]


def source_of(section: DatasetSection, device: torch.device) -> Source:
    """How this dataset's files are decoded for batches on `device`."""
    if section.is_image:
        return "image"
    return "nvdec" if device.type == "cuda" else "frames"


class Graphs:
    """The graph of a loader, and the one for samples that DALI's decoder cannot read."""

    def __init__(
        self,
        section: DatasetSection,
        source: Source,
        batch: int,
        device: torch.device,
        threads: int,
        train: bool,
    ) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._source: Source = source
        self._safe: Source = "image" if section.is_image else "frames"
        where: Device = "gpu" if device.type == "cuda" else "cpu"
        self._graphs: dict[Source, Graph | ImageGraph]
        if train and section.is_image and where == "cpu":
            self._graphs = {"image": ImageGraph(section, batch, threads)}
        else:
            build = build_train_pipeline if train else build_eval_pipeline
            self._graphs = {
                one: Graph(partial(build, section, one, batch, where, threads, device.index))
                for one in dict.fromkeys((self._source, self._safe))
            }

    def build(self) -> None:
        """Builds the loader's graph now instead of with the first batch."""
        self._graphs[self._source].build()

    def run(self, ready: Sequence[Ready], redo: Callable[[list[int]], list[Ready]]) -> Made:
        """The batch of the samples that have a feed, in their order.

        Args:
            redo: prepares the samples at these places again, without DALI's decoders.

        Raises:
            GraphError: DALI refuses even samples that it need not decode.
        """
        with self._own_stream():
            ready = list(ready)
            fast = [i for i, one in enumerate(ready) if one.feed and "encoded" in one.feed]
            parts, places = self._run_fast(ready, fast)
            refused = tuple(ready[place].sample.path for place in places)
            for place, one in zip(places, redo(places) if places else (), strict=True):
                ready[place] = one
            done = {place for places, _ in parts for place in places}
            slow = [i for i, one in enumerate(ready) if one.feed is not None and i not in done]
            if slow:
                parts.append((slow, self._run(self._safe, ready, slow)))
            if not parts:
                return Made(None, ready, refused)
            kept = sorted(place for places, _ in parts for place in places)
            x = parts[0][1] if len(parts) == 1 else _interleaved(parts)
            return Made(make_batch(x, [ready[i] for i in kept]), ready, refused)

    def _run_fast(self, ready: list[Ready], places: list[int]) -> tuple[list[Part], list[int]]:
        """What DALI's decoder makes of the samples at `places`, and which of them it refuses."""
        if not places:
            return [], []
        try:
            return [(places, self._run(self._source, ready, places))], []
        except GraphError:
            if len(places) == 1:
                return [], places
        half = len(places) // 2
        left, right = (self._run_fast(ready, part) for part in (places[:half], places[half:]))
        return left[0] + right[0], left[1] + right[1]

    def _run(self, source: Source, ready: list[Ready], places: list[int]) -> Tensor:
        feeds = (ready[i].feed for i in places)
        return self._graphs[source].run([feed for feed in feeds if feed is not None])

    def _own_stream(self) -> AbstractContextManager[object]:
        if self._device.type != "cuda":
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        return torch.cuda.stream(self._stream)

    def close(self) -> None:
        for graph in self._graphs.values():
            graph.close()


def _interleaved(parts: list[Part]) -> Tensor:
    """One batch from parts of it, each with its samples' places."""
    places = torch.tensor([place for of, _ in parts for place in of])
    x = torch.cat([part for _, part in parts])
    return x[places.argsort().to(x.device)]


def make_batch(x: Tensor, ready: list[Ready]) -> Batch:
    y = torch.tensor([one.sample.label for one in ready], dtype=torch.int64, device=x.device)
    if x.is_cuda:  # complete before another stream sees it
        torch.cuda.current_stream(x.device).synchronize()
    return Batch(x, y, tuple(one.sample.path for one in ready))


def hand_over(batch: Batch) -> Batch:
    """To be called by the thread that uses the batch: its memory then waits for that stream."""
    if batch.x.is_cuda:
        user = torch.cuda.current_stream(batch.x.device)
        batch.x.record_stream(user)
        batch.y.record_stream(user)
    return batch
