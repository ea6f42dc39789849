"""A trained supernet opened for search: its configuration, weights, alphas and data.

Only plain files are read (JSON, safetensors); no engine is started. Every rank sees all samples of
a split and takes other candidates, so a candidate's score never depends on the number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vimnas_ds.config import ConfigError, RunConfig
from vimnas_ds.data.catalog import Sample
from vimnas_ds.data.index_build import file_stats
from vimnas_ds.data.joint import JointData, Loaders
from vimnas_ds.data.listing import LOSSLESS
from vimnas_ds.data.shards import MEMBERS
from vimnas_ds.manifest import Damaged, read_manifest, verify
from vimnas_ds.model.supernet import Supernet
from vimnas_ds.train.engine import build_supernet
from vimnas_ds.train.evaluate import Evaluator
from vimnas_ds.train.open_data import open_data
from vimnas_ds.train.ranks import (
    Ranks,
    check_agreement,
    gather_objects,
    rank_zero_decides,
    run_together,
    settle_on_cpu,
)
from vimnas_ds.train.run_files import (
    ALPHAS_FILE,
    EMA_FILE,
    PLAIN_FILES,
    POSITION_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    RunFiles,
    check_same_network,
    find_checkpoint,
    network_of,
    read_run_config,
)

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)


@dataclass
class TrainedNetwork:
    """A checkpoint's network in eval mode, with what it was trained as; no data."""

    config: RunConfig
    checkpoint: Path
    net: Supernet
    dtype: torch.dtype
    weights: str  #: digest of the weights
    ema: bool  #: whether they are the moving average

    @property
    def files(self) -> RunFiles:
        return RunFiles(self.checkpoint.parent.parent)

    @property
    def datasets(self) -> tuple[str, ...]:
        return tuple(self.config.vimnas.data.datasets)


@dataclass
class SearchRun(TrainedNetwork):
    """What a search works on."""

    alphas: dict[str, torch.Tensor]
    position: dict[str, Any]
    data: JointData
    loaders: Loaders
    evaluator: Evaluator
    ranks: Ranks

    def map_over_ranks(
        self, function: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]
    ) -> list[R]:
        """function(items), computed in parts by the ranks; the same list on all of them."""
        world, rank = self.ranks.world_size, self.ranks.rank
        mine = list(function(items[rank::world])) if items[rank::world] else []
        if world == 1:
            return mine
        parts = gather_objects(mine)
        return [parts[i % world][i // world] for i in range(len(items))]

    def identity(self, dataset: str) -> dict[str, Any]:
        """All that the outcome of evaluating a candidate on a dataset's select split depends on."""
        section = self.config.vimnas
        recipe = section.data.datasets[dataset].model_dump(mode="json")
        seen = {key: recipe[key] for key in ("kind", "size", "resize", "frames", "fps")}
        samples, data = self.data.splits[dataset]["select"], section.data.datasets[dataset]
        assert data.folder is not None
        paths = [s.path for s in samples] if data.shards is None else [MEMBERS]
        files = file_stats(data.folder, paths).tolist()
        return {
            "weights": self.weights,
            "network": {key: repr(value) for key, value in network_of(self.config).items()},
            "numerics": [
                str(self.dtype),
                self.ranks.device.type,
                section.log.eval_batch,
                torch.__version__,
            ],
            "dataset": [dataset, seen],
            "samples": [[s.path, s.label] for s in samples],
            "files": files,
        }

    def left_out(self) -> dict[str, dict[str, str]]:
        """Files that no evaluation could read so far: dataset -> path -> reason."""
        return {name: reasons for name, reasons in self.evaluator.skipped.items() if reasons}

    def close(self) -> None:
        self.loaders.close()


def latest_run(root: Path = Path("runs")) -> Path:
    """The run under `root` whose checkpoint was saved last. Raises ConfigError if there is none."""
    found = [p for p in root.glob("**/checkpoints/latest") if p.is_file()]
    if not found:
        raise ConfigError(f"no run with a checkpoint under {root}/: train first, or name one")
    return max(found, key=lambda p: p.stat().st_mtime).parent.parent


def choose_checkpoint(checkpoint: Path | None, ranks: Ranks) -> Path:
    """What `checkpoint` means (a run's folder, one checkpoint, or None: the latest run's); rank 0
    decides, since a training may be saving at this moment.

    Raises ConfigError or CheckpointError in words, or CannotStart where rank 0 did.
    """

    def decide() -> str:
        if checkpoint is not None:
            return str(find_checkpoint(checkpoint, PLAIN_FILES))
        found = find_checkpoint(latest_run(), PLAIN_FILES)
        log.warning("--checkpoint is not given: the latest run's, %s", found)
        return str(found)

    return Path(rank_zero_decides(decide, ranks))


def open_network(
    path: Path, ranks: Ranks, overrides: Sequence[str] = (), ema: bool = False
) -> TrainedNetwork:
    """Open a checkpoint found by `choose_checkpoint`; `ema`: with the moving average of the weights
    in their place.

    Raises ConfigError or CheckpointError in words when something is not there or does not fit.
    """
    config = read_run_config(path, list(overrides))
    if overrides:
        check_same_network(path, config)
        trained, now = read_run_config(path).vimnas.data.held_out, config.vimnas.data.held_out
        if trained != now:
            raise ConfigError(
                f"vimnas.data.held_out is {trained} in {path.parent.parent}, now {now}: files that "
                "were trained on would be scored; train anew with it"
            )
    file = path / (EMA_FILE if ema else WEIGHTS_FILE)
    if ema and not file.is_file():
        raise CheckpointError(
            f"{path} holds no moving average of the weights: leave out --ema, or train with "
            "--set vimnas.ema={}"
        )
    settle_on_cpu(config.vimnas.cpu_threads, ranks)
    net = build_supernet(config)
    try:
        manifest = verify(path, [EMA_FILE]) if ema else read_manifest(path)
        net.load_state_dict(load_file(str(file)))
    except (OSError, RuntimeError, SafetensorError, Damaged) as err:
        raise CheckpointError(f"{file} cannot be used: {err}") from err
    dtype = torch.bfloat16 if config.bf16(ranks.device.type == "cuda") else torch.float32
    net = net.to(ranks.device, dtype).eval().requires_grad_(False)
    return TrainedNetwork(config, path, net, dtype, manifest.files[file.name].sha256, ema)


def open_run(
    checkpoint: Path | None,
    ranks: Ranks,
    overrides: Sequence[str] = (),
    samples: int | None = None,
    ema: bool = False,
) -> SearchRun:
    """Open a checkpoint with its data; `samples` bounds every `select` split (see `thin_out`),
    `ema` as in `open_network`.

    Raises DataMissing, ConfigError, CheckpointError, CannotStart where another rank did, or
    RanksDisagree when the ranks see different files.
    """
    found = choose_checkpoint(checkpoint, ranks)
    network = run_together(lambda: open_network(found, ranks, overrides, ema), ranks)
    section, path = network.config.vimnas, network.checkpoint
    data = open_data(section.data, ranks, network.files.config)
    check_agreement(data.fingerprint(), "the lists of data files", ranks)
    if samples is not None:
        for parts in data.splits.values():
            parts["select"] = thin_out(parts["select"], samples)
    loaders = Loaders(data, section.seed, 0, 1, ranks.device)
    cache_mb, batch = section.data.cache_mb, section.log.eval_batch
    return SearchRun(
        network.config,
        path,
        network.net,
        network.dtype,
        network.weights,
        network.ema,
        *_alphas_and_position(path),
        data,
        loaders,
        Evaluator(loaders, ranks, network.dtype, batch, cache_mb),
        ranks,
    )


def _alphas_and_position(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        alphas = load_file(str(path / ALPHAS_FILE))
        return alphas, json.loads((path / POSITION_FILE).read_text())
    except (OSError, ValueError, SafetensorError) as err:
        raise CheckpointError(f"{path}: its alphas or its position cannot be read: {err}") from err


def thin_out(samples: Sequence[Sample], count: int) -> list[Sample]:
    """A fixed subset of at most `count`, classes in turn, chosen by the hash of the path."""
    classes: dict[int, list[Sample]] = {}
    for sample in sorted(samples, key=lambda s: hashlib.sha256(s.path.encode(*LOSSLESS)).digest()):
        classes.setdefault(sample.label, []).append(sample)
    turns = [(turn, s) for members in classes.values() for turn, s in enumerate(members)]
    turns.sort(key=lambda t: (t[0], t[1].label))
    return sorted(s for _, s in turns[:count])
