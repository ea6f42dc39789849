"""The DALI graphs: picked pixels in, a normalised float batch out; nothing random inside.

    train:  crop + resize to (size, size) -> RandAugment -> mirror + normalise -> erase
    eval:   resize the shorter side -> crop (size, size) -> normalise

One graph serves images, (B, 3, H, W), and clips, (B, 3, T, H, W). What differs is the source:

    image   encoded bytes, decoded by DALI (CPU: only the cropped part; GPU: hybrid decoder)
    frames  uint8 frames decoded, cropped and resized by PyAV (all codecs, also for a GPU graph);
            for training on images, the picture cropped and resized (see `image_graph`)
    nvdec   encoded video and frame numbers, decoded by the GPU

The mirror comes after RandAugment because it is free inside the normalisation; the signs of the
geometric operations are symmetric, so the distribution is the same.

A graph is fed by hand (`Graph.run`), one batch in, one batch out. DALI calls no Python code, so no
exception can be raised inside of it, and broken files are sorted out before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import nvidia.dali.fn as fn
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, pipeline_def, types
from nvidia.dali.backend import TensorListCPU, TensorListGPU
from nvidia.dali.data_node import DataNode
from torch import Tensor

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.augment import apply_operations

Source = Literal["image", "frames", "nvdec"]
Device = Literal["cpu", "gpu"]
Feed = Mapping[str, NDArray[np.generic]]

#: ImageNet's mean and standard deviation of R, G, B in 0..255.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


def build_train_pipeline(
    section: DatasetSection,
    source: Source,
    batch: int,
    device: Device = "cpu",
    threads: int = 1,
    device_id: int | None = None,
) -> Pipeline:
    """The training graph of a dataset for batches of at most `batch` samples.

    Inputs, one array per sample: `encoded` uint8 (n,) or `frames` uint8 (T, 3, size, size), of
    images (3, size, size); `numbers` int32 (T,) for nvdec; `anchor` and `extent` int32 (2,), the
    crop's (top, left) and (height, width), except for frames; `flip` int32 (); `ops`, `bins`,
    `signs` int32 (n,) if RandAugment is on; `erase_anchor` and `erase_extent` float32 (2,) if
    erasing is on.
    """
    augment = section.randaugment

    @pipeline_def(enable_conditionals=augment is not None)
    def graph() -> DataNode:
        x = _pixels(source, device, section.is_image)
        size = [section.size, section.size]
        if source == "nvdec":  # the decoder gives whole frames: crop and resize are one step
            top_left = fn.cast(graph_input("anchor", 1, types.INT32), dtype=types.FLOAT)
            extent = fn.cast(graph_input("extent", 1, types.INT32), dtype=types.FLOAT)
            x = fn.resize(x, size=size, roi_start=top_left, roi_end=top_left + extent)
        elif source == "image":
            x = fn.resize(x, size=size)
        if augment is not None:
            ops, bins, signs = (
                graph_input(name, 1, types.INT32) for name in ("ops", "bins", "signs")
            )
            if source == "frames":  # planes; it wants colours together
                x = fn.transpose(x, perm=[1, 2, 0] if section.is_image else [0, 2, 3, 1])
            x = apply_operations(x, ops, bins, signs, augment.n, section.size)
        x = normalised(x, section, mirror=graph_input("flip", 0, types.INT32))
        if section.random_erasing:
            x = fn.erase(
                x,
                anchor=graph_input("erase_anchor", 1, types.FLOAT),
                shape=graph_input("erase_extent", 1, types.FLOAT),
                axis_names="HW",
                fill_value=0,
            )
        return x

    return assemble(graph, batch, device, threads, device_id)


def build_eval_pipeline(
    section: DatasetSection,
    source: Source,
    batch: int,
    device: Device = "cpu",
    threads: int = 1,
    device_id: int | None = None,
) -> Pipeline:
    """The evaluation graph for batches of at most `batch` samples.

    Inputs: `encoded`, or `frames` whole and with the shorter side resized; `numbers` for nvdec; and
    `place` float32 (2,), where the crop lies in what is left in height and width (0.5: central).
    """

    @pipeline_def
    def graph() -> DataNode:
        x = whole_pictures(source, device)
        if source != "frames":
            x = fn.resize(x, resize_shorter=section.test_resize)
        place = graph_input("place", 1, types.FLOAT)
        return normalised(x, section, crop=(place[0], place[1]))

    return assemble(graph, batch, device, threads, device_id)


def graph_input(
    name: str, ndim: int, dtype: types.DALIDataType, layout: str | None = None
) -> DataNode:
    """What `Graph.run` is fed with under this name, one array a sample."""
    # no_copy: `Graph.run` holds the arrays until the batch is done
    return fn.external_source(name=name, ndim=ndim, dtype=dtype, layout=layout, no_copy=True)


def build_crop_pipeline(batch: int, threads: int = 1) -> Pipeline:
    """The crops of images as they are, uint8 HWC, on the CPU: `encoded`, `anchor`, `extent` in."""
    graph = pipeline_def(lambda: _crop("cpu"))
    return assemble(graph, batch, "cpu", threads, None)


def _pixels(source: Source, device: Device, is_image: bool) -> DataNode:
    """What training sees: cropped, except for nvdec; layouts as of `whole_pictures`, or CHW."""
    if source == "image":
        return _crop(device)
    if source == "frames" and is_image:
        return graph_input("frames", 3, types.UINT8, "CHW")
    return whole_pictures(source, device)


def _crop(device: Device) -> DataNode:
    return fn.decoders.image_slice(
        graph_input("encoded", 1, types.UINT8),
        graph_input("anchor", 1, types.INT32),
        graph_input("extent", 1, types.INT32),
        normalized_anchor=False,
        normalized_shape=False,
        axis_names="HW",
        device="mixed" if device == "gpu" else "cpu",
    )


def whole_pictures(source: Source, device: Device) -> DataNode:
    """HWC images, FHWC clips or, as they come from PyAV, FCHW clips."""
    if source == "frames":
        x = graph_input("frames", 4, types.UINT8, "FCHW")
        return x.gpu() if device == "gpu" else x
    encoded = graph_input("encoded", 1, types.UINT8)
    decoder = "mixed" if device == "gpu" else "cpu"
    if source == "image":
        return fn.decoders.image(encoded, device=decoder)
    numbers = graph_input("numbers", 1, types.INT32)
    return fn.decoders.video(encoded, frames=numbers, device=decoder, pad_mode="edge")


def normalised(
    x: DataNode,
    section: DatasetSection,
    mirror: DataNode | int = 0,
    crop: tuple[DataNode, DataNode] | None = None,
) -> DataNode:
    """Float CHW or CFHW; with `crop` = (y, x) places, cropped to (size, size) first."""
    layout = "CHW" if section.is_image else "CFHW"
    mean, std = list(MEAN), list(STD)
    if crop is None:
        return fn.crop_mirror_normalize(
            x, dtype=types.FLOAT, output_layout=layout, mean=mean, std=std, mirror=mirror
        )
    return fn.crop_mirror_normalize(
        x,
        dtype=types.FLOAT,
        output_layout=layout,
        mean=mean,
        std=std,
        crop=(section.size, section.size),
        crop_pos_y=crop[0],
        crop_pos_x=crop[1],
    )


def assemble(
    graph: Callable[..., Pipeline], batch: int, device: Device, threads: int, device_id: int | None
) -> Pipeline:
    """A `pipeline_def` function as a pipeline for `Graph`."""
    return graph(
        batch_size=batch,
        num_threads=threads,
        device_id=(device_id or 0) if device == "gpu" else None,
        prefetch_queue_depth=1,
        exec_dynamic=True,  # an output's memory is its own: the next run does not write there
    )


class GraphError(RuntimeError):
    """DALI refused a batch."""


class Graph:
    """A pipeline that is built by `build`, or when the first batch comes.

    `run` is synchronous. After a `GraphError` the object is still usable: the dead pipeline is
    thrown away and the next call builds a new one.
    """

    def __init__(self, make: Callable[[], Pipeline]) -> None:
        self._make = make
        self._pipeline: Pipeline | None = None

    def build(self) -> Pipeline:
        """The pipeline, ready to run: seconds the first time where RandAugment is on."""
        if self._pipeline is None:
            self._pipeline = self._make()
            self._pipeline.build()
        return self._pipeline

    def run(self, feeds: Sequence[Feed]) -> Tensor:
        """One batch, float32 (B, 3, H, W) or (B, 3, T, H, W), on the pipeline's device.

        Args:
            feeds: the samples' inputs by name, at most the pipeline's batch size.

        Raises:
            GraphError: DALI cannot process an input.
        """
        batch = torch.from_dlpack(self._output(feeds).as_tensor())
        if batch.is_cuda:  # DALI's memory is freed on DALI's stream, whoever still reads it
            batch = batch.clone()
            torch.cuda.current_stream(batch.device).synchronize()
        return batch

    def run_each(self, feeds: Sequence[Feed]) -> list[Tensor]:
        """The samples' outputs, of any sizes; for pipelines on the CPU. As `run` otherwise."""
        output = self._output(feeds)
        return [torch.from_dlpack(output[i]) for i in range(len(feeds))]

    def _output(self, feeds: Sequence[Feed]) -> TensorListCPU | TensorListGPU:
        pipeline = self.build()
        try:
            for name in feeds[0]:
                pipeline.feed_input(name, [feed[name] for feed in feeds])
            (output,) = pipeline.run()
        except (RuntimeError, ValueError, TypeError, IndexError) as error:  # DALI raises them all
            self.close()
            raise GraphError(str(error).strip()) from error
        return output

    def close(self) -> None:
        """Frees the pipeline and its threads."""
        self._pipeline = None
