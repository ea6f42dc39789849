"""Files for the tests of the data path: written on the spot, small, with known contents."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from vimnas_ds.config import DatasetSection


def section(root: Path | None, kind: str = "image", **changes: Any) -> DatasetSection:
    values: dict[str, Any] = {"root": root, "kind": kind, "num_classes": 3, "size": 32}
    values |= {"base_lr": 1e-3, "weight_decay": 0.0}
    if kind == "video":
        values |= {"frames": 4, "fps": 8}
    return DatasetSection(**(values | changes))


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def encode(
    path: Path,
    pictures: list[np.ndarray],
    codec: str = "libx264",
    rate: int = 12,
    ticks: list[int] | None = None,
    container: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """Writes RGB pictures as a video; `ticks` are the frames' times in milliseconds."""
    base = Fraction(1, 1000)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if ticks is not None:
            stream.codec_context.time_base = base
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if ticks is not None:
                frame.pts, frame.time_base = ticks[i], base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def numbered(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Frame i has the brightness 10 + 7 i."""
    return [np.full((height, width, 3), 10 + 7 * i, np.uint8) for i in range(count)]


def numbers(clip: np.ndarray) -> list[int]:
    return [round((float(frame.mean()) - 10) / 7) for frame in clip]
