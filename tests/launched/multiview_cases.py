"""Planted truth for the multi-view test, on any number of ranks: a network that reads who it sees.

Every pixel of a video says which sample it belongs to (blue), when it is shown (green) and in which
third of the width it lies (red); a picture says which sample it is. The "network" reads the three
back and looks its logits up in a table, so what must come out can be computed without any of the
code under test.

Run by the launcher it prints `RESULT {json}` on rank 0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.media import encode
from tests.small import small_config
from vimnas_ds.config import parse_config
from vimnas_ds.data.catalog import Sample
from vimnas_ds.processes import end_process
from vimnas_ds.report.pictures import MEAN, STD
from vimnas_ds.search.multiview import MultiViewEvaluator
from vimnas_ds.search.run import SearchRun
from vimnas_ds.train.ranks import Ranks, start_ranks

CLASSES, CLIPS, CROPS = 7, 3, 3
#: Neither count divides by 2 or 3, and video BROKEN (of the second rank) cannot be read.
NUM_VIDEOS, NUM_PICTURES, BROKEN = 14, 11, 5
BATCHES = (1, 5, 64)
#: Files of the official list that nothing can be made of, so that no loader sees them.
UNTESTED = {"k400": {"99.mp4": "not on the disk", "00-.mp4": "empty file"}, "imagenet": {}}
SPLIT = {
    "k400": [Sample(f"{i:02}.mp4", i % 5) for i in range(NUM_VIDEOS)],
    "imagenet": [Sample(f"{i:02}.png", i % 3) for i in range(NUM_PICTURES)],
}


def table(dataset: str, network: int) -> np.ndarray:
    """Logits by sample, clip, crop."""
    clips, crops, count = (CLIPS, CROPS, NUM_VIDEOS) if dataset == "k400" else (1, 1, NUM_PICTURES)
    return 3 * np.random.default_rng(network).standard_normal((count, clips, crops, CLASSES))


def make_files(root: Path) -> None:
    """24 frames at 12 fps of 144 x 48; the clips of 4 frames at 8 fps start at 0, 9 and 18."""
    for i in range(NUM_VIDEOS):
        frames = []
        for time in range(24):
            frame = np.empty((48, 144, 3), np.uint8)
            frame[..., 0] = np.repeat([60, 120, 180], 48)[None]
            frame[..., 1], frame[..., 2] = 60 + 6 * time, 30 + 14 * i
            frames.append(frame)
        encode(root / f"{i:02}.mp4", frames, qp="0", g="6")
    (root / f"{BROKEN:02}.mp4").write_bytes(b"no video")
    for i in range(NUM_PICTURES):
        grey = np.full((40, 48, 3), 20 + 20 * i, np.uint8)
        Image.fromarray(grey).save(root / f"{i:02}.png")


def network(dataset: str, number: int) -> Any:
    logits = torch.from_numpy(table(dataset, number)).float()

    def forward(x: Tensor) -> Tensor:
        dims = tuple(range(2, x.ndim))
        red, green, blue = 255 * (
            x.double().mean(dims).T * torch.tensor(STD)[:, None] + torch.tensor(MEAN)[:, None]
        )
        if dataset == "imagenet":
            return logits[((red - 20) / 20).round().long(), 0, 0]
        crop, clip = (red - 60) / 60, ((green - 60) / 6 - 2) / 9
        return logits[((blue - 30) / 14).round().long(), clip.round().long(), crop.round().long()]

    return forward


def build_run(root: Path, ranks: Ranks, batch: int) -> SearchRun:
    values = small_config()
    section = values["vimnas"]
    section["log"] = {"eval_batch": batch}
    for data in section["data"]["datasets"].values():
        data |= {"root": str(root), "num_classes": CLASSES, "resize": 36}
    section["data"]["datasets"]["k400"] |= {"frames": 4, "fps": 8, "test_clips": CLIPS}
    run = SimpleNamespace(
        config=parse_config(values),
        checkpoint=root,
        ranks=ranks,
        dtype=torch.float32,
        data=SimpleNamespace(splits={k: {"test": v} for k, v in SPLIT.items()}, untested=UNTESTED),
    )
    return cast(SearchRun, run)


def results(root: Path, ranks: Ranks) -> dict[str, Any]:
    """What the evaluator says, for every batch size, dataset and network."""
    found: dict[str, Any] = {}
    for batch in BATCHES:
        evaluator = MultiViewEvaluator(build_run(root, ranks, batch))
        for dataset in SPLIT:
            seen: list[int] = []
            forwards = {str(n): network(dataset, n) for n in (0, 1)}
            scores = evaluator.scores(forwards, dataset, "test", seen.append)
            for number, score in scores.items():
                found[f"{dataset} {number} {batch}"] = {
                    "top1": score.top1,
                    "top5": score.top5,
                    "count": score.count,
                    "views": score.views,
                    "counts": score.confusion.counts.tolist(),
                    "top5_hits": score.confusion.top5_hits.tolist(),
                    "skipped": evaluator.skipped[dataset],
                    "samples": evaluator.num_samples(dataset, "test"),
                    "progress": sum(seen),
                }
        evaluator.close()
    return found


if __name__ == "__main__":
    ranks = start_ranks(engine=False)
    torch.set_num_threads(1)
    values = results(Path(sys.argv[-1]), ranks)
    if ranks.is_main:
        print("RESULT", json.dumps(values), flush=True)
    end_process(0)
