"""A run's folder without its training: what the search scripts open, made in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.media import encode, numbered
from tests.small import small_config
from vimnas_ds.config import parse_config
from vimnas_ds.manifest import FileEntry, write_manifest
from vimnas_ds.model.alphas import Alphas
from vimnas_ds.train.engine import build_supernet
from vimnas_ds.train.run_files import ALPHAS_FILE, POSITION_FILE, WEIGHTS_FILE, config_object
from vimnas_ds.train.schedule import DataCursor


def write_data(root: Path) -> dict[str, Any]:
    """Two classes of pictures and of clips in `root`; returns the configuration that reads them."""
    raw = small_config(root / "run")
    raw["vimnas"]["data"]["index_dir"] = str(root / "indexes")
    raw["vimnas"]["data"]["workers"] = 1
    for name, section in raw["vimnas"]["data"]["datasets"].items():
        section |= {"root": str(root / name), "num_classes": 2}
        for label in ("cat", "dog"):
            for split, count in (("train", 4), ("val", 1)):
                for i in range(count):
                    file = root / name / split / label / f"{label}{split}{i}"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    if name == "imagenet":
                        picture = np.full((40, 40, 3), 40 * i + len(label), np.uint8)
                        Image.fromarray(picture).save(file.with_suffix(".png"))
                    else:
                        encode(file.with_suffix(".mp4"), numbered(8 + i, 40, 40))
    return raw


def write_run(root: Path) -> Path:
    """The folder of a run whose supernet has its initial weights; its configuration, for new runs,
    is root/config.json."""
    raw = write_data(root)
    (root / "config.json").write_text(json.dumps(raw))
    config = parse_config(raw)
    run, net = root / "run", build_supernet(config)
    checkpoint = run / "checkpoints" / "step00000001"
    checkpoint.mkdir(parents=True)
    save_file(dict(net.named_parameters()), str(checkpoint / WEIGHTS_FILE))
    alphas = Alphas(config.vimnas.search_space, 0.1, torch.Generator().manual_seed(0))
    save_file({k: v.detach() for k, v in alphas.values.items()}, str(checkpoint / ALPHAS_FILE))
    (checkpoint / POSITION_FILE).write_text(json.dumps(DataCursor().state_dict()))
    write_manifest(checkpoint, {p.name: FileEntry.of(p) for p in checkpoint.iterdir()}, {})
    (checkpoint.parent / "latest").write_text(checkpoint.name)
    (run / "config.json").write_text(json.dumps(config_object(config)))
    names = {name: ["cat", "dog"] for name in config.vimnas.data.datasets}
    (run / "labels.json").write_text(json.dumps(names))
    return run
