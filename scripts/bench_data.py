"""One training clip on the CPU, from file to normalised float tensor: this project against peers.

    python scripts/bench_data.py                    about 15 seconds

The script makes a 10 s H.264 video of 320x240 pixels at 30 fps. A clip is 64 frames at 15 fps from
a random start, cropped at random, 224x224. Ours is what the decoding threads and DALI do (`decode`,
`pipelines`): only frames that are needed are decoded; crop, resize and conversion are one pass.
Theirs is what video repositories do in their loaders: seek and decode with PyAV, convert the wanted
frames to RGB, then resize the shorter side to 256, crop and normalise as float tensors in torch.

The ratio is of CPU-seconds (all threads of the process) a clip; both sides use one thread.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from bench_common import arguments, quartiles, ratio_line, start
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.catalog import Sample
from vimnas_ds.data.order import Stream
from vimnas_ds.data.pipelines import MEAN, STD, Graph, build_train_pipeline
from vimnas_ds.data.prepare import FilePreparer
from vimnas_ds.data.sampling import draw_sample, frame_times

GOAL = 0.60
FRAMES, FPS, SIZE, SECONDS, RATE = 64, 15.0, 224, 10, 30


def write_video(path: Path) -> None:
    """A textured picture that moves across, with a little noise."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (60, 90, 3)).astype(np.uint8))
    wide = np.asarray(coarse.resize((960, 540), Image.Resampling.BICUBIC)).astype(np.int16)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for i in range(SECONDS * RATE):
            part = wide[i // 2 : i // 2 + 240, 2 * i : 2 * i + 320]
            noisy = part + rng.integers(-4, 5, part.shape)
            picture = np.clip(noisy, 0, 255).astype(np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())


def peers_clip(path: Path, place: float, y: float, x: float) -> Tensor:
    """(3, T, 224, 224): decoded from `place` of the slack on, cropped at (y, x) of what is left."""
    times = frame_times(SECONDS, FRAMES, FPS, place)
    pictures: list[np.ndarray] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        container.seek(int(times[0] / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            while len(pictures) < FRAMES and frame.time >= times[len(pictures)] - 1e-3:
                pictures.append(frame.to_ndarray(format="rgb24"))
            if len(pictures) == FRAMES:
                break
    pictures += pictures[-1:] * (FRAMES - len(pictures))
    clip = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()  # (T, 3, h, w)
    clip = F.interpolate(clip, size=(256, 341), mode="bilinear", align_corners=False)
    top, left = int(y * (256 - SIZE)), int(x * (341 - SIZE))
    clip = clip[:, :, top : top + SIZE, left : left + SIZE]
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((clip - mean) / std).transpose(0, 1).contiguous()


def main(argv: list[str] | None = None) -> int:
    args = arguments(__doc__).parse_args(argv)
    place = start(args)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_video(root / "a.mp4")
        recipe = DatasetSection(
            kind="video", root=root, num_classes=2, size=SIZE, frames=FRAMES, fps=FPS,
            base_lr=1e-3, weight_decay=0.0,
        )  # fmt: skip
        files = FilePreparer("bench", recipe, [Sample("a.mp4", 0)], gpu=False)
        graph = Graph(lambda: build_train_pipeline(recipe, "frames", 1))
        stream = Stream(0, "bench", "train")

        def ours(i: int) -> Tensor:
            return graph.run([files.train(0, draw_sample(stream, 0, i, recipe))])[0]

        def theirs(i: int) -> Tensor:
            draw = draw_sample(stream, 0, i, recipe)
            clip = peers_clip(root / "a.mp4", draw.start, draw.crops[0].y, draw.crops[0].x)
            return clip.flip(-1) if draw.flip else clip

        sides: dict[str, Callable[[int], Tensor]] = {
            "one pass + DALI": ours,
            "PyAV + torch": theirs,
        }
        costs: dict[str, list[float]] = {name: [] for name in sides}
        walls: dict[str, list[float]] = {name: [] for name in sides}
        order = list(sides)
        for i in range(place.runs + 2):
            for name in order:
                wall, cpu = time.perf_counter(), time.process_time()
                clip = sides[name](i)
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                assert clip.shape == (3, FRAMES, SIZE, SIZE)
                if i >= 2:  # the first two build graphs and warm caches
                    costs[name].append(cpu)
                    walls[name].append(wall)
            order.reverse()
    for name in sides:
        low, middle, high = quartiles(costs[name])
        rate = 1 / statistics.median(walls[name])
        print(
            f"  {name:<20} {middle:.4f} CPU-s a clip, quartiles {low:.4f} to {high:.4f}; "
            f"{rate:.1f} clips/s on one thread"
        )
    ratio = statistics.median(costs["one pass + DALI"]) / statistics.median(costs["PyAV + torch"])
    print(ratio_line("data_clip", ratio, GOAL))
    return 0


if __name__ == "__main__":
    sys.exit(main())
