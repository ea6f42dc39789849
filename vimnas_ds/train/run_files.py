"""The files of one run, and the checkpoint that a path means.

OUTPUT_DIR/config.json     the configuration as it ran
OUTPUT_DIR/labels.json     class names by dataset
OUTPUT_DIR/environment.json  machine and versions of its latest start, and where it went on from
OUTPUT_DIR/train.log       every line of the console
OUTPUT_DIR/tensorboard/    event files
OUTPUT_DIR/checkpoints/    step00001234/ ..., latest, best
OUTPUT_DIR/summary.json    results on the test splits
OUTPUT_DIR/status.json     how the run stands, or ended; the command that resumes it
OUTPUT_DIR/search_cache/   evaluations of the searches, by checkpoint
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vimnas_ds.checkpoint_names import BEST, LATEST, named, newest_first
from vimnas_ds.config import ConfigError, RunConfig, load_config
from vimnas_ds.manifest import Damaged, verify

log = logging.getLogger(__name__)

#: files of a checkpoint
WEIGHTS_FILE = "supernet.safetensors"
EMA_FILE = "ema.safetensors"  #: in runs with vimnas.ema
ALPHAS_FILE = "alphas.safetensors"
POSITION_FILE = "position.json"
#: what a tool that needs no engine reads
PLAIN_FILES = (WEIGHTS_FILE, ALPHAS_FILE, POSITION_FILE)


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used; the message says which and why."""


class CannotRead(ConfigError):
    """A checkpoint that a disk does not let read now and that may be whole: no other one is taken
    in its place, for that would give it up."""


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
    def environment(self) -> Path:
        return self.root / "environment.json"

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
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def search_cache(self) -> Path:
        return self.root / "search_cache"

    def holds(self, checkpoint: Path) -> bool:
        """Whether it is one of this run's, there or not."""
        return checkpoint.parent.resolve() == self.checkpoints.resolve()

    def remove(self) -> None:
        """Delete an earlier run's files (these only, whatever else the folder holds)."""
        for folder in (self.tensorboard, self.checkpoints, self.search_cache):
            shutil.rmtree(folder, ignore_errors=True)
        kept = (self.config, self.labels, self.environment, self.log, self.summary, self.status)
        for file in kept:
            file.unlink(missing_ok=True)


def find_checkpoint(path: Path, parts: Sequence[str] | None = None) -> Path:
    """The checkpoint that `path` means: itself, the one that a file `latest` or `best` names, or
    the newest under it (a run, or its folder of checkpoints) that is whole.

    Its files, all or `parts`, are read and compared with their checksums. A damaged newest one is
    named in the log, and the one before is taken. Raises CheckpointError, saying what was looked
    for, when there is none, and CannotRead.
    """
    if path.name in (LATEST, BEST) and (said := named(path.parent, path.name)) is not None:
        path = path.parent / (Path(said).name or path.name)  # an empty file names nothing
    if (path / WEIGHTS_FILE).is_file():
        try:
            _verify(path, parts)
        except Damaged as err:
            raise CheckpointError(str(err)) from err
        return path
    problems = []
    for root in (path, path / "checkpoints"):
        for found in newest_first(root):
            try:
                _verify(found, parts)
            except Damaged as err:
                problems.append(str(err))
            else:
                if problems:
                    log.warning("%s; going back to %s", "; ".join(problems), found.name)
                return found
    if problems:
        raise CheckpointError(f"no undamaged checkpoint at {path}: " + "; ".join(problems))
    raise CheckpointError(
        f"no checkpoint at {path}: neither one itself nor a run that has saved one"
    )


def _verify(checkpoint: Path, parts: Sequence[str] | None) -> None:
    try:
        verify(checkpoint, parts)
    except OSError as err:
        raise CannotRead(
            f"{checkpoint} cannot be read now: {err}. It may be whole: nothing is deleted and no "
            "older one taken. Try again when its disk is well; if it stays so, move the folder away"
        ) from err


def read_run_config(checkpoint: Path, overrides: list[str] | None = None) -> RunConfig:
    """The configuration of the run that `checkpoint` belongs to."""
    return load_config(checkpoint.parent.parent / "config.json", overrides)


_SHAPING = (
    "gelu", "norm_eps", "class_token", "positions", "relative_positions", "packed_qkv_bias",
)  # fmt: skip


def network_of(config: RunConfig) -> dict[str, Any]:
    """What decides the shapes and the meaning of a run's weights, by key."""
    section = config.vimnas
    return {
        "vimnas.space": section.space,
        "vimnas.arch": section.arch and section.arch.arch(),
        "vimnas.tokens": section.tokens.geometry(),
        "vimnas.model.qk_norm": section.model.qk_norm,
        "vimnas.model.layer_scale": section.model.layer_scale is not None,
        **{f"vimnas.model.{key}": getattr(section.model, key) for key in _SHAPING},
        "patches along an image's side": section.side,
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


def config_object(config: RunConfig) -> dict[str, Any]:
    """The configuration as one JSON object, defaults included; loads back as it was."""
    vimnas = config.vimnas.model_dump(mode="json")
    return {"about": config.about, **config.deepspeed, "vimnas": vimnas}
