"""A trained supernet opened for search: its configuration, weights, alphas and data.

Only plain files are read (JSON, safetensors); no engine is started. Every rank sees all samples of
a split and takes other candidates, so a candidate's score never depends on the number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file

from vimnas_ds.config import ConfigError, RunConfig, load_config
from vimnas_ds.data.joint import JointData, Loaders, open_datasets
from vimnas_ds.model.supernet import Supernet
from vimnas_ds.train.engine import build_supernet
from vimnas_ds.train.evaluate import Evaluator
from vimnas_ds.train.ranks import Ranks, gather_objects, use_cpu_threads
from vimnas_ds.train.run_files import (
    ALPHAS_FILE,
    POSITION_FILE,
    WEIGHTS_FILE,
    RunFiles,
    find_checkpoint,
)

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class SearchRun:
    """What a search works on."""

    config: RunConfig
    checkpoint: Path
    net: Supernet
    alphas: dict[str, torch.Tensor]
    position: dict[str, Any]
    data: JointData
    loaders: Loaders
    evaluator: Evaluator
    ranks: Ranks

    @property
    def files(self) -> RunFiles:
        return RunFiles(self.checkpoint.parent.parent)

    @property
    def datasets(self) -> tuple[str, ...]:
        return tuple(self.config.vimnas.data.datasets)

    def map_over_ranks(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """function(item) for every item, shared among the ranks; the same list on all of them."""
        world, rank = self.ranks.world_size, self.ranks.rank
        mine = [function(item) for item in items[rank::world]]
        if world == 1:
            return mine
        parts = gather_objects(mine)
        return [parts[i % world][i // world] for i in range(len(items))]

    def close(self) -> None:
        self.loaders.close()


def latest_run(root: Path = Path("runs")) -> Path:
    """The run under `root` whose checkpoint was saved last. Raises ConfigError if there is none."""
    found = [p for p in root.glob("**/checkpoints/latest") if p.is_file()]
    if not found:
        raise ConfigError(f"no run with a checkpoint under {root}/: train first, or name one")
    return max(found, key=lambda p: p.stat().st_mtime).parent.parent


def open_run(
    checkpoint: Path | None, ranks: Ranks, overrides: Sequence[str] = (), cache_mb: int = 1024
) -> SearchRun:
    """Open a checkpoint (a run's folder, one checkpoint, or None: the latest run's).

    Raises ConfigError or CheckpointError in words when something is not there.
    """
    path = find_checkpoint(checkpoint if checkpoint is not None else latest_run())
    config = load_config(path.parent.parent / "config.json", list(overrides))
    section = config.vimnas
    use_cpu_threads(section.cpu_threads, ranks)
    net = build_supernet(config)
    net.load_state_dict(load_file(str(path / WEIGHTS_FILE)))
    dtype = torch.bfloat16 if config.bf16(ranks.device.type == "cuda") else torch.float32
    net = net.to(ranks.device, dtype).eval().requires_grad_(False)
    data = open_datasets(section.data)
    loaders = Loaders(data, section.seed, 0, 1, ranks.device)
    evaluator = Evaluator(loaders, ranks, dtype, section.log.eval_batch, cache_mb)
    return SearchRun(
        config,
        path,
        net,
        load_file(str(path / ALPHAS_FILE)),
        json.loads((path / POSITION_FILE).read_text()),
        data,
        loaders,
        evaluator,
        ranks,
    )
