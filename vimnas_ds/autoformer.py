"""AutoFormer's published supernet checkpoints as weights of this project's supernet.

Its network is ours with other switches: GELU in its erf form, eps 1e-5, a class token that is not
pooled, learned and 2-D relative positions, packed q, k, v biases (`config.ModelSection`). Weights
may be wider than the largest choice: the part up to it is kept. q, k and v share rows in turn:

    ours[g, w] = theirs[3 w + g]                                      g = 0, 1, 2 for q, k, v

Checkpoints are of the published commands (--gp --change_qkv --relative_position): what cannot be
told from a tensor's shape is believed of the arguments kept in the file, else taken as published.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vimnas_ds.config import ConfigError
from vimnas_ds.model.supernet import Supernet
from vimnas_ds.space import SPACES, SearchSpace
from vimnas_ds.torch_file import read_torch_file

#: The published commands' arguments; a checkpoint that says otherwise is of another network.
_PUBLISHED = {
    "gp": True, "change_qkv": True, "relative_position": True, "post_norm": False,
    "no_abs_pos": False,
}  # fmt: skip
#: Our names, as patterns, and theirs.
_NAMES = {
    r"tokens\.tubes\.0": "patch_embed_super.proj",
    r"tokens\.class_token\.weight": "cls_token",
    r"tokens\.position\.weight": "pos_embed",
    r"\.norm1\.": ".attn_layer_norm.",
    r"\.norm2\.": ".ffn_layer_norm.",
    r"\.mlp\.": ".",
    r"relative\.([kv])_rows\.weight": r"rel_pos_embed_\1.embeddings_table_v",
    r"relative\.([kv])_columns\.weight": r"rel_pos_embed_\1.embeddings_table_h",
    r"^heads\.\w+": "head",
}
_TABLE = "blocks.0.attn.rel_pos_embed_k.embeddings_table_v"
_ABOUT = (
    "One of AutoFormer's published supernets (Chen et al., 2021; microsoft/Cream), imported, with "
    "the recipe it was trained by. It saw all of ImageNet's training files, those held out here "
    "too: scores on `select` rank sub-networks but are too high. Evaluation resizes by the "
    "bilinear filter, AutoFormer's own by the bicubic one. To train on: scripts/train.py "
    "--deepspeed_config RUN/config.json --inherit RUN --set vimnas.output_dir=... --set "
    "vimnas.data.NAME.root=..."
)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a published .pth, by name. Raises ConfigError in words."""
    content = read_torch_file(path, [argparse.Namespace])  # its command's arguments
    content = content if isinstance(content, dict) else {}
    given = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
    for key, value in _PUBLISHED.items():
        if given.get(key, value) != value:
            raise ConfigError(f"{path} was trained with {key} {given[key]}: only {value} is read")
    state = content.get("model", content)
    state = state if isinstance(state, dict) else {}
    tensors = {str(name): t for name, t in state.items() if isinstance(t, Tensor)}
    if "patch_embed_super.proj.weight" not in tensors:
        raise ConfigError(
            f"{path} is not an AutoFormer supernet: patch_embed_super.proj.weight is expected, "
            f"found {', '.join(sorted(map(str, state))[:3]) or 'no tensors by name'}"
        )
    for name, tensor in tensors.items():
        if not _is_plain(tensor):
            raise ConfigError(f"{path}: {name} is not a plain tensor of floating-point numbers")
    return tensors


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has a number of its own in the file for each of its elements."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.is_floating_point() and tensor.nbytes <= tensor.untyped_storage().nbytes()


def fitting_space(weights: Mapping[str, Tensor]) -> SearchSpace:
    """The space whose depth and heads the tensors have. Raises ConfigError."""
    layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    (rows,) = _shape(weights, "blocks.0.attn.qkv.weight", 2)[:1]
    for space in SPACES.values():
        if (layers, rows) == (space.max_depth, 3 * space.num_heads[0][-1] * space.head_dim):
            return space
    raise ConfigError(
        f"no known space has {layers} layers and {rows / 3:g} channels of attention; name one with "
        "--space"
    )


def run_object(
    weights: Mapping[str, Tensor], space: SearchSpace, dataset: str, output_dir: Path
) -> dict[str, Any]:
    """The configuration of a run with such weights, trained by AutoFormer's recipe. Raises
    ConfigError."""
    patch = _shape(weights, "patch_embed_super.proj.weight", 4)[-1]
    places = _shape(weights, "pos_embed", 3)[1]
    side = math.isqrt(max(places - 1, 0))
    if side**2 + 1 != places:
        raise ConfigError(f"pos_embed has {places} positions: not a class token and a square")
    return {
        "about": _ABOUT,
        "train_batch_size": 1024,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000},
        "vimnas": {
            "output_dir": str(output_dir),
            "space": space.name,
            "tokens": {"tubes": [{"kernel": [1, patch, patch], "stride": [1, patch, patch]}]},
            "model": {
                "drop_path": 0.1,
                "gelu": "erf",
                "norm_eps": 1e-5,
                "class_token": True,
                "positions": "learned",
                "relative_positions": _shape(weights, _TABLE, 2)[0] // 2 - 1,
                "packed_qkv_bias": True,
            },
            "data": {
                "datasets": {
                    dataset: {
                        "kind": "image",
                        "num_classes": _shape(weights, "head.bias", 1)[0],
                        "size": patch * side,
                        "export_interpolation": "bicubic",
                        "base_lr": 1e-3,
                        "weight_decay": 0.05,
                        "randaugment": {"n": 2, "m": 9, "std": 0.5},
                        "random_erasing": 0.25,
                        "mixup": 0.8,
                        "cutmix": 1.0,
                        "label_smoothing": 0.1,
                    }
                }
            },
            "schedule": {"epochs": 500, "warmup": 20, "min_lr": 1e-5},
        },
    }


@torch.no_grad()
def fill(net: Supernet, weights: Mapping[str, Tensor]) -> None:
    """Copy the checkpoint's `weights` into `net`. Raises ConfigError where tensors are missing,
    too small for the space, or left over."""
    layouts, taken = net.layouts(), set()
    for name, own in net.named_parameters():
        theirs = name
        for pattern, replacement in _NAMES.items():
            theirs = re.sub(pattern, replacement, theirs)
        if theirs not in weights:
            raise ConfigError(f"the checkpoint has no tensor {theirs!r}")
        taken.add(theirs)
        shape, given = layouts[name].shape, weights[theirs]
        try:
            block = _as_block(given, shape)[tuple(slice(0, n) for n in shape)]
            if block.shape != shape:  # copying would repeat what is too small
                raise ValueError(f"{tuple(block.shape)} of it can be used, {shape} are needed")
            own.view(shape).copy_(block)
        except (RuntimeError, IndexError, ValueError) as err:
            raise ConfigError(
                f"the checkpoint does not fit the space {net.space.name}: {theirs} "
                f"{tuple(given.shape)}: {err}"
            ) from err
    left = sorted(weights.keys() - taken)
    if left:
        raise ConfigError(
            f"the checkpoint does not fit the space {net.space.name}: it has no place for "
            f"{', '.join(left[:3])}{' ...' * (len(left) > 3)}"
        )


def _as_block(given: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor in the order of our parameter's block."""
    if len(shape) == 3:  # q, k, v: only so many rows as are used have the roles they are used in
        return rearrange(given[: shape[0] * shape[1]], "(w g) d -> g w d", g=shape[0])
    if given.ndim == 4:  # the patches' kernel
        return given.flatten(1)
    return given[0] if given.ndim == 3 else given  # the class token and positions


def _shape(weights: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    if name not in weights:
        raise ConfigError(f"the checkpoint has no tensor {name!r}")
    shape = tuple(weights[name].shape)
    if len(shape) != ndim:
        raise ConfigError(f"the checkpoint's {name} has the shape {shape}, not {ndim} axes")
    return shape
