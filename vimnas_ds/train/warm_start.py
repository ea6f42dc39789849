"""Starting weights from elsewhere: a local timm ViT, or a supernet of this project.

`warm_start` takes from a timm ViT the leading block of every weight that has a counterpart. timm's
qkv rows are q, k, v one after the other, as ours are, so head prefixes stay in their roles. A 2-D
patch embedding becomes the image tube's weight. Positions are fixed here; class tokens, heads and
position embeddings are not taken. Files load with safetensors or `weights_only=True`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vimnas_ds.config import ConfigError, ModelSection, RunConfig
from vimnas_ds.model.supernet import Supernet
from vimnas_ds.torch_file import read_torch_file
from vimnas_ds.train.run_files import (
    PLAIN_FILES,
    WEIGHTS_FILE,
    find_checkpoint,
    network_of,
    read_run_config,
)


def check_source(model: ModelSection) -> None:
    """Raise ConfigError if what the weights are to come from is not there; nothing is loaded."""
    if model.init is not None:
        _check_file(model.init)
    if model.inherit is not None:
        find_checkpoint(model.inherit, PLAIN_FILES)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"vimnas.model.init: there is no file {path}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name from .safetensors or a torch file. Raises ConfigError in words."""
    _check_file(path)
    try:
        if path.suffix == ".safetensors":
            state = load_file(str(path))
        else:
            state = read_torch_file(path)
    except ConfigError as err:
        raise ConfigError(f"vimnas.model.init: {err}") from err
    except (OSError, SafetensorError) as err:
        raise ConfigError(f"vimnas.model.init: cannot read {path}: {err}") from err
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ConfigError(f"vimnas.model.init: {path} is not a state dict of tensors")
    return state


@torch.no_grad()
def warm_start(net: Supernet, path: Path) -> list[str]:
    """Copy what fits into `net`; returns a report, one line per kind of outcome."""
    state = read_weights(path)
    tube = f"tokens.tubes.{net.geometry.image_tube}"
    renamed = {"patch_embed.proj.weight": f"{tube}.weight", "patch_embed.proj.bias": f"{tube}.bias"}
    source = {renamed.get(name, name): value for name, value in state.items()}
    layouts = net.layouts()
    whole: list[str] = []
    partial: list[str] = []
    missing: list[str] = []
    for name, own in net.named_parameters():
        if name not in source or name.startswith("heads."):
            missing.append(name)
            continue
        shape, given = layouts[name].shape, source[name].float()
        block = _as_block(given, shape)
        if block is None:
            missing.append(name)
            continue
        common = tuple(slice(0, min(a, b)) for a, b in zip(block.shape, shape, strict=True))
        own.view(shape)[common] = block[common]
        is_whole = all(a >= b for a, b in zip(block.shape, shape, strict=True))
        (whole if is_whole else partial).append(name)
    if not whole and not partial:
        raise ConfigError(
            f"vimnas.model.init: nothing in {path} fits; a timm ViT's names are expected "
            f"(blocks.0.attn.qkv.weight, ...), found {sorted(state)[:3]}"
        )
    used = {*whole, *partial}
    unused = sorted(name for name in state if renamed.get(name, name) not in used)
    return [
        f"warm start from {path.name}: {len(whole)} parameters filled, {len(partial)} in part, "
        f"{len(missing)} left at their initial values",
        *([f"  in part: {', '.join(partial[:6])}{' ...' * (len(partial) > 6)}"] if partial else []),
        f"  not taken from the file: {', '.join(unused[:6]) or 'nothing'}"
        f"{' ...' * (len(unused) > 6)}",
        f"  initial values kept: {', '.join(missing[:6]) or 'none'}{' ...' * (len(missing) > 6)}",
    ]


@torch.no_grad()
def inherit(net: Supernet, source: Path, config: RunConfig) -> list[str]:
    """Fill `net`, the network of `config`, from a supernet checkpoint; returns a report.

    `net` is the checkpoint's whole space or one of its sub-networks: it takes the leading block of
    every parameter. Heads of datasets that the checkpoint lacks keep their initial values. Raises
    ConfigError when the checkpoint's network differs in anything else.
    """
    path = find_checkpoint(source, PLAIN_FILES)
    ours, theirs = network_of(config), network_of(read_run_config(path))
    classes, known = ours.pop("num_classes"), theirs.pop("num_classes")
    if theirs["vimnas.arch"] is None:  # a whole space contains each of its members
        ours.pop("vimnas.arch"), theirs.pop("vimnas.arch")
    for name in classes.keys() & known.keys():
        ours[f"{name}.num_classes"], theirs[f"{name}.num_classes"] = classes[name], known[name]
    for key, value in ours.items():
        if theirs[key] != value:
            raise ConfigError(
                f"vimnas.model.inherit: {path} is of another network: {key} {theirs[key]}, "
                f"here {value}"
            )
    try:
        state, layouts = load_file(str(path / WEIGHTS_FILE)), net.layouts()
    except SafetensorError as err:
        raise ConfigError(
            f"vimnas.model.inherit: cannot read {path / WEIGHTS_FILE}: {err}"
        ) from err
    kept = []
    for name, own in net.named_parameters():
        if name not in state:
            kept.append(name)
            continue
        shape = layouts[name].shape
        groups = shape[0] if len(shape) > own.ndim else 1  # q, k and v, stacked
        given = state[name].float().view(groups, -1, *state[name].shape[1:])
        target = own.view(groups, -1, *own.shape[1:])
        target.copy_(given[tuple(slice(0, n) for n in target.shape)])
    left = f"; initial values kept: {', '.join(kept)}" if kept else ""
    return [f"inherited {len(layouts) - len(kept)} parameters from {path}{left}"]


def _as_block(given: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The tensor seen as the parameter's block: stacked q, k, v split, patch kernels flattened."""
    if len(shape) >= 2 and shape[0] == 3 and given.ndim == len(shape) - 1:
        return given.view(3, given.shape[0] // 3, *given.shape[1:]) if len(given) % 3 == 0 else None
    if given.ndim in (4, 5) and len(shape) == 2:  # a patch embedding
        given = given.flatten(1)
        return given if given.shape[1] == shape[1] else None
    return given if given.ndim == len(shape) else None
