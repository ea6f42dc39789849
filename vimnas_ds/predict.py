"""Classify files with an exported sub-network; needs PyAV and Pillow, no DALI.

Resize, centre crop and normalisation follow the export's preprocess.json; frames are taken by
time. Clips are scaled while they are decoded, as in an evaluation; pictures with torch's
antialiased filter of the name in preprocess.json: the bilinear one is within a grey level or two of
the training graph's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from vimnas_ds.data.bad import BadFile, BadVideo
from vimnas_ds.data.decode import read_clip
from vimnas_ds.data.images import understood
from vimnas_ds.data.sampling import whole_picture
from vimnas_ds.export import ExportError, load_subnet, read_json
from vimnas_ds.export_check import check_labels, check_preprocess
from vimnas_ds.model.subnet import SubNetwork

#: Formats of Pillow's that are videos here when they move.
_ANIMATIONS = ("AVIF", "GIF", "PNG")
#: Of one input; 64 frames of 224 pixels in dense cubes make 6,272.
MAX_TOKENS = 2**17


@dataclass(frozen=True)
class Prediction:
    """Class names with their probabilities, most probable first, and what the network saw."""

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    seen: Tensor = field(compare=False, repr=False)  #: see `read_input`


class Classifier:
    """An export opened for classification.

    Raises ExportError for a bad export: its three JSON files are checked once, here.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._net = load_subnet(self.folder)
        self._labels = read_json(self.folder, "labels.json")
        self._steps = read_json(self.folder, "preprocess.json")
        for name, head in self._net.heads.items():
            classes = len(head.get_parameter("bias"))
            with self._checked("labels.json"):
                check_labels(self._labels, name, classes)
            with self._checked("preprocess.json"):
                check_preprocess(self._steps, name)
                check_size(self._net, self._steps[name])

    @property
    def datasets(self) -> tuple[str, ...]:
        """The heads."""
        return tuple(self._net.heads)

    def steps(self, dataset: str) -> dict[str, Any]:
        """preprocess.json of one head. Raises ExportError for one that is not there."""
        if dataset not in self._net.heads:
            raise ExportError(
                f"{self.folder} has no head {dataset!r}; it has {', '.join(self.datasets)}"
            )
        return dict(self._steps[dataset])

    def heads_for(self, file: Path) -> tuple[str, ...]:
        """The heads that take such a file. Raises BadFile where there is none."""
        still = is_picture(file)
        found = tuple(n for n in self.datasets if self._takes_pictures(n) == still)
        if not found:
            raise BadFile(str(file), f"{_kind(still)}: {self._which(self.datasets, not still)}")
        return found

    @torch.no_grad()
    def __call__(self, file: Path, dataset: str, top: int = 5) -> Prediction:
        """The `top` most probable classes of `file`, by the head of `dataset`.

        Raises ExportError for a dataset without a head and for a network that cannot be run or
        answers with no numbers, BadFile for a file that cannot be decoded or is a picture where
        videos are taken, or the other way round.
        """
        steps, still = self.steps(dataset), is_picture(file)
        if self._takes_pictures(dataset) != still:
            raise BadFile(str(file), f"{_kind(still)}: {self._which((dataset,), not still)}")
        names = self._labels[dataset]
        try:
            x = read_input(file, steps)
            shares = self._net(x, dataset).softmax(-1)[0]
        except BadFile:
            raise
        except (RuntimeError, ValueError, OverflowError, MemoryError) as err:
            raise ExportError(f"{self.folder} cannot classify {file}: {err}") from err
        if not shares.isfinite().all():
            raise ExportError(f"{self.folder}: its probabilities for {file} are not numbers")
        best = shares.topk(max(1, min(top, len(names))))
        labels = tuple(names[i] for i in best.indices.tolist())
        return Prediction(labels, tuple(best.values.tolist()), x)

    def _takes_pictures(self, dataset: str) -> bool:
        return self._steps[dataset]["frames"] is None

    def _which(self, datasets: Sequence[str], still: bool) -> str:
        what = "pictures" if still else "videos"
        heads = f"head{'s' * (len(datasets) > 1)} {', '.join(datasets)} of {self.folder}"
        return f"the {heads} take{'s' * (len(datasets) == 1)} {what} only"

    @contextmanager
    def _checked(self, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as err:
            raise ExportError(f"{self.folder}: {name}: {err}") from err


def check_size(net: SubNetwork, steps: Mapping[str, Any]) -> None:
    """Raise ValueError where `net` does not take inputs that are made so."""
    size, frames, side = steps["size"], steps["frames"], net.options.side
    tokens = net.geometry.num_tokens(frames, size)
    if tokens > MAX_TOKENS:
        raise ValueError(f"inputs of size {size} and frames {frames} make {tokens} tokens")
    if net.options.has_places and side and (frames is not None or tokens != side**2):
        raise ValueError(
            f"the network takes pictures of {side} x {side} patches, not size {size} and "
            f"frames {frames}"
        )


def classify(folder: str | Path, file: str | Path, dataset: str, top: int = 5) -> Prediction:
    """One file with an export opened for it alone; see `Classifier`."""
    return Classifier(folder)(Path(file), dataset, top)


def is_picture(file: Path) -> bool:
    """Whether a file is a still picture, not a video or an animation (or nothing of that kind).

    Raises BadFile for a file that cannot be opened, or a picture that Pillow refuses.
    """
    with understood(file):
        try:
            with Image.open(file) as picture:
                moving = picture.format in _ANIMATIONS and getattr(picture, "is_animated", False)
                return picture.format != "MPEG" and not moving
        except UnidentifiedImageError:
            return False


def _kind(still: bool) -> str:
    return "a picture" if still else "not a picture"


def read_input(file: Path, steps: Mapping[str, Any]) -> Tensor:
    """A file as the network's input: (1, 3, H, W) or (1, 3, T, H, W), float32.

    Raises BadFile for a file that cannot be decoded.
    """
    size, shorter = steps["size"], max(steps["size"], steps["resize"])
    if steps["frames"] is None:
        x = _read_picture(file, shorter, steps.get("interpolation", "bilinear"))
    else:
        try:
            cut = partial(whole_picture, shorter=shorter)
            clip = read_clip(file, steps["frames"], steps["fps"], 0.5, cut)
        except BadVideo as err:
            raise BadVideo(
                str(file), f"not a picture, and cannot be read as a video: {err.reason}"
            ) from err
        x = torch.from_numpy(clip).float()  # (T, 3, H, W)
    top, left = ((n - size + 1) // 2 for n in x.shape[-2:])  # as DALI rounds
    x = x[..., top : top + size, left : left + size] / 255
    mean, std = (torch.tensor(steps[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    x = ((x - mean) / std).transpose(0, 1)[None]  # (1, 3, T, H, W)
    return x[:, :, 0] if steps["frames"] is None else x


def _read_picture(file: Path, shorter: int, interpolation: str) -> Tensor:
    """Upright, its shorter side scaled to `shorter` pixels: (1, 3, H, W)."""
    if interpolation not in ("bilinear", "bicubic"):
        raise ExportError(
            f"preprocess.json: interpolation {interpolation!r} is not bilinear or bicubic"
        )
    with understood(file), Image.open(file) as picture:
        rgb = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    whole = torch.from_numpy(rgb).permute(2, 0, 1)[None]
    if interpolation == "bilinear":  # the bicubic filter overshoots: in bytes, as Pillow cuts it
        whole = whole.float()
    cut = whole_picture(rgb.shape[1], rgb.shape[0], shorter)
    shape = (cut.height, cut.width)
    scaled = F.interpolate(whole, shape, mode=interpolation, antialias=True, align_corners=False)
    return scaled.float()
