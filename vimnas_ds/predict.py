"""Classify one file with an exported sub-network; needs PyAV and Pillow, no DALI.

Resize, centre crop and normalisation follow the export's preprocess.json; frames are taken by
time. Resizing is torch's antialiased bilinear: within a grey level or two of the training graph's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from vimnas_ds.data.decode import read_clip
from vimnas_ds.data.images import understood
from vimnas_ds.export import ExportError, load_subnet, read_json


@dataclass(frozen=True)
class Prediction:
    """Class names with their probabilities, most probable first."""

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]


def read_input(file: Path, steps: Mapping[str, Any]) -> Tensor:
    """A file as the network's input: (1, 3, H, W) or (1, 3, T, H, W), float32.

    Raises BadFile for a file that cannot be decoded.
    """
    if steps["frames"] is None:
        with understood(file), Image.open(file) as picture:
            rgb = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
        pixels = rgb.transpose(2, 0, 1)[None]
    else:
        pixels = read_clip(file, steps["frames"], steps["fps"], 0.5)
    x = torch.from_numpy(pixels).float()  # (T, 3, H, W)
    scale = steps["resize"] / min(x.shape[-2:])
    shape = [max(steps["size"], round(n * scale)) for n in x.shape[-2:]]
    x = F.interpolate(x, shape, mode="bilinear", antialias=True, align_corners=False)
    top, left = ((n - steps["size"]) // 2 for n in shape)
    x = x[..., top : top + steps["size"], left : left + steps["size"]] / 255
    mean, std = (torch.tensor(steps[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    x = ((x - mean) / std).transpose(0, 1)[None]  # (1, 3, T, H, W)
    return x[:, :, 0] if steps["frames"] is None else x


@torch.no_grad()
def classify(folder: str | Path, file: str | Path, dataset: str, top: int = 5) -> Prediction:
    """The `top` most probable classes of `file`, by the head of `dataset`.

    Raises ExportError for a bad export or a dataset it has no head for, BadFile for a file that
    cannot be decoded.
    """
    folder = Path(folder)
    net, labels, steps = (
        load_subnet(folder),
        read_json(folder, "labels.json"),
        read_json(folder, "preprocess.json"),
    )
    if dataset not in net.heads:
        raise ExportError(f"{folder} has no head {dataset!r}; it has {', '.join(net.heads)}")
    try:
        names, plan = list(labels[dataset]), steps[dataset]
        x = read_input(Path(file), plan)
        best = net(x, dataset).softmax(-1)[0].topk(max(1, min(top, len(names))))
        chosen = tuple(str(names[i]) for i in best.indices.tolist())
    except (KeyError, IndexError, TypeError) as err:
        raise ExportError(
            f"{folder}: labels.json or preprocess.json does not fit: {err!r}"
        ) from err
    return Prediction(chosen, tuple(best.values.tolist()))
