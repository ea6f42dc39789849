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
from vimnas_ds.data.pipelines import (
    Device,
    Source,
    assemble,
    graph_input,
    normalised,
    whole_pictures,
)
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

    Inputs: `encoded` uint8 (n,), or `frames` uint8 (F, 3, h, w), shorter side resized; for video
    `order` int32 (clips, T) into the frames, and `numbers` int32 (F,) for nvdec; `places` float32
    (crops, 2).
    """

    @pipeline_def
    def graph() -> DataNode:
        x = whole_pictures(source, device)
        if source != "frames":
            x = fn.resize(x, resize_shorter=section.test_resize)
        if section.is_image:
            clips = [x]
        else:
            order = graph_input("order", 2, types.INT32)
            clips = [fn.sequence_rearrange(x, new_order=order[i]) for i in range(plan.clips)]
        places = graph_input("places", 2, types.FLOAT)
        views = [
            normalised(clip, section, crop=(places[i, 0], places[i, 1]))
            for clip in clips
            for i in range(plan.crops)
        ]
        return fn.stack(*views)

    return assemble(graph, batch, device, threads, device_id)
