"""The files of one run, and when a run may write them.

OUTPUT_DIR/config.json     the configuration as it ran
OUTPUT_DIR/labels.json     class names by dataset
OUTPUT_DIR/train.log       every line of the console
OUTPUT_DIR/tensorboard/    event files
OUTPUT_DIR/checkpoints/    step00001234/ ..., latest
OUTPUT_DIR/summary.json    results on the test splits
OUTPUT_DIR/search_cache/   evaluations of the searches, by checkpoint
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vimnas_ds.config import ConfigError, RunConfig, load_config
from vimnas_ds.train.ranks import Ranks, gather_objects

#: plain files in a checkpoint, beside DeepSpeed's shards
WEIGHTS_FILE = "supernet.safetensors"
EMA_FILE = "ema.safetensors"  #: in runs with vimnas.ema
ALPHAS_FILE = "alphas.safetensors"
POSITION_FILE = "position.json"


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used; the message says which and why."""


@dataclass(frozen=True)
class RunFiles:
    """Paths under a run's folder."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def labels(self) -> Path:
        return self.root / "labels.json"

    @property
    def log(self) -> Path:
        return self.root / "train.log"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def search_cache(self) -> Path:
        return self.root / "search_cache"

    def remove(self) -> None:
        """Delete an earlier run's files (these only, whatever else the folder holds)."""
        for folder in (self.tensorboard, self.checkpoints, self.search_cache):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.config, self.labels, self.log, self.summary):
            file.unlink(missing_ok=True)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the latest under it (a run or its folder).

    Raises CheckpointError, saying what was looked for, when there is none.
    """
    if (path / WEIGHTS_FILE).is_file():
        return path
    for root in (path, path / "checkpoints"):
        latest = root / "latest"
        if latest.is_file():
            found = root / Path(latest.read_text().strip()).name
            if (found / WEIGHTS_FILE).is_file():
                return found
            raise CheckpointError(f"{latest} names {found.name}, which is not complete")
    raise CheckpointError(f"no checkpoint at {path}: neither one itself nor a 'latest' file")


def read_run_config(checkpoint: Path, overrides: list[str] | None = None) -> RunConfig:
    """The configuration of the run that `checkpoint` belongs to."""
    return load_config(checkpoint.parent.parent / "config.json", overrides)


def network_of(config: RunConfig) -> dict[str, Any]:
    """What decides the shapes and the meaning of a run's weights, by key."""
    section = config.vimnas
    return {
        "vimnas.space": section.space,
        "vimnas.arch": section.arch and section.arch.arch(),
        "vimnas.tokens": section.tokens.geometry(),
        "vimnas.model.qk_norm": section.model.qk_norm,
        "vimnas.model.layer_scale": section.model.layer_scale is not None,
        "num_classes": {n: d.num_classes for n, d in section.data.datasets.items()},
    }


def check_same_network(checkpoint: Path, config: RunConfig) -> None:
    """Raise ConfigError, naming the key, if `checkpoint` is of another network than `config`'s."""
    theirs = network_of(read_run_config(checkpoint))
    for key, ours in network_of(config).items():
        if theirs[key] != ours:
            raise ConfigError(
                f"{checkpoint} is of another network: {key} {theirs[key]}, now {ours}"
            )


def choose_start(files: RunFiles, resume: str | None, overwrite: bool) -> Path | None:
    """The checkpoint to start from, None for a fresh run.

    `resume` is None, "latest" or a path. Raises ConfigError rather than mixing two runs.
    """
    if resume is not None and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    if resume is not None:
        return find_checkpoint(files.root if resume == "latest" else Path(resume))
    if files.checkpoints.is_dir() and not overwrite:
        raise ConfigError(
            f"{files.root} already holds a run: --resume continues it, --overwrite starts anew, "
            "--set vimnas.output_dir=... goes elsewhere"
        )
    return None


def config_object(config: RunConfig) -> dict[str, Any]:
    """The configuration as one JSON object, defaults included; loads back as it was."""
    vimnas = config.vimnas.model_dump(mode="json")
    return {"about": config.about, **config.deepspeed, "vimnas": vimnas}


def claim_folder(
    files: RunFiles,
    config: RunConfig,
    labels: Mapping[str, Sequence[str]],
    ranks: Ranks,
    overwrite: bool,
) -> None:
    """Begin a run in its folder: clear an earlier one if asked to, write config.json
    and labels.json (class names by dataset); on all ranks together.

    Raises ConfigError when some rank does not see rank 0's files: checkpoints need a file system
    that all nodes share.
    """
    token = json.dumps(config_object(config), indent=2) + "\n"
    if ranks.is_main:
        if overwrite:
            files.remove()
        files.root.mkdir(parents=True, exist_ok=True)
        files.labels.write_text(json.dumps(labels, indent=2) + "\n")
        files.config.write_text(token)
    dist.barrier()
    deadline = time.monotonic() + 20  # network file systems show new files late
    while not (seen := files.config.is_file() and files.config.read_text() == token):
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    blind = [rank for rank, sees in enumerate(gather_objects(seen)) if not sees]
    if blind:
        raise ConfigError(
            f"vimnas.output_dir {files.root}: ranks {blind} do not see rank 0's files there; it "
            "must lie on a file system that all nodes share"
        )
