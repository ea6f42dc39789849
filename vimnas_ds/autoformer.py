"""AutoFormer's published supernet checkpoints, read and kept without pickle.

    supernet.safetensors    the checkpoint's tensors, under their own names
    autoformer.json         the search space, the dataset's name and its class names

Checkpoints are of the published commands (--gp --change_qkv --relative_position): what cannot be
told from a tensor's shape is believed of the arguments kept in the file, else taken as published.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vimnas_ds.config import ConfigError
from vimnas_ds.model.autoformer import TABLES, AutoFormerShape, AutoFormerSupernet
from vimnas_ds.space import SPACES, SearchSpace
from vimnas_ds.tensor_file import save_tensors
from vimnas_ds.torch_file import read_torch_file

WEIGHTS_FILE, ABOUT_FILE = "supernet.safetensors", "autoformer.json"
#: The published commands' arguments; a checkpoint that says otherwise is of another network.
_PUBLISHED = {
    "gp": True, "change_qkv": True, "relative_position": True, "post_norm": False,
    "no_abs_pos": False,
}  # fmt: skip


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a published .pth, by name. Raises ConfigError in words."""
    content = read_torch_file(path, [argparse.Namespace])  # its command's arguments
    content = content if isinstance(content, dict) else {}
    given = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
    for key, value in _PUBLISHED.items():
        if given.get(key, value) != value:
            raise ConfigError(f"{path} was trained with {key} {given[key]}: only {value} is read")
    state = content.get("model", content)
    tensors = {n: t for n, t in state.items() if isinstance(t, Tensor)}
    if "patch_embed_super.proj.weight" not in tensors:
        raise ConfigError(
            f"{path} is not an AutoFormer supernet: patch_embed_super.proj.weight is expected, "
            f"found {', '.join(sorted(map(str, state))[:3]) or 'nothing'}"
        )
    return tensors


def fitting_space(weights: Mapping[str, Tensor]) -> SearchSpace:
    """The space whose depth and heads the tensors have. Raises ConfigError."""
    layers = len({n.split(".")[1] for n in weights if n.startswith("blocks.")})
    width = weights["blocks.0.attn.qkv.weight"].shape[0] // 3 if layers else 0
    for space in SPACES.values():
        if (layers, width) == (space.max_depth, space.num_heads[0][-1] * space.head_dim):
            return space
    raise ConfigError(
        f"no known space has {layers} layers and {width} channels of attention; name one with "
        "--space"
    )


def build(weights: Mapping[str, Tensor], space: SearchSpace, dataset: str) -> AutoFormerSupernet:
    """The supernet. Raises ConfigError where tensors are missing or too small for the space."""
    try:
        side = math.isqrt(weights["pos_embed"].shape[1] - 1)
        patch = weights["patch_embed_super.proj.weight"].shape[-1]
        reach = weights[f"blocks.0.{TABLES[0]}"].shape[0] // 2 - 1
        shape = AutoFormerShape(space.head_dim, patch, side, reach)
        floats = {name: value.float() for name, value in weights.items()}
        supernet = AutoFormerSupernet(floats, space, shape, dataset)
        supernet.extract(space.largest())
    except KeyError as err:
        raise ConfigError(f"the checkpoint has no tensor {err}") from err
    except (RuntimeError, IndexError, ValueError) as err:
        raise ConfigError(f"the checkpoint does not fit the space {space.name}: {err}") from err
    return supernet


def keep(supernet: AutoFormerSupernet, labels: Sequence[str], folder: Path) -> None:
    """Write the supernet to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in supernet.weights.items()}
    save_tensors(tensors, folder / WEIGHTS_FILE)
    about = {"space": supernet.space.name, "dataset": supernet.dataset, "labels": list(labels)}
    (folder / ABOUT_FILE).write_text(json.dumps(about, indent=2) + "\n")


def open_autoformer(folder: Path) -> tuple[AutoFormerSupernet, list[str]]:
    """(supernet, class names) from `folder`. Raises ConfigError in words."""
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
        weights = load_file(str(folder / WEIGHTS_FILE))
        space, dataset, labels = SPACES[about["space"]], about["dataset"], list(about["labels"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as err:
        raise ConfigError(f"{folder} is not an imported AutoFormer supernet: {err!r}") from err
    return build(weights, space, dataset), labels
