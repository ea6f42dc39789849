"""A small real run that several test modules share: data, configuration, training."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import ROOT
from tests.launch import launch
from vimnas_ds.data.demo import make_demo_data

RESUME_AT = 14  #: steps after which a checkpoint is saved


def prepare(root: Path) -> Path:
    """A small demo set and a configuration with everything random switched on, in `root`."""
    make_demo_data(out=root / "data", seed=0, train_per_class=10, test_per_class=2, workers=2)
    config = json.loads((ROOT / "ds_configs" / "demo.json").read_text())
    config["train_batch_size"] = 16
    section = config["vimnas"]
    section["model"] = {"drop_path": 0.2, "qk_norm": True, "layer_scale": 0.5}
    section["data"]["index_dir"] = str(root / "indexes")
    section["schedule"] = {"epochs": 3, "warmup": 2, "warmup_unit": "steps"}
    section["alpha"], section["ema"] = {"every": 1}, {"decay": 0.9}
    section["log"] = {"every": 3, "images_every": 10, "eval_every": 14, "eval_subnets": 1}
    section["checkpoint"] = {"every": RESUME_AT, "keep": 9}
    for name, data in section["data"]["datasets"].items():
        data["root"] = str(root / "data" / name)
    section["data"]["datasets"]["k400"]["mixup"] = 0.3
    section["data"]["datasets"]["k400"]["randaugment"] = {"n": 2, "m": 9, "std": 0.5}
    (root / "config.json").write_text(json.dumps(config))
    return root


def train(folder: Path, name: str, *args: str, ranks: int = 2) -> str:
    """Train into folder/name through the launcher."""
    return launch(
        "scripts/train.py",
        "--deepspeed_config",
        str(folder / "config.json"),
        "--set",
        f"vimnas.output_dir={folder / name}",
        *args,
        ranks=ranks,
    )
