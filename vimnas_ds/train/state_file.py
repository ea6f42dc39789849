"""Python values with tensors among them, in one safetensors file: no pickle, nothing is code.

The tensors lie in the file under their paths ("learner/alphas/depth"); its metadata holds the rest
as JSON. Numbers, texts, None, lists, tuples and dicts come back as they were, keys' types included.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vimnas_ds.tensor_file import save_tensors


def write_state(path: Path, value: Any, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Write `value`, and beside it `tensors` under their own names."""
    found = dict(tensors or {})
    tree = _pack(value, "", found)
    save_tensors(found, path, metadata={"state": json.dumps(tree)})


def read_state(path: Path) -> Any:
    """What `write_state` was given. Raises ValueError or SafetensorError on another file."""
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        if not metadata or "state" not in metadata:
            raise ValueError(f"{path} holds no state")
        return _unpack(json.loads(metadata["state"]), file)


def _pack(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": [[k, _pack(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        packed = [_pack(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
        return {"tuple": packed} if isinstance(value, tuple) else packed
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: a {type(value).__name__} cannot be saved")


def _unpack(tree: Any, file: Any) -> Any:
    if isinstance(tree, list):
        return [_unpack(v, file) for v in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return file.get_tensor(content)
    if kind == "tuple":
        return tuple(_unpack(v, file) for v in content)
    return {key: _unpack(v, file) for key, v in content}
