"""A small real run through the launcher: what chaos.py and soak.py start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from run_processes import MARK

from vimnas_ds.config import load_config
from vimnas_ds.data.demo import make_demo_data
from vimnas_ds.data.joint import open_datasets
from vimnas_ds.train.ranks import free_port

ROOT = Path(__file__).resolve().parents[1]


def write_config(root: Path, per_class: int, **section: Any) -> Path:
    """Demo data of `per_class` training files a class in `root`, where there is none yet, and a
    configuration for it with everything random switched on; `section` goes into its "vimnas"."""
    make_demo_data(root / "data", train_per_class=per_class, test_per_class=2, workers=2)
    config = json.loads((ROOT / "ds_configs" / "demo.json").read_text())
    config["train_batch_size"] = 16
    config["vimnas"].update(section)
    config["vimnas"]["model"] = {"drop_path": 0.2, "qk_norm": True, "layer_scale": 0.5}
    data = config["vimnas"]["data"]
    data.update(index_dir=str(root / "indexes"), max_bad_share=0.5)
    for name, dataset in data["datasets"].items():
        dataset["root"] = str(root / "data" / name)
    data["datasets"]["k400"].update(mixup=0.3, randaugment={"n": 2, "m": 9, "std": 0.5})
    file = root / "config.json"
    file.write_text(json.dumps(config, indent=1))
    return file


def spoil(config: Path, every: int) -> None:
    """Build the indexes, then blank every `every`-th clip of k400 behind their back."""
    section = load_config(config).vimnas.data
    open_datasets(section)
    for clip in sorted((config.parent / "data" / "k400" / "train").rglob("*.mp4"))[::every]:
        before, content = clip.stat(), clip.read_bytes()
        clip.write_bytes(content[:200] + bytes(len(content) - 200))
        os.utime(clip, ns=(before.st_atime_ns, before.st_mtime_ns))


def launch(
    script: str,
    args: list[str],
    ranks: int,
    mark: str,
    output: TextIO,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """The launcher's runner, started; all that it starts carry `mark`."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    command += ["--master_port", str(free_port()), str(ROOT / "scripts" / script), *args]
    fixed = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), MARK: mark}
    return subprocess.Popen(
        command,
        env={**os.environ, **fixed, **(environment or {})},
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
