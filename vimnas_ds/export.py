"""A chosen sub-network as a folder that stands alone.

    model.safetensors   the sliced weights (float32)
    arch.json           architecture, token geometry, switches, classes per dataset
    labels.json         class names per dataset, by label
    preprocess.json     how an input becomes the network's tensor, per dataset

`load_subnet` needs torch, safetensors and einops: no DeepSpeed, no DALI, no code from the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vimnas_ds.export_check import check_arch, check_classes, check_geometry
from vimnas_ds.model.options import ModelOptions
from vimnas_ds.model.subnet import SubNetwork
from vimnas_ds.space import Arch
from vimnas_ds.tensor_file import save_tensors
from vimnas_ds.tubes import TokenGeometry, Tube

FORMAT = "vimnas_ds sub-network 1"
#: Switches that an export of an earlier version does not name.
_SWITCHES = ("gelu", "norm_eps", "class_token", "positions", "relative_positions", "side")
#: ImageNet's channel statistics, for values in [0, 1]
_NORMALISE = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HOW = (
    "RGB, upright (EXIF, rotation metadata applied); for video `frames` frames at `fps`, the frame "
    "shown at time t being the last with a time stamp <= t, from the middle of the video, the last "
    "frame repeated where it is short; shorter side resized to `resize` (antialiased, by the "
    "filter `interpolation`), "
    "centre crop of `size`, divided by 255, minus mean, divided by std"
)


_MISFITS = (
    KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError, OSError,
    SafetensorError,
)  # fmt: skip


class ExportError(ValueError):
    """A folder that is not a usable export; the message says what is wrong."""


def export_subnet(
    net: SubNetwork,
    folder: Path,
    labels: Mapping[str, Sequence[str]],
    preprocess: Mapping[str, Mapping[str, Any]],
    source: Mapping[str, Any],
) -> None:
    """Write `net` to `folder` (made if absent; an export already there is replaced).

    `preprocess[dataset]` has size, resize, frames and fps (null for images), and interpolation
    where it is not bilinear; `source` is kept as a note of where the weights came from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {n: p.detach().float().cpu().contiguous() for n, p in net.named_parameters()}
    save_tensors(weights, folder / "model.safetensors")
    classes = {name: len(head.get_parameter("bias")) for name, head in net.heads.items()}
    arch = {**_describe(net), "num_classes": classes, "source": dict(source)}
    named = {
        name: [*names, *(f"class {i}" for i in range(len(names), classes[name]))]
        for name, names in labels.items()
    }
    steps = {
        name: {"interpolation": "bilinear", **p, **_NORMALISE, "how": _HOW}
        for name, p in preprocess.items()
    }
    for file, content in (("arch", arch), ("labels", named), ("preprocess", steps)):
        (folder / f"{file}.json").write_text(json.dumps(content, indent=2) + "\n")


def _describe(net: SubNetwork) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "arch": json.loads(net.arch.to_json()),
        "head_dim": net.head_dim,
        "position_dim": net.position_dim,
        "image_tube": net.geometry.image_tube,
        "tubes": [asdict(t) for t in net.geometry.tubes],
        "qk_norm": net.options.qk_norm,
        "layer_scale": net.options.layer_scale is not None,
        **{key: getattr(net.options, key) for key in _SWITCHES},
    }


def _build(about: Mapping[str, Any]) -> SubNetwork:
    """The network that `_describe` described, its weights not yet set."""
    arch = Arch.from_json(about["arch"])
    check_arch(arch)
    check_classes(about["num_classes"])
    check_geometry(about, arch)
    tubes = tuple(
        Tube(tuple(t["kernel"]), tuple(t["stride"]), tuple(t["offset"])) for t in about["tubes"]
    )
    options = ModelOptions(
        qk_norm=about["qk_norm"],
        layer_scale=1.0 if about["layer_scale"] else None,
        **{key: about[key] for key in _SWITCHES if key in about},
    )
    if not 0 <= about["image_tube"] < len(tubes):
        raise ValueError(f"image_tube {about['image_tube']} is not one of {len(tubes)} tubes")
    return SubNetwork(
        arch,
        about["head_dim"],
        TokenGeometry(tubes, about["image_tube"]),
        about["num_classes"],
        options,
        about["position_dim"],
    )


def read_json(folder: Path, name: str) -> Any:
    """One of the export's JSON files. Raises ExportError in words."""
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        hint = ""
        if (folder / "checkpoints").is_dir():
            hint = f": it is a run; python scripts/export.py --checkpoint {folder} exports from it"
        raise ExportError(f"{folder} is not an exported sub-network: no {name}{hint}") from err
    except (OSError, ValueError, RecursionError) as err:
        raise ExportError(f"{folder} is not an exported sub-network: {name}: {err}") from err


def load_subnet(folder: str | Path) -> SubNetwork:
    """The exported module, in eval mode: `net(x, dataset)` -> logits.

    x is (B, 3, H, W) or (B, 3, T, H, W), normalised as preprocess.json says.
    Raises ExportError when the folder is not an export or does not fit together.
    """
    folder = Path(folder)
    about = read_json(folder, "arch.json")
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ExportError(f"{folder}: arch.json is not of the format {FORMAT}")
    try:
        with torch.device("meta"):  # takes no memory: the file alone decides how much is loaded
            net = _build(about)
        net.load_state_dict(load_file(str(folder / "model.safetensors")), assign=True)
    except _MISFITS as err:
        raise ExportError(f"{folder}: arch.json and model.safetensors do not fit: {err}") from err
    return net.eval()
