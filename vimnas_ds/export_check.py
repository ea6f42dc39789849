"""What the JSON files of an export must say before a network is built or an input made from them.

They may come from anyone: each check raises ValueError naming the key, its value and what is right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from vimnas_ds.space import Arch

#: Heads are named as datasets are: the names become those of files (`vimnas_ds.programs`).
_NAME = re.compile(r"[A-Za-z0-9_]+")
#: Widest supernet, whose positions are made for every token.
MAX_POSITION_DIM = 2**16
#: Of one input, at its size before the crop: 3 GB in float32.
MAX_PIXELS = 2**28


def check_classes(num_classes: object) -> None:
    """`num_classes` of arch.json."""
    for name, count in _object("num_classes", num_classes).items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"num_classes: {name!r} is no name: letters, digits and _ alone")
        _whole(f"num_classes.{name}", count)


def check_arch(arch: Arch) -> None:
    """Every width is one, as in any member of a space."""
    _whole("arch.depth", arch.depth)
    _whole("arch.embed_dim", arch.embed_dim)
    for layer in range(arch.depth):
        _whole(f"arch.num_heads[{layer}]", arch.num_heads[layer])
        if not 0 < arch.mlp_ratio[layer] < math.inf:
            raise ValueError(
                f"arch.mlp_ratio[{layer}] must be a positive number, got {arch.mlp_ratio[layer]}"
            )


def check_geometry(about: Mapping[str, Any], arch: Arch) -> None:
    """`head_dim`, `position_dim`, `tubes`, `image_tube` and what counts patches in arch.json."""
    _whole("head_dim", about["head_dim"])
    for key in ("side", "relative_positions"):
        if about.get(key) is not None:
            _whole(key, about[key])
    _whole("image_tube", about["image_tube"], 0)
    dim = about["position_dim"]
    _whole("position_dim", dim, arch.embed_dim)
    if dim > MAX_POSITION_DIM:
        raise ValueError(f"position_dim must be at most {MAX_POSITION_DIM}, got {dim}")
    for i, tube in enumerate(about["tubes"]):
        for key, least in (("kernel", 1), ("stride", 1), ("offset", 0)):
            if not isinstance(tube[key], list) or len(tube[key]) != 3:
                raise ValueError(f"tubes[{i}].{key} must be three numbers, got {tube[key]!r}")
            for number in tube[key]:
                _whole(f"tubes[{i}].{key}", number, least)


def check_labels(labels: object, head: str, classes: int) -> None:
    """labels.json of one head."""
    names = _of_head(labels, head)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{head} must be a list of class names")
    if len(names) != classes:
        raise ValueError(f"{head} has {len(names)} class names, the network {classes} classes")


def check_preprocess(steps: object, head: str) -> None:
    """preprocess.json of one head."""
    found = _object(head, _of_head(steps, head))
    if missing := {"size", "resize", "frames", "fps", "mean", "std"} - found.keys():
        raise ValueError(f"{head} has no {', '.join(sorted(missing))}")
    for key in ("size", "resize"):
        _whole(f"{head}.{key}", found[key])
    frames, fps = found["frames"], found["fps"]
    if frames is not None:
        _whole(f"{head}.frames", frames)
        if not _is_number(fps) or fps <= 0:
            raise ValueError(f"{head}.fps must be a positive number with frames, got {fps!r}")
    pixels = (frames or 1) * max(found["size"], found["resize"]) ** 2
    if pixels > MAX_PIXELS:
        raise ValueError(
            f"{head}: size {found['size']}, resize {found['resize']} and frames {frames} make "
            f"inputs of more than {MAX_PIXELS} pixels"
        )
    for key, kind in (("mean", "finite"), ("std", "positive, finite")):
        value = found[key]
        good = isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))
        if not good or (key == "std" and min(value) <= 0):
            raise ValueError(f"{head}.{key} must be three {kind} numbers, got {value!r}")


def _of_head(content: object, head: str) -> object:
    if not isinstance(content, dict) or head not in content:
        raise ValueError(f"it says nothing of the head {head}")
    return content[head]


def _object(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, got {value!r}")
    return value


def _whole(name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _is_number(value: object) -> bool:
    """Finite too, in float32 as well."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return good and abs(value) < 1e38  # type: ignore[arg-type]
