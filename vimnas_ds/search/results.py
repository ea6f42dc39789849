"""The result of a search: one JSON form for every selector, and `arch.json` beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vimnas_ds.search.run import SearchRun
from vimnas_ds.search.scoring import Scored
from vimnas_ds.space import Arch
from vimnas_ds.train.dry_run import cost_of


def result_object(
    run: SearchRun, selector: str, arch: Arch, scored: Scored, details: Mapping[str, Any]
) -> dict[str, Any]:
    """What was picked, by whom, from which checkpoint, its costs and `select` scores."""
    datasets = {}
    for name, outcomes in scored.outcomes.items():
        params, gflops = cost_of(run.config, arch, name)
        score = outcomes.score
        datasets[name] = {
            "select_top1": score.top1,
            "select_loss": score.loss,
            "count": score.count,
            "params": params,
            "gflops": gflops,
        }
    return {
        "selector": selector,
        "checkpoint": str(run.checkpoint),
        "ema": run.ema,
        "weights": run.weights,
        "arch": json.loads(arch.to_json()),
        "objective": {"metric": scored.objective.metric, "weights": dict(scored.objective.weights)},
        "accuracy": scored.accuracy,
        "loss": scored.loss,
        "datasets": datasets,
        "left_out": run.left_out(),
        **details,
    }


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """result.json and arch.json (the same architecture alone: what --arch options read)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "arch.json").write_text(json.dumps(result["arch"]) + "\n")
