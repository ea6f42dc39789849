"""A run's result: one table and one JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vimnas_ds.config import RunConfig
from vimnas_ds.data.joint import JointData
from vimnas_ds.durable import write_text
from vimnas_ds.report.table import format_table
from vimnas_ds.space import Arch
from vimnas_ds.train.dry_run import cost_of
from vimnas_ds.train.evaluate import Score
from vimnas_ds.train.run_files import RunFiles


def write_summary(
    config: RunConfig,
    data: JointData,
    files: RunFiles,
    picks: Mapping[str, Arch],
    scores: Mapping[str, Mapping[str, Score]],
    faults: Mapping[str, Any],
) -> dict[str, Any]:
    """summary.json: datasets.NAME.chance and datasets.NAME.picks.PICK.{top1, top5, ...}.

    Accuracies are fractions on the test split; gflops are 1e9 MACs per input. The returned object
    also has the printed table under "table"; `faults` is stored as it is. For rank 0 alone.
    """
    datasets: dict[str, Any] = {}
    rows = []
    for name, found in scores.items():
        chance = 1 / len(data.catalogs[name].class_names)
        entry: dict[str, Any] = {"chance": chance, "picks": {}}
        cells = [name, f"{chance:.1%}"]
        for pick, score in found.items():
            params, gflops = cost_of(config, picks[pick], name)
            entry["picks"][pick] = {
                "top1": score.top1,
                "top5": score.top5,
                "loss": score.loss,
                "count": score.count,
                "params": params,
                "gflops": gflops,
                "arch": json.loads(picks[pick].to_json()),
            }
            cells += [f"{score.top1:.1%}", f"{params:,}", f"{gflops:.4f}"]
        datasets[name] = entry
        rows.append(cells)
    head = ["dataset", "chance"]
    for pick in picks:
        head += [f"{pick} top-1", "params", "GFLOPs"]
    table = (
        f"{format_table(head, rows)}\n"
        f"(test split, one centre view; GFLOPs: 1e9 multiply-accumulates per input)\n"
        f"TensorBoard: tensorboard --logdir {files.tensorboard}\n"
        f"checkpoints: {files.checkpoints}\n"
        f"next: python scripts/perturb_select.py --checkpoint {files.root}\n"
        f"      python scripts/report.py {files.root}"
    )
    summary = {
        "space": config.vimnas.space,
        **faults,
        "tensorboard": str(files.tensorboard),
        "checkpoints": str(files.checkpoints),
        "datasets": datasets,
    }
    write_text(files.summary, json.dumps(summary, indent=2) + "\n")
    return {**summary, "table": table}
