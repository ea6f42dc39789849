"""What a run ran with: its main settings for comparing runs, and the machine and versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from vimnas_ds.config import RunConfig
from vimnas_ds.train.ranks import Ranks

#: whose versions decide numbers
PACKAGES = ("vimnas_ds", "torch", "deepspeed", "torchvision", "numpy", "av", "safetensors")


def main_settings(config: RunConfig, ranks: Ranks) -> dict[str, str | int | float]:
    """What one looks at first when two runs differ, by its key in the configuration."""
    section = config.vimnas
    return {
        "train_batch_size": config.global_batch,
        "gradient_clipping": config.deepspeed["gradient_clipping"],
        "precision": "bf16" if config.bf16(ranks.device.type == "cuda") else "fp32",
        "ranks": ranks.world_size,
        "space": section.space if section.arch is None else str(section.arch.arch()),
        "seed": section.seed,
        "datasets": ", ".join(section.data.datasets),
        "held_out": section.data.held_out,
        "epochs": section.schedule.epochs,
        "image_epochs": section.image_epochs,
        "peak_lr": section.peak_lr,
        "warmup": f"{section.schedule.warmup:g} {section.schedule.warmup_unit}",
        "alpha.every": section.alpha.every if section.alpha.enabled else 0,
        "alpha.lr": section.alpha.lr,
        "qk_norm": "on" if section.model.qk_norm else "off",
        "layer_scale": section.model.layer_scale or 0.0,
        "drop_path": section.model.drop_path,
        "warm_start": str(section.model.init or section.model.inherit or ""),
    }


def environment(ranks: Ranks) -> dict[str, Any]:
    """The machine of rank 0 and the versions of what computes."""
    gpu = ranks.device.type == "cuda"
    return {
        "ranks": ranks.world_size,
        "device": torch.cuda.get_device_name(ranks.device) if gpu else "CPU",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if gpu else None,
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
