"""Weights from elsewhere as an ordinary run: what the tools that need no engine read of one.

There is one checkpoint, of step 0, with neutral alphas and no optimiser's state: it is searched,
evaluated, exported and inherited from, but cannot be resumed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence

import torch

from vimnas_ds.checkpoint_names import LATEST, checkpoint_name, newest_first
from vimnas_ds.config import ConfigError, RunConfig
from vimnas_ds.durable import publish_folder, write_text
from vimnas_ds.manifest import FileEntry, write_manifest
from vimnas_ds.model.alphas import Alphas
from vimnas_ds.model.supernet import Supernet
from vimnas_ds.tensor_file import save_tensors
from vimnas_ds.train.run_files import (
    ALPHAS_FILE,
    POSITION_FILE,
    WEIGHTS_FILE,
    RunFiles,
    config_object,
)
from vimnas_ds.train.schedule import DataCursor


def check_free(files: RunFiles) -> None:
    """Raise ConfigError if the folder holds a run."""
    if files.config.exists() or newest_first(files.checkpoints):
        raise ConfigError(f"{files.root} already holds a run: delete it, or choose another folder")


def write_imported(net: Supernet, config: RunConfig, labels: Mapping[str, Sequence[str]]) -> None:
    """Write `net`, the network of `config`, as a run in its output_dir. Raises ConfigError if there
    is one."""
    files = RunFiles(config.vimnas.output_dir)
    check_free(files)
    hidden = files.checkpoints / f".tmp-{checkpoint_name(0)}"
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    weights = {name: p.detach().cpu().contiguous() for name, p in net.named_parameters()}
    save_tensors(weights, hidden / WEIGHTS_FILE)
    alphas = Alphas(net.space, 0.0, torch.Generator()).state_dict()
    save_tensors(alphas, hidden / ALPHAS_FILE)
    write_text(hidden / POSITION_FILE, json.dumps(DataCursor().state_dict(), indent=2))
    entries = {file.name: FileEntry.of(file) for file in hidden.iterdir()}
    write_manifest(hidden, entries, {"step": 0, "world_size": 1})
    write_text(files.labels, json.dumps(labels, indent=2) + "\n")
    write_text(files.config, json.dumps(config_object(config), indent=2) + "\n")
    publish_folder(hidden, files.checkpoints / checkpoint_name(0))
    write_text(files.checkpoints / LATEST, checkpoint_name(0))
