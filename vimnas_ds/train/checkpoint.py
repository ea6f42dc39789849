"""Checkpoints that are there as a whole or not at all: safetensors and JSON, no pickle.

DeepSpeed's own are pickles, written in place, for one number of ranks. Here every rank writes its
share of the optimiser's state and its RNG, rank 0 the rest; under a hidden name, flushed to disk,
signed by a manifest of checksums, renamed, and only then named by `latest`. They hold all that a
run is: fp32 masters, moments and update counts, alphas and their Adam, the data cursor, the RNG of
all ranks. Bytes on disk: 4 per parameter for the weights and 4 for each elementwise state (12 with
AdamW's two moments, 20 with an EMA).
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vimnas_ds.checkpoint_names import (
    BEST,
    LATEST,
    checkpoint_name,
    checkpoints_in,
    named,
    newest_first,
)
from vimnas_ds.durable import (
    FRESH,
    discard,
    flush,
    publish_folder,
    restore_replaced,
    sweep,
    write_text,
)
from vimnas_ds.manifest import Damaged, FileEntry, read_manifest, write_manifest
from vimnas_ds.seeds import derive_seed
from vimnas_ds.tensor_file import save_tensors
from vimnas_ds.train.engine import Engine
from vimnas_ds.train.fragments import (
    elementwise,
    fragment_files,
    fragment_tensors,
    load_fragments,
    rank_file,
)
from vimnas_ds.train.ranks import CannotStart, Ranks, gather_objects, run_together
from vimnas_ds.train.run_files import (
    ALPHAS_FILE,
    EMA_FILE,
    POSITION_FILE,
    WEIGHTS_FILE,
    CheckpointError,
)
from vimnas_ds.train.state_file import read_state, write_state

log = logging.getLogger(__name__)

STATE_FILE = "state.safetensors"  #: everything that is neither weights nor elementwise


class SaveFailed(RuntimeError):
    """A checkpoint that could not be written; the message says why and which one is left."""


def save_checkpoint(
    root: Path,
    step: int,
    engine: Engine,
    state: dict[str, Any],
    ranks: Ranks,
    keep: int,
    is_best: bool = False,
    spared: Collection[int] = (),
) -> Path:
    """Save everything under root/stepNNNNNNNN on all ranks, and name it in `latest` (and `best`);
    the newest `keep`, the best and those of the steps `spared` stay. Collective.

    Raises SaveFailed on all ranks when one cannot write; what was saved before is left alone.
    """
    tag = checkpoint_name(step)
    hidden = root / f".tmp-{tag}"
    try:
        run_together(lambda: _prepare(hidden, engine) if ranks.is_main else None, ranks, True)
        whole = {WEIGHTS_FILE: engine.weights(keep=ranks.is_main)}
        if engine.optimizer.ema_decay is not None:
            whole[EMA_FILE] = engine.ema_weights(keep=ranks.is_main)

        def write() -> dict[str, FileEntry]:
            written = [_write_rank(hidden, engine, ranks)]
            if ranks.is_main:
                written += _write_shared(hidden, whole, engine, state)
            for file in written:
                flush(file)  # by its writer: elsewhere it may still be in another machine's cache
            return {file.name: FileEntry.of(file) for file in written}

        mine = run_together(write, ranks, True)
        files = {name: entry for part in gather_objects(mine) for name, entry in part.items()}

        def publish() -> None:
            write_manifest(hidden, files, {"step": step, "world_size": ranks.world_size})
            publish_folder(hidden, root / tag)
            write_text(root / LATEST, tag)

        run_together(lambda: publish() if ranks.is_main else None, ranks, True)
    except (OSError, SafetensorError, CannotStart) as err:
        if ranks.is_main:
            shutil.rmtree(hidden, ignore_errors=True)
            restore_replaced(root)
        raise SaveFailed(
            f"step {step} could not be saved under {root}: {err}; {last_good(root)}"
        ) from err
    if ranks.is_main:
        finish_save(root, keep, step if is_best else None, spared)
    return root / tag


def last_good(root: Path) -> str:
    """In words, what a run that ends now can be resumed from."""
    return f"the last good checkpoint: {next((p.name for p in newest_first(root)), 'none yet')}"


def finish_save(root: Path, keep: int, best: int | None, spared: Collection[int] = ()) -> None:
    """Name the best step, if there is one, and delete what need not be kept. A resumed run does
    it again, for the save that it goes on from may have died over it. The checkpoint is there: what
    cannot be done now is said in the log, and tried again after the next one."""
    try:
        if best is not None and (root / checkpoint_name(best)).is_dir():
            write_text(root / BEST, checkpoint_name(best))
        prune(root, keep, spared)
    except OSError as err:
        log.warning("%s could not be tidied up: %s", root, err)


def prune(root: Path, keep: int, spared: Collection[int] = ()) -> None:
    """Delete all but the newest `keep` checkpoints, the best and those of the steps `spared`;
    remains of dead saves too."""
    stay = {named(root, BEST), *map(checkpoint_name, spared)}
    for old in newest_first(root)[keep:]:
        if old.name not in stay:
            discard(old)
    for remains in root.glob(".tmp-*"):
        discard(remains)
    sweep(root)
    for unnamed in root.glob(f"{FRESH}*"):
        unnamed.unlink()


def go_back(root: Path, tag: str) -> list[str]:
    """Make `tag` the latest checkpoint again; returns the names of the later ones, now deleted."""
    names = [path.name for path in checkpoints_in(root)]
    later = names[names.index(tag) + 1 :]
    write_text(root / LATEST, tag)
    if named(root, BEST) in later:
        (root / BEST).unlink()
    for name in later:
        discard(root / name)
    return later


def load_checkpoint(path: Path, engine: Engine, ranks: Ranks) -> dict[str, Any]:
    """Restore weights, masters, moments, counts and this rank's RNG; returns our own state.

    Saved by any number of ranks. Raises CheckpointError when it does not fit.
    """
    try:
        manifest = read_manifest(path)
        if STATE_FILE not in manifest.files:
            raise CheckpointError(
                f"{path} was imported: it holds weights and no training to go on with; --inherit "
                "starts from them, in another vimnas.output_dir"
            )
        saved_by = int(manifest.about["world_size"])
        state: dict[str, Any] = read_state(path / STATE_FILE)
        engine.set_weights(load_file(str(path / WEIGHTS_FILE)))
        files = fragment_files(path, ranks.rank, ranks.world_size, saved_by)
        load_fragments(engine.optimizer, files)
        engine.optimizer.load_counts(state["counts"], state["updates"])
        engine.set_counters(state["engine"])
        if ranks.rank < saved_by:
            _set_rng_state(read_state(path / rank_file(ranks.rank, saved_by)))
    except (OSError, KeyError, ValueError, SafetensorError, Damaged) as err:
        if isinstance(err, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be used: {err}") from err
    return state


def _prepare(hidden: Path, engine: Engine) -> None:
    """An empty hidden folder, on a disk with room for what goes in."""
    hidden.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()
    flush(hidden.parent.parent)  # which may have got its folder of checkpoints just now
    flats = engine.optimizer.fragments
    states = 1 + max(len(elementwise(engine.optimizer, flat)) for flat in flats)
    states += engine.optimizer.ema_decay is not None  # it is also written as a whole
    needed = 4 * states * sum(p.numel() for p in engine.net.parameters())
    free = shutil.disk_usage(hidden).free
    if free < needed:
        raise OSError(f"it needs {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free")


def _write_rank(hidden: Path, engine: Engine, ranks: Ranks) -> Path:
    path = hidden / rank_file(ranks.rank, ranks.world_size)
    write_state(path, _rng_state(), fragment_tensors(engine.optimizer))
    return path


def _write_shared(
    hidden: Path, whole: Mapping[str, dict[str, Tensor]], engine: Engine, state: dict[str, Any]
) -> list[Path]:
    counts, updates = engine.optimizer.counts_state()
    own = {**state, "counts": counts, "updates": updates, "engine": engine.counters()}
    tensors = {**whole, ALPHAS_FILE: _contiguous(state["learner"]["alphas"])}
    for name, content in tensors.items():
        save_tensors(content, hidden / name)
    write_state(hidden / STATE_FILE, own)
    (hidden / POSITION_FILE).write_text(json.dumps(state["position"], indent=2))
    return [hidden / name for name in (*tensors, STATE_FILE, POSITION_FILE)]


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def seed_generators(seed: int, ranks: Ranks) -> None:
    """So that two runs begin alike also in the generators that no step seeds anew."""
    own = derive_seed("generators", seed, ranks.rank)
    random.seed(own)
    np.random.seed(own % 2**32)  # noqa: NPY002
    torch.manual_seed(own)


def _rng_state() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (timm draws from it)
    state: dict[str, Any] = {
        "python": (version, torch.tensor(numbers), gauss),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
