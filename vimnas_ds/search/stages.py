"""A tuned search that may be killed: after every tuning, all that it needs to go on.

DIR/NN-NAME/           decision NN, of NAME, is made and the tuning that follows it is done
    weights.safetensors    the tuned supernet, float32
    stage.json             the decisions so far, the place in the data, how the search was asked
    evaluations.csv        its rows so far

A tuning starts with fresh moments, and all its draws depend on seeds and the place in the data
alone, so this is the whole state (ours; DARTS-PT goes on with its moments).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vimnas_ds.config import ConfigError
from vimnas_ds.durable import publish_folder
from vimnas_ds.search.cache import digest_of
from vimnas_ds.search.perturb import Decision
from vimnas_ds.search.tune import Tuner
from vimnas_ds.seeds import derive_seed
from vimnas_ds.space import SearchSpace
from vimnas_ds.tensor_file import save_tensors
from vimnas_ds.train.ranks import check_agreement
from vimnas_ds.train.run_files import CheckpointError, config_object

WEIGHTS_FILE, STAGE_FILE = "weights.safetensors", "stage.json"


class TuningStages:
    """Called by a search between its decisions: tunes, then saves; the last `keep` stages stay.

    `asked` are the search's options: with others, or another checkpoint, other data files or
    another number of ranks (drop path draws by rank), a stage is not gone on from. `log` is the CSV
    of the search's evaluations. Stages of another search in `folder` are replaced at the first
    saving.
    """

    def __init__(self, folder: Path, tuner: Tuner, asked: Mapping[str, Any], keep: int, log: Path):
        self.folder, self.tuner, self.keep, self.log = folder, tuner, keep, log
        run = tuner.run
        self.ranks = run.ranks
        self.settings: dict[str, Any] = {
            **json.loads(json.dumps(asked)),  # as they will be read
            "checkpoint's weights": run.weights,
            "configuration": digest_of(config_object(run.config)),
            "data files": run.data.fingerprint(),
            "ranks": run.ranks.world_size,
        }
        self._own: list[Path] = []

    def __call__(self, space: SearchSpace, decisions: Sequence[Decision]) -> None:
        self.tuner(space)
        weights = self.tuner.weights()
        if self.ranks.is_main:
            self._save(weights, decisions)

    def _save(self, weights: Mapping[str, torch.Tensor], decisions: Sequence[Decision]) -> None:
        final = self.folder / f"{len(decisions):02d}-{decisions[-1].name}"
        hidden = self.folder / f".tmp-{final.name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.iterdir():
            if old.is_dir() and old not in self._own:
                shutil.rmtree(old)
        hidden.mkdir()
        save_tensors(weights, hidden / WEIGHTS_FILE)
        shutil.copyfile(self.log, hidden / self.log.name)
        stage = {
            "settings": self.settings,
            "position": self.tuner.position,
            "decisions": [d.to_json() for d in decisions],
        }
        (hidden / STAGE_FILE).write_text(json.dumps(stage, indent=2) + "\n")
        publish_folder(hidden, final)
        self._own.append(final)
        for old in self._own[: -self.keep]:
            shutil.rmtree(old)
        self._own = self._own[-self.keep :]

    def resume(self) -> list[Decision]:
        """Go back to the latest stage: its weights, place in the data and CSV; the decisions made
        until then.

        Raises CheckpointError where there is none to use, ConfigError where it was made otherwise.
        """
        found = sorted(
            (p for p in self.folder.glob("[0-9]*-*") if (p / STAGE_FILE).is_file()),
            key=lambda p: int(p.name.partition("-")[0]),
        )
        latest = found[-1] if found else None
        name = "nothing" if latest is None else latest.name
        check_agreement(derive_seed(name), f"the stage to go on from ({name})", self.ranks)
        if latest is None:
            raise CheckpointError(
                f"no tuned decision under {self.folder} to go on from: start without --resume"
            )
        try:
            stage = json.loads((latest / STAGE_FILE).read_text())
            weights = load_file(str(latest / WEIGHTS_FILE))
        except (ValueError, SafetensorError, FileNotFoundError) as err:
            raise CheckpointError(f"{latest} cannot be used: {err}; remove it to go on") from err
        for key, value in self.settings.items():
            if stage["settings"].get(key) != value:
                raise ConfigError(
                    f"{latest} was made with {key} {stage['settings'].get(key)}, now {value}: "
                    "ask for the same, or start without --resume"
                )
        self.tuner.restore(weights, stage["position"])
        if self.ranks.is_main:
            shutil.copyfile(latest / self.log.name, self.log)
        self._own = found
        return [Decision.from_json(d) for d in stage["decisions"]]
