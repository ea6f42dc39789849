"""The DALI graph of a test with several views: frames decoded and resized once, cropped per view.

    source -> resize the shorter side -> per clip: its frames -> per crop: crop + normalise -> stack

Resizing, normalisation and crop are `pipelines.build_eval_pipeline`'s, so one central view is
bit for bit what evaluation during training sees. See there for the sources.
"""

from __future__ import annotations

import nvidia.dali.fn as fn
from nvidia.dali import Pipeline, pipeline_def, types
from nvidia.dali.data_node import DataNode

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.pipelines import MEAN, STD, Device, Source
from vimnas_ds.data.views import ViewPlan


def build_view_pipeline(
    section: DatasetSection,
    plan: ViewPlan,
    source: Source,
    batch: int,
    device: Device = "cpu",
    threads: int = 1,
    device_id: int | None = None,
) -> Pipeline:
    """The graph for at most `batch` samples; its output is (B, V, 3, H, W) for images and
    (B, V, 3, T, H, W) for clips, V = clips x crops.

    Inputs: `encoded` uint8 (n,), or `frames` uint8 (F, h, w, 3), shorter side resized; for video
    `order` int32 (clips, T) into the frames, and `numbers` int32 (F,) for nvdec; `places` float32
    (crops, 2).
    """

    @pipeline_def(
        batch_size=batch,
        num_threads=threads,
        device_id=(device_id or 0) if device == "gpu" else None,
        prefetch_queue_depth=1,
        exec_dynamic=device == "gpu",
    )
    def graph() -> DataNode:
        x = _decoded(source, device)
        if source != "frames":
            x = fn.resize(x, resize_shorter=section.test_resize)
        if section.is_image:
            clips = [x]
        else:
            order = _input("order", 2, types.INT32)
            clips = [fn.sequence_rearrange(x, new_order=order[i]) for i in range(plan.clips)]
        places = _input("places", 2, types.FLOAT)
        views = [
            fn.crop_mirror_normalize(
                clip,
                dtype=types.FLOAT,
                output_layout="CHW" if section.is_image else "CFHW",
                mean=list(MEAN),
                std=list(STD),
                crop=(section.size, section.size),
                crop_pos_y=places[i, 0],
                crop_pos_x=places[i, 1],
            )
            for clip in clips
            for i in range(plan.crops)
        ]
        return fn.stack(*views)

    return graph()


def _input(name: str, ndim: int, dtype: types.DALIDataType, layout: str | None = None) -> DataNode:
    # no_copy: `Graph.run` holds the arrays until the batch is done
    return fn.external_source(name=name, ndim=ndim, dtype=dtype, layout=layout, no_copy=True)


def _decoded(source: Source, device: Device) -> DataNode:
    """HWC images, or the distinct frames of videos, FHWC."""
    if source == "frames":
        x = _input("frames", 4, types.UINT8, "FHWC")
        return x.gpu() if device == "gpu" else x
    encoded = _input("encoded", 1, types.UINT8)
    decoder = "mixed" if device == "gpu" else "cpu"
    if source == "image":
        return fn.decoders.image(encoded, device=decoder)
    numbers = _input("numbers", 1, types.INT32)
    return fn.decoders.video(encoded, frames=numbers, device=decoder, pad_mode="edge")
