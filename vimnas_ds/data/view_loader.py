"""A test split once, in order, every sample in all its views.

Process r of W takes the samples r, r + W, r + 2W, ...: none is padded and none is seen twice, so
sums over processes are sums over samples, whatever W is. A sample comes whole, with all its views,
or, if its file is unusable, not at all: then it is named in `skipped`.

Threads decode ahead, `batch + ahead` samples at most, which bounds the memory for decoded frames.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.bad import BadFile
from vimnas_ds.data.catalog import Sample
from vimnas_ds.data.images import read_image
from vimnas_ds.data.pipelines import Device, Graph, GraphError, Source
from vimnas_ds.data.prepare import Feed
from vimnas_ds.data.sampling import Cut, whole_picture
from vimnas_ds.data.view_decode import read_encoded_views, read_views
from vimnas_ds.data.view_graph import build_view_pipeline
from vimnas_ds.data.views import ViewPlan


@dataclass(frozen=True)
class ViewBatch:
    """x: float32 (B, V, 3, H, W) or (B, V, 3, T, H, W), normalised, clips first and crops inside,
    on the loader's device; labels and names: the B samples' class numbers and files."""

    x: Tensor
    labels: tuple[int, ...]
    names: tuple[str, ...]


class ViewLoader:
    """Iterates once per `iter` over this process's share of a split.

    Args:
        name: the dataset's key in `vimnas.data`.
        section: its recipe.
        samples: the split's files; the same list in every process.
        plan: the views.
        rank, world_size: this process.
        batch: samples (not views) per batch.
        device: where batches are made: "cpu", or a CUDA device.
        pool: threads that read and decode; shared, not shut down here.
        ahead: samples decoded beyond the batch in work.
        threads: DALI's own threads.

    Attributes:
        seen: samples asked for, and skipped: reasons by path, both of the latest iteration.

    Raises:
        ValueError: no samples, or no root.
    """

    def __init__(
        self,
        name: str,
        section: DatasetSection,
        samples: Sequence[Sample],
        plan: ViewPlan,
        rank: int,
        world_size: int,
        batch: int,
        device: torch.device,
        pool: Executor,
        ahead: int = 2,
        threads: int = 1,
    ) -> None:
        if section.root is None:
            raise ValueError(f"{name}: no data folder; set vimnas.data.{name}.root")
        if not samples:
            raise ValueError(f"{name}: the split has no samples")
        self.seen = 0
        self.skipped: dict[str, str] = {}
        self._root: Path = section.root
        self._section, self._plan = section, plan
        self._mine = samples[rank::world_size]
        self._batch, self._ahead, self._pool = batch, ahead, pool
        gpu = device.type == "cuda"
        self._source: Source = "image" if section.is_image else "nvdec" if gpu else "frames"
        self._safe: Source = "image" if section.is_image else "frames"
        kind: Device = "gpu" if gpu else "cpu"
        build, number = partial(build_view_pipeline, section, plan), device.index
        self._graphs = {
            source: Graph(partial(build, source, batch, kind, threads, number))
            for source in {self._source, self._safe}
        }

    def __iter__(self) -> Iterator[ViewBatch]:
        self.seen, self.skipped = 0, {}
        queue: deque[tuple[Sample, Future[Feed]]] = deque()
        waiting = deque(self._mine)
        try:
            while waiting or queue:
                while waiting and len(queue) < self._batch + self._ahead:
                    sample = waiting.popleft()
                    queue.append((sample, self._pool.submit(self._prepare, sample, False)))
                taken = [queue.popleft() for _ in range(min(self._batch, len(queue)))]
                found = self._usable(taken)
                x = self._run(found) if found else None
                self.seen += len(taken)
                if x is not None and found:
                    labels = tuple(sample.label for sample, _ in found)
                    yield ViewBatch(x, labels, tuple(sample.path for sample, _ in found))
        finally:
            for _, future in queue:
                future.cancel()

    def _usable(self, taken: Sequence[tuple[Sample, Future[Feed]]]) -> list[tuple[Sample, Feed]]:
        found = []
        for sample, future in taken:
            try:
                found.append((sample, future.result()))
            except BadFile as error:
                self.skipped[sample.path] = error.reason
        return found

    def _run(self, found: list[tuple[Sample, Feed]]) -> Tensor | None:
        """The batch. One that holds a file which is not for the GPU's decoder, or that DALI
        refuses, is decoded again without DALI; `found` loses what turns out to be unusable."""
        if self._source != "nvdec" or all("encoded" in feed for _, feed in found):
            try:
                return self._graphs[self._source].run([feed for _, feed in found])
            except GraphError:
                if self._source == "frames":
                    raise  # nothing is decoded there: another attempt would fail as well
        again = [(s, self._pool.submit(self._prepare, s, True)) for s, _ in found]
        found[:] = self._usable(again)
        return self._graphs[self._safe].run([feed for _, feed in found]) if found else None

    def _prepare(self, sample: Sample, safe: bool) -> Feed:
        """The graph's inputs; `safe` leaves nothing to DALI's decoders. Raises BadFile."""
        path, section, plan = self._root / sample.path, self._section, self._plan
        if section.is_image:
            image = read_image(path, verify=True, transcode=safe)
            return {"encoded": image.data, "places": plan.places(image.width, image.height)}
        assert section.frames is not None
        assert section.fps is not None
        times = partial(plan.times, frames=section.frames, fps=section.fps)
        if self._source == "nvdec" and not safe:
            clip = read_encoded_views(path, times)
            if clip is not None:
                places = plan.places(clip.width, clip.height)
                inputs = {"numbers": clip.numbers, "order": clip.order, "places": places}
                return {"encoded": clip.data, **inputs}
        frames, order = read_views(path, times, self._cut)
        places = plan.places(frames.shape[2], frames.shape[1])
        return {"frames": frames, "order": order, "places": places}

    def _cut(self, width: int, height: int) -> Cut:
        return whole_picture(width, height, self._section.test_resize)

    def close(self) -> None:
        """Frees DALI; may be called again."""
        for graph in self._graphs.values():
            graph.close()
