"""A test video in 4 x 3 views: one open file / one pass a view.

    python scripts/bench_views.py                      (a minute)
    python scripts/bench_views.py --video FILE

CPU-seconds from the file to the normalised float views (64 frames at 15 fps, 224 x 224), by one
decoding thread and one of DALI's. Ours: `ViewLoader`. Baseline: `EvalLoader` once per view, which
opens, decodes and resizes for every clip and crop, as most video test code does. The pixels are
checked to be the same. Without --video: 10 s of moving noise, 340 x 256, 30 fps, H.264 with a key
frame every 250 frames, the form in which Kinetics is often kept.

Floor: 4 overlapping clips hold 256 frames of the file's 300, so every frame is decoded once and 211
to 256 are resized once, against 768 decoded (and as many before them up to each clip's start) and
768 resized; 12 x 64 crops are normalised on both sides.
"""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import torch
from bench_common import arguments, quartiles, ratio_line, start
from torch import Tensor

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.catalog import Sample
from vimnas_ds.data.loader import EvalLoader
from vimnas_ds.data.prepare import View
from vimnas_ds.data.view_loader import ViewLoader
from vimnas_ds.data.views import ViewPlan

CLIPS, CROPS, GOAL = 4, 3, 0.33
CPU = torch.device("cpu")


def make_video(path: Path) -> None:
    """Smooth noise that drifts."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (48, 60, 3), np.uint8)
    picture = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=30, options={"g": "250", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
        for i in range(300):
            top, left = round(60 + 60 * np.sin(i / 40)), round(70 + 65 * np.sin(i / 25))
            window = np.ascontiguousarray(picture[top : top + 256, left : left + 340])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(window, format="rgb24")))
        out.mux(stream.encode())


def sides(video: Path, pool: ThreadPoolExecutor) -> dict[str, Callable[[], Tensor]]:
    """Both give (1, views, 3, T, H, W)."""
    section = DatasetSection(
        root=video.parent, kind="video", num_classes=400, frames=64, fps=15, base_lr=1e-3,
        weight_decay=0,
    )  # fmt: skip
    samples = [Sample(video.name, 0)]
    ours = ViewLoader("bench", section, samples, ViewPlan(CLIPS, CROPS), 0, 1, 1, CPU, pool)
    theirs = [
        EvalLoader("bench", section, samples, 0, 1, 1, CPU, pool, View(clip, crop))
        for clip in np.linspace(0, 1, CLIPS)
        for crop in np.linspace(0, 1, CROPS)
    ]
    return {
        "one open file": lambda: next(batch.x for batch in ours),
        "one pass a view": lambda: torch.stack([next(b.x for b in one) for one in theirs], 1),
    }


def cpu_seconds(side: Callable[[], Tensor]) -> float:
    before = resource.getrusage(resource.RUSAGE_SELF)
    side()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, runs=9)
    parser.add_argument("--video", type=Path, metavar="FILE", help="default: a generated one")
    args = parser.parse_args(argv)
    if args.device != "cpu":
        print("this bench measures CPU time only")
        return 0
    place = start(args)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        video = args.video
        if video is None:
            video = Path(folder) / "video.mp4"
            make_video(video)
        both = sides(video, pool)
        views = [side() for side in both.values()]
        times: dict[str, list[float]] = {name: [] for name in both}
        order = list(both)
        for _ in range(place.runs):
            for name in order:
                times[name].append(cpu_seconds(both[name]))
            order.reverse()
    for name, values in times.items():
        low, middle, high = quartiles(values)
        print(f"  {name:<20} median {middle:.3f} CPU-s a video, quartiles {low:.3f} to {high:.3f}")
    same = torch.equal(*views)
    print(f"  {views[0].shape[1]} views, pixels {'equal' if same else 'differ'}")
    ours, theirs = (statistics.median(values) for values in times.values())
    print(ratio_line("views_4x3", ours / theirs, GOAL))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
