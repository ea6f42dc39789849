"""Training samples on the CPU, from file to normalised float tensor: this project against peers.

    python scripts/bench_loader.py                  clips: about 15 seconds
    python scripts/bench_loader.py --images         images: about 15 seconds

Clips: 64 frames at 15 fps from a random start of a generated 10 s H.264 video, 320x240 at 30 fps,
to 3 x 64 x 224 x 224. Baseline: what video repositories do in their loaders: seek and decode with
PyAV, convert the wanted frames to RGB, then as float tensors in torch resize the shorter side to
256, crop and normalise. Beside it, for comparison, a baseline that crops (our window) before it
resizes, and ours with RandAugment.

Images: batches of 16 generated JPEGs with sides of 500 and 375 pixels, about 55 KB each. Baseline:
torchvision's RandomResizedCrop(224), RandomHorizontalFlip, ToTensor, Normalize on Pillow's picture,
and `torch.stack`. Ours walks through a file's data the first time it is used: timed is the second
epoch and later ones, and the first is printed.

Ours is `TrainLoader` with one decoding thread and one of DALI's; the baseline has one thread. The
ratio is of CPU-seconds, all threads of the process counted. Both modes print how many files
`scripts/index_data.py` probes in a second of one processor.
"""

from __future__ import annotations

import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from bench_common import arguments, interleave_cpu, ratio_line, start
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.catalog import Sample
from vimnas_ds.data.loader import TrainLoader
from vimnas_ds.data.order import Stream, locate
from vimnas_ds.data.pipelines import MEAN, STD
from vimnas_ds.data.probe import USABLE, probe_file
from vimnas_ds.data.sampling import SampleDraw, draw_sample, frame_times

CLIP_GOAL, IMAGE_GOAL = 0.40, 0.60
SIZE, SEED = 224, 0
FRAMES, FPS, SECONDS, RATE, WIDTH, HEIGHT = 64, 15.0, 10, 30, 320, 240
IMAGES, BATCH = 64, 16


def write_video(path: Path) -> None:
    """A textured picture that moves across, with a little noise."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (60, 90, 3)).astype(np.uint8))
    wide = np.asarray(coarse.resize((960, 540), Image.Resampling.BICUBIC)).astype(np.int16)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(SECONDS * RATE):
            part = wide[i // 2 : i // 2 + HEIGHT, 2 * i : 2 * i + WIDTH]
            noisy = part + rng.integers(-4, 5, part.shape)
            picture = np.clip(noisy, 0, 255).astype(np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())


def write_image(path: Path, seed: int) -> None:
    """Noise at four scales, the coarser the stronger: about as many bytes as a photograph."""
    rng = np.random.default_rng(seed)
    width, height = (500, 375) if seed % 2 else (375, 500)
    picture = np.full((height, width, 3), 128.0)
    for cells, contrast in ((8, 45), (32, 27), (128, 13), (400, 5)):
        noise = rng.normal(0, contrast, (3, height * cells // 500, width * cells // 500))
        for channel, plane in enumerate(noise.astype(np.float32)):
            whole = Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC)
            picture[..., channel] += np.asarray(whole)
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def section(root: Path, **recipe: Any) -> DatasetSection:
    return DatasetSection(
        root=root, num_classes=2, size=SIZE, base_lr=1e-3, weight_decay=0.0, **recipe
    )


def loader(
    recipe: DatasetSection, samples: list[Sample], batch: int, pool: ThreadPoolExecutor
) -> TrainLoader:
    """Nothing ahead of time: a call of `next` pays for the whole batch."""
    cpu = torch.device("cpu")
    return TrainLoader("bench", recipe, samples, "train", SEED, batch, 0, 1, cpu, pool, prefetch=0)


def peers_clip(path: Path, draw: SampleDraw, crop_first: bool) -> Tensor:
    """(1, 3, T, 224, 224); the crop is a window of the picture resized, or resized itself."""
    times = frame_times(SECONDS, FRAMES, FPS, draw.start)
    pictures: list[np.ndarray] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        container.seek(int(times[0] / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if len(pictures) < FRAMES and frame.time >= times[len(pictures)] - 1e-3:
                picture = frame.to_ndarray(format="rgb24")
            while len(pictures) < FRAMES and frame.time >= times[len(pictures)] - 1e-3:
                pictures.append(picture)
            if len(pictures) == FRAMES:
                break
    pictures += pictures[-1:] * (FRAMES - len(pictures))
    clip = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)  # (T, 3, h, w)
    if crop_first:
        w = draw.window(WIDTH, HEIGHT)
        clip = clip[:, :, w.top : w.top + w.height, w.left : w.left + w.width].float()
        clip = F.interpolate(clip, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    else:
        clip = F.interpolate(clip.float(), size=(256, 341), mode="bilinear", align_corners=False)
        top, left = int(draw.crops[0].y * (256 - SIZE)), int(draw.crops[0].x * (341 - SIZE))
        clip = clip[:, :, top : top + SIZE, left : left + SIZE]
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    clip = ((clip - mean) / std).transpose(0, 1).contiguous()[None]
    return clip.flip(-1) if draw.flip else clip


def bench_clips(root: Path, runs: int, pool: ThreadPoolExecutor) -> float:
    video = root / "a.mp4"
    write_video(video)
    recipe = section(root, kind="video", frames=FRAMES, fps=FPS)
    augmented = section(root, kind="video", frames=FRAMES, fps=FPS, randaugment={})
    samples = [Sample(video.name, 0)]
    ours, rich = (loader(one, samples, 1, pool) for one in (recipe, augmented))
    stream = Stream(SEED, "bench", "train")

    def theirs(i: int, crop_first: bool = False) -> Tensor:
        return peers_clip(video, draw_sample(stream, *locate(stream, 1, i), recipe), crop_first)

    costs = interleave_cpu(
        {
            "ours": lambda i: ours.next().x,
            "ours with RandAugment": lambda i: rich.next().x,
            "PyAV + torch": theirs,
            "PyAV + torch, crop before resize": lambda i: theirs(i, crop_first=True),
        },
        runs,
        "a clip",
    )
    print_index_rate([video] * 10, is_image=False)
    plain, rich_cost, baseline, crop_first_cost = costs.values()
    print(
        f"  ours / baseline that crops first {plain / crop_first_cost:.3f}; "
        f"ours with RandAugment / baseline without {rich_cost / baseline:.3f}"
    )
    return plain / baseline


def bench_images(root: Path, runs: int, pool: ThreadPoolExecutor) -> float:
    files = [root / f"{i}.jpg" for i in range(IMAGES)]
    for i, file in enumerate(files):
        write_image(file, i)
    ours = loader(section(root, kind="image"), [Sample(f.name, 0) for f in files], BATCH, pool)
    mean, std = (torch.tensor(values) / 255 for values in (MEAN, STD))
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )

    def theirs(i: int) -> Tensor:
        pictures = []
        for j in range(BATCH):
            with Image.open(files[(i * BATCH + j) % IMAGES]) as picture:
                pictures.append(transform(picture.convert("RGB")))
        return torch.stack(pictures)

    ours.next()  # builds the graph
    began = time.process_time()
    for _ in range(1, IMAGES // BATCH):
        ours.next()
    first = (time.process_time() - began) / (IMAGES - BATCH)
    costs = interleave_cpu(
        {"ours": lambda i: ours.next().x, "torchvision": theirs}, runs, "an image", BATCH
    )
    print(f"  ours the first time a file is used {1e3 * first:.3f} CPU-ms an image")
    print_index_rate(files, is_image=True)
    plain, baseline = costs.values()
    return plain / baseline


def print_index_rate(files: list[Path], is_image: bool) -> None:
    began = time.process_time()
    for file in files:
        assert probe_file(file, is_image).state == USABLE
    rate = len(files) / (time.process_time() - began)
    print(f"  index: {rate:.0f} of these {'images' if is_image else 'videos'} a CPU-second")


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--images", action="store_true", help="JPEGs instead of clips")
    parser.set_defaults(threads=1)
    args = parser.parse_args(argv)
    if args.device != "cpu":
        print("this bench measures CPU time only")
        return 0
    args.threads = 1
    place = start(args)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        bench = bench_images if args.images else bench_clips
        ratio = bench(Path(folder), place.runs, pool)
    name, goal = ("loader_images", IMAGE_GOAL) if args.images else ("loader_clip", CLIP_GOAL)
    print(ratio_line(name, ratio, goal))
    return 0


if __name__ == "__main__":
    sys.exit(main())
