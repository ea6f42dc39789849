"""The optimiser's elementwise state (moments, EMA), rank by rank, for any number of ranks.

ZeRO-2 cuts one flat tensor of all parameters into as many parts as there are ranks. What is saved
is cut at the parameters' borders too, one tensor "STATE/PARAMETER@START" per fragment, so that any
other number of ranks can put its own fragments together from whatever files hold them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from vimnas_ds.train.optimizer import SampledAdamW
from vimnas_ds.train.run_files import CheckpointError


def rank_file(rank: int, world_size: int) -> str:
    return f"rank{rank:05d}-of-{world_size:05d}.safetensors"


def elementwise(optimizer: SampledAdamW, flat: Tensor) -> dict[str, Tensor]:
    """The states of a flat tensor that have one number for each of its elements."""
    return {
        key: value
        for key, value in optimizer.state[flat].items()
        if isinstance(value, Tensor) and value.shape == flat.shape
    }


def fragment_tensors(optimizer: SampledAdamW) -> dict[str, Tensor]:
    """This rank's share of all elementwise states, on the CPU, as it goes into its file."""
    found = {}
    for flat, fragments in optimizer.fragments.items():
        for key, state in elementwise(optimizer, flat).items():
            for f in fragments:
                part = state.view(-1)[f.flat_start : f.flat_start + f.numel]
                found[f"{key}/{f.name}@{f.param_start}"] = part.cpu()
    return found


@torch.no_grad()
def load_fragments(optimizer: SampledAdamW, files: Sequence[Path]) -> None:
    """Fill this rank's elementwise states from the files of whatever ranks saved them.

    Raises CheckpointError when an element that is needed stands in none of them.
    """
    with ExitStack() as stack:
        places: dict[str, list[tuple[int, int, Any, str]]] = defaultdict(list)
        for path in files:
            file = stack.enter_context(safe_open(str(path), framework="pt"))
            for key in file.keys():
                what, at, start = key.rpartition("@")
                if at:
                    (numel,) = file.get_slice(key).get_shape()
                    places[what].append((int(start), numel, file, key))
        for flat, fragments in optimizer.fragments.items():
            for key, state in elementwise(optimizer, flat).items():
                for f in fragments:
                    target = state.view(-1)[f.flat_start : f.flat_start + f.numel]
                    what = f"{key}/{f.name}"
                    if _fill(target, f.param_start, places[what]) != f.numel:
                        raise CheckpointError(
                            f"{files[0].parent} does not hold all of {what}: it was saved with "
                            "other switches, or its network is another"
                        )


def whole_states(folder: Path, saved_by: int) -> dict[str, Tensor]:
    """All elementwise states of a checkpoint, put together: "STATE/PARAMETER" -> one flat tensor
    (float32, the parameter's elements in row-major order)."""
    parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for rank in range(saved_by):
        for key, tensor in load_file(str(folder / rank_file(rank, saved_by))).items():
            what, at, start = key.rpartition("@")
            if at:
                parts[what][int(start)] = tensor
    return {what: torch.cat([p[start] for start in sorted(p)]) for what, p in parts.items()}


def _fill(target: Tensor, start: int, parts: Sequence[tuple[int, int, Any, str]]) -> int:
    """Copy what `parts` hold of elements start .. start + len(target); returns how many."""
    copied = 0
    for first, numel, file, key in parts:
        low, high = max(start, first), min(start + len(target), first + numel)
        if low < high:
            target[low - start : high - start] = file.get_slice(key)[low - first : high - first]
            copied += high - low
    return copied


def fragment_files(folder: Path, rank: int, world_size: int, saved_by: int) -> list[Path]:
    """The rank files that rank `rank` of `world_size` needs of those that `saved_by` ranks wrote:
    its own where the number is the same, else all."""
    ranks = [rank] if saved_by == world_size else range(saved_by)
    return [folder / rank_file(r, saved_by) for r in ranks]
