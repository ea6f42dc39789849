"""A whole configuration: read, overridden, checked; the batch arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from vimnas_ds.config.data import DatasetSection
from vimnas_ds.config.deepspeed import check_deepspeed
from vimnas_ds.config.section import ConfigError, Section
from vimnas_ds.config.vimnas import VimnasSection
from vimnas_ds.config.words import explain, nearest


class RunConfig(Section):
    """A whole, checked configuration."""

    about: str = Field("", description="What the file reproduces, its cost, its command")
    deepspeed: dict[str, Any]
    vimnas: VimnasSection

    @property
    def global_batch(self) -> int:
        return int(self.deepspeed["train_batch_size"])

    @property
    def alpha_batch(self) -> int:
        return self.vimnas.alpha.batch or self.global_batch

    def micro_batch(self, world_size: int, total: int | None = None) -> int:
        """Samples per process of a step. Raises ConfigError if they cannot be shared evenly."""
        total = total or self.global_batch
        key = "train_batch_size" if total == self.global_batch else "vimnas.alpha.batch"
        if total % world_size:
            raise ConfigError(
                f"{key} {total} cannot be shared evenly by {world_size} processes: "
                f"use a multiple of {world_size}, e.g. {math.ceil(total / world_size) * world_size}"
            )
        micro = total // world_size
        mixed = [n for n, d in self.vimnas.data.datasets.items() if d.mixup or d.cutmix]
        if mixed and total == self.global_batch and micro % 2:
            raise ConfigError(
                f"mixup pairs samples within a process: {micro} samples per process is odd "
                f"(train_batch_size {total} on {world_size}); datasets with mixup: {mixed}"
            )
        return micro

    def bf16(self, has_gpu: bool) -> bool:
        """ "auto" is bf16 on a GPU, fp32 on a CPU (where bf16 GEMMs are slow)."""
        enabled = self.deepspeed["bf16"]["enabled"]
        return has_gpu if enabled == "auto" else bool(enabled)

    def deepspeed_dict(self, world_size: int, has_gpu: bool) -> dict[str, Any]:
        """What `deepspeed.initialize` gets."""
        config = json.loads(json.dumps(self.deepspeed))
        bf16 = self.bf16(has_gpu)
        config["bf16"]["enabled"] = bf16
        config["gradient_accumulation_steps"] = 1
        config["train_micro_batch_size_per_gpu"] = self.micro_batch(world_size)
        config["zero_allow_untested_optimizer"] = True  # ours
        config.setdefault("steps_per_print", 10**9)
        if bf16:  # the owned gradient stays in fp32 after its reduction
            config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
        return config


def dataset_section(name: str, values: dict[str, Any]) -> DatasetSection:
    """One dataset's section from its keys. Raises ConfigError in words."""
    try:
        return DatasetSection.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, ("data", "datasets", name))) from error


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read, override (`vimnas.data.datasets.k400.root=/data/k400`) and check a configuration.

    Overrides may also say `vimnas.data.k400.root`: a dataset's name stands for its section.
    Raises ConfigError for anything that could not run as written.
    """
    path = Path(path)
    try:
        raw = _parse(path.read_text(encoding="utf-8").removeprefix("\ufeff"), str(path))
    except OSError as err:
        raise ConfigError(f"cannot read the configuration {path}: {err.strerror}") from err
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path} is not valid JSON: {err}") from err
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    for override in overrides or []:
        _apply_override(raw, override)
    return parse_config(raw)


def parse_config(raw: dict[str, Any]) -> RunConfig:
    """Check a configuration given as one object (the file's content)."""
    ours = {"about", "vimnas"}
    deepspeed = {k: v for k, v in raw.items() if k not in ours}
    check_deepspeed(deepspeed)
    if "vimnas" not in raw:
        raise ConfigError('the configuration has no "vimnas" section')
    if not isinstance(raw["vimnas"], dict):
        raise ConfigError(f"vimnas must be an object, got {raw['vimnas']!r}")
    try:
        vimnas = VimnasSection.model_validate(raw["vimnas"])
    except ValidationError as err:
        raise ConfigError(explain(err)) from err
    about = raw.get("about", "")
    if not isinstance(about, str):
        raise ConfigError(f"about must be a text, got {about!r}")
    return RunConfig(about=about, deepspeed=deepspeed, vimnas=vimnas)


def _parse(text: str, source: str) -> Any:
    """JSON. Raises JSONDecodeError for other texts, ConfigError for what no key can take."""
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates)
    except RecursionError as err:
        raise ConfigError(f"{source}: lists or objects nest too deeply") from err
    except ValueError as err:
        if isinstance(err, json.JSONDecodeError | ConfigError):
            raise
        raise ConfigError(f"{source}: {err}") from err  # a number of thousands of digits


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(f'the key "{key}" stands twice in the configuration')
        found[key] = value
    return found


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes KEY=VALUE, got {override!r}")
    value = override_value(key, text)
    parts = key.split(".")
    datasets: Any = raw
    for part in ("vimnas", "data", "datasets"):
        datasets = datasets.get(part, {}) if isinstance(datasets, dict) else {}
    if parts[:2] == ["vimnas", "data"] and len(parts) > 3 and parts[2] != "datasets":
        if parts[2] not in datasets:
            raise ConfigError(f"--set {key}: no dataset {parts[2]}{nearest(parts[2], datasets)}")
        parts.insert(2, "datasets")
    node: Any = raw
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f'--set {key}: "{part}" is not a section')
        node = child
    node[parts[-1]] = value


def override_value(key: str, text: str) -> Any:
    """What `--set KEY=TEXT` gives: JSON, or a bare word as a string (--set vimnas.space=vit_s)."""
    try:
        return _parse(text, f"--set {key}")
    except json.JSONDecodeError:
        return text
