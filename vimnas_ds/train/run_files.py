"""The files of one run, and when a run may write them.

OUTPUT_DIR/config.json     the configuration as it ran
OUTPUT_DIR/labels.json     class names by dataset
OUTPUT_DIR/environment.json  machine and versions of its latest start
OUTPUT_DIR/train.log       every line of the console
OUTPUT_DIR/tensorboard/    event files
OUTPUT_DIR/checkpoints/    step00001234/ ..., latest, best
OUTPUT_DIR/summary.json    results on the test splits
OUTPUT_DIR/status.json     how the run stands, or ended; the command that resumes it
OUTPUT_DIR/search_cache/   evaluations of the searches, by checkpoint
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vimnas_ds.config import ConfigError, RunConfig, load_config
from vimnas_ds.durable import REPLACED, restore_replaced, write_text
from vimnas_ds.manifest import Damaged, verify
from vimnas_ds.train.circumstances import environment
from vimnas_ds.train.ranks import Ranks, gather_objects, run_together

log = logging.getLogger(__name__)

#: files of a checkpoint
WEIGHTS_FILE = "supernet.safetensors"
EMA_FILE = "ema.safetensors"  #: in runs with vimnas.ema
ALPHAS_FILE = "alphas.safetensors"
POSITION_FILE = "position.json"
#: what a tool that needs no engine reads
PLAIN_FILES = (WEIGHTS_FILE, ALPHAS_FILE, POSITION_FILE)
#: files that name one checkpoint beside them: the last one, and the one with the best scores
LATEST, BEST = "latest", "best"


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

    def remove(self) -> None:
        """Delete an earlier run's files (these only, whatever else the folder holds)."""
        for folder in (self.tensorboard, self.checkpoints, self.search_cache):
            shutil.rmtree(folder, ignore_errors=True)
        kept = (self.config, self.labels, self.environment, self.log, self.summary, self.status)
        for file in kept:
            file.unlink(missing_ok=True)


def checkpoint_name(step: int) -> str:
    return f"step{step:08d}"


def newest_first(root: Path) -> list[Path]:
    """The checkpoints under a run's folder of them, up to the one that `latest` names."""
    names = sorted(p.name for p in root.glob("step*") if p.is_dir())
    if (root / LATEST).is_file():
        named = (root / LATEST).read_text().strip()
        if named in names:  # else it is itself damaged, and says nothing
            names = [name for name in names if name <= named]
    return [root / name for name in reversed(names)]


def find_checkpoint(path: Path, parts: Sequence[str] | None = None) -> Path:
    """The checkpoint that `path` means: itself, the one that a file `latest` or `best` names, or
    the newest under it (a run, or its folder of checkpoints) that is whole.

    Its files, all or `parts`, are read and compared with their checksums. A damaged newest one is
    named in the log, and the one before is taken. Raises CheckpointError, saying what was looked
    for, when there is none.
    """
    if path.is_file() and path.name in (LATEST, BEST):
        path = path.parent / Path(path.read_text().strip()).name
    if (path / WEIGHTS_FILE).is_file():
        try:
            verify(path, parts)
        except Damaged as err:
            raise CheckpointError(str(err)) from err
        return path
    problems = []
    for root in (path, path / "checkpoints"):
        for found in newest_first(root):
            try:
                verify(found, parts)
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


def choose_start(files: RunFiles, resume: str | None, overwrite: bool) -> Path | None:
    """The checkpoint to start from, None for a fresh run.

    `resume` is None, "latest", "auto" (latest, or a fresh run where there is none) or a path. For
    the run's own process alone: it holds the folder from here on, and puts right what an earlier
    one died over. Raises ConfigError rather than mixing two runs.
    """
    if resume is not None and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    replaced = any(files.checkpoints.glob(REPLACED + "*"))
    if resume is None and not overwrite and (replaced or newest_first(files.checkpoints)):
        raise ConfigError(
            f"{files.root} already holds a run: --resume continues it, --overwrite starts anew, "
            "--set vimnas.output_dir=... goes elsewhere"
        )
    if resume == "auto":
        begun = files.config.is_file() or replaced or newest_first(files.checkpoints)
        resume = "latest" if begun else None
    found = None
    if resume is not None and resume != "latest":
        found = find_checkpoint(Path(resume))
        if found.parent.resolve() != files.checkpoints.resolve() and newest_first(
            files.checkpoints
        ):
            raise ConfigError(
                f"{files.root} holds a run of its own and cannot continue {found}: "
                "--set vimnas.output_dir=... goes elsewhere"
            )
    hold_folder(files)
    restore_replaced(files.checkpoints)
    if resume == "latest":
        if not files.config.is_file() and not newest_first(files.checkpoints):
            raise ConfigError(
                f"{files.root} holds no run to resume: leave --resume out to begin one, or say "
                "--resume auto, which resumes what is there and else begins"
            )
        if files.config.is_file() and not newest_first(files.checkpoints):
            log.warning("%s was begun and has saved nothing yet: it starts anew", files.root)
            return None
        return find_checkpoint(files.root)
    return found


_held: dict[Path, int] = {}  # folders whose lock this process has, with their file descriptors


def hold_folder(files: RunFiles, seconds: float = 40.0) -> None:
    """See that no other process writes a run into this folder until this one ends; an earlier one
    that is about to end (see `vimnas.faults.grace_seconds`) gets `seconds` for it.

    Raises ConfigError naming the other. Nothing is done where there is no folder yet.
    """
    root = files.root.resolve()
    if root in _held or not root.is_dir():
        return
    handle = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(handle)
                raise ConfigError(
                    f"{files.root} is being written by another process ({_writer_of(files)}): wait "
                    "for its end, or --set vimnas.output_dir=... goes elsewhere"
                ) from None
            time.sleep(0.5)
        else:
            _held[root] = handle
            return


def _writer_of(files: RunFiles) -> str:
    try:
        status = json.loads(files.status.read_text())
        return f"last known: process {status['pid']} on {status['host']}"
    except (OSError, ValueError, KeyError):
        return "it has not said which"


def config_object(config: RunConfig) -> dict[str, Any]:
    """The configuration as one JSON object, defaults included; loads back as it was."""
    vimnas = config.vimnas.model_dump(mode="json")
    return {"about": config.about, **config.deepspeed, "vimnas": vimnas}


def claim_folder(
    files: RunFiles,
    config: RunConfig,
    labels: Mapping[str, Sequence[str]],
    ranks: Ranks,
    anew: bool,
) -> None:
    """Begin a run in its folder, or go on with it: clear an earlier one where this one starts
    anew, write config.json, labels.json (class names by dataset) and environment.json; on all ranks
    together.

    Raises ConfigError when some rank does not see rank 0's files: checkpoints need a file system
    that all nodes share.
    """
    token = json.dumps(config_object(config), indent=2) + "\n"

    def claim() -> None:
        files.root.mkdir(parents=True, exist_ok=True)
        hold_folder(files)
        if anew:
            files.remove()
        for remains in files.root.glob(f"{files.status.name}.*"):
            remains.unlink()  # of a rank that was killed while it wrote its status
        write_text(files.labels, json.dumps(labels, indent=2) + "\n")
        write_text(files.environment, json.dumps(environment(ranks), indent=2) + "\n")
        write_text(files.config, token)

    run_together(lambda: claim() if ranks.is_main else None, ranks)
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
