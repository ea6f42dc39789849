"""A complete small configuration for tests, as the object a JSON file would hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TUBES = [
    {"kernel": [4, 8, 8], "stride": [4, 8, 8], "offset": [0, 4, 4]},
    {"kernel": [1, 8, 8], "stride": [4, 8, 8]},
]


def small_config(output_dir: Path | str = "runs/test", **deepspeed: Any) -> dict[str, Any]:
    """Two datasets (images, clips of 8 frames), nano space, all stability switches on."""
    image = {"kind": "image", "num_classes": 7, "size": 32, "base_lr": 1e-2, "weight_decay": 0.05}
    video = {**image, "kind": "video", "num_classes": 5, "frames": 8, "fps": 8}
    return {
        "about": "a test",
        "train_batch_size": 8,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5000},
        **deepspeed,
        "vimnas": {
            "output_dir": str(output_dir),
            "space": "nano",
            "cpu_threads": 1,
            "tokens": {"tubes": TUBES},
            "model": {"qk_norm": True, "layer_scale": 0.5, "drop_path": 0.1},
            "data": {"datasets": {"imagenet": image, "k400": {**video, "weight_decay": 0.01}}},
            "schedule": {"epochs": 3, "warmup": 0},
        },
    }
