"""How a run is trained, as far as a person may change it when the run is resumed.

What gives the weights or the draws their meaning may not change (`Trainer._identity`). This may,
but also by mistake: so every checkpoint holds it, and a run that goes on says what is not as it
was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vimnas_ds.config import RunConfig

#: keys of a dataset that do not change what is trained: where its files lie, which ones they are
#: (the splits' own lists are compared), how they are tested, and its part of the identity
_NO_RECIPE = {
    *("root", "shards", "layout", "annotations", "test_annotations", "videos", "synsets"),
    *("train_split", "test_split", "reference_files", "reference_test_files"),
    *("test_clips", "test_crops", "kind", "num_classes", "size", "frames", "directional_labels"),
    "export_interpolation",
    "base_lr",  # of it comes the peak learning rate, which is here
}


def recipe_of(config: RunConfig) -> dict[str, Any]:
    """By key, as JSON: by the same names as `--set` takes."""
    section = config.vimnas
    guard = section.guard.model_dump(mode="json") | {"enabled": section.guarded}
    return {
        "gradient_clipping": float(config.deepspeed["gradient_clipping"]),
        "bf16": {"enabled": config.deepspeed["bf16"]["enabled"]},
        "vimnas": {
            "model": {"drop_path": section.model.drop_path},
            "schedule": {"lr": section.peak_lr, "min_lr": section.schedule.min_lr},
            "optimizer": section.optimizer.model_dump(mode="json", exclude={"max_skipped"}),
            "alpha": section.alpha.model_dump(mode="json"),
            "sandwich": section.sandwich and section.sandwich.model_dump(mode="json"),
            "ema": section.ema and section.ema.model_dump(mode="json"),
            "guard": guard,
            "data": {
                name: data.model_dump(mode="json", exclude=_NO_RECIPE) | {"flip": data.flip}
                for name, data in section.data.datasets.items()
            },
        },
    }


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was, in words. What an older version did not save is not compared."""
    found = []
    for key, value in now.items():
        if key not in was:
            continue
        before = was[key]
        if isinstance(before, dict) and isinstance(value, dict):
            found += [f"{key}.{change}" for change in changes(before, value)]
        elif before != value:
            found.append(f"{key} was {before!r}, now {value!r}")
    return found
