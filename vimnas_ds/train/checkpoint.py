"""Atomic checkpoints around DeepSpeed's: `latest` never names an incomplete one.

DeepSpeed writes into its final folder and moves `latest` before every shard is there. Here a
checkpoint is written under a hidden name, flushed to disk, renamed, and only then named by
`latest`. Beside DeepSpeed's shards (weights, fp32 masters, moments) it holds what DeepSpeed leaves
out: update counts, alphas and their Adam, the data cursor, the RNG of all ranks, and the trained
weights, alphas and the position as plain safetensors and JSON, for every tool that needs no engine.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from vimnas_ds.durable import flush, publish_folder
from vimnas_ds.train.engine import Engine
from vimnas_ds.train.ranks import Ranks, gather_objects
from vimnas_ds.train.run_files import (
    ALPHAS_FILE,
    POSITION_FILE,
    WEIGHTS_FILE,
    CheckpointError,
)

STATE_KEY = "vimnas"  # DeepSpeed keeps its own state in the same dictionary


def _rng_state() -> dict[str, Any]:
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 (timm draws from it)
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save_checkpoint(
    root: Path, step: int, engine: Engine, state: dict[str, Any], ranks: Ranks, keep: int
) -> Path:
    """Save everything under root/stepNNNNNNNN on all ranks; the last `keep` stay. Collective."""
    tag, hidden = f"step{step:08d}", f".tmp-step{step:08d}"
    if ranks.is_main:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(root / hidden, ignore_errors=True)
    state = {
        **state,
        "counts": engine.optimizer.counts_state(),
        "rng": gather_objects(_rng_state()),
    }
    dist.barrier()
    engine.deepspeed.save_checkpoint(
        str(root), tag=hidden, client_state={STATE_KEY: state}, save_latest=False
    )
    for shard in (root / hidden).glob(f"*pp_rank_{ranks.rank}_*optim_states.pt"):
        flush(shard)  # by its writer: elsewhere it may still be in another machine's cache
    weights = engine.weights(keep=ranks.is_main)
    dist.barrier()  # every shard is written
    if ranks.is_main:
        save_file(weights, str(root / hidden / WEIGHTS_FILE))
        save_file(_contiguous(state["learner"]["alphas"]), str(root / hidden / ALPHAS_FILE))
        (root / hidden / POSITION_FILE).write_text(json.dumps(state["position"], indent=2))
        publish_folder(root / hidden, root / tag)
        _write_latest(root, tag)
        saved = sorted(p for p in root.glob("step*") if p.is_dir() and p.name != tag)
        for old in saved[: max(len(saved) - keep + 1, 0)]:
            shutil.rmtree(old)
    dist.barrier()
    return root / tag


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _write_latest(root: Path, tag: str) -> None:
    fresh = root / "latest.new"
    fresh.write_text(tag)
    flush(fresh)
    fresh.replace(root / "latest")
    flush(root)


def load_checkpoint(path: Path, engine: Engine, ranks: Ranks) -> dict[str, Any]:
    """Restore weights, masters, moments, counts and this rank's RNG; returns our own state.

    Raises CheckpointError when it is not ours or was saved by another number of ranks.
    """
    shards = list(path.glob("*_optim_states.pt"))
    if len(shards) != ranks.world_size:
        raise CheckpointError(
            f"{path} was saved by {len(shards)} ranks, this run has {ranks.world_size}: "
            "start as many"
        )
    clipping = engine.deepspeed.optimizer.clip_grad
    loaded, client = engine.deepspeed.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None or STATE_KEY not in client:
        raise CheckpointError(f"{path} is not a checkpoint of this project")
    engine.deepspeed.optimizer.clip_grad = clipping  # DeepSpeed restores the saved run's value
    state: dict[str, Any] = client[STATE_KEY]
    engine.optimizer.load_counts(state["counts"])
    _set_rng_state(state["rng"][ranks.rank])
    return state
