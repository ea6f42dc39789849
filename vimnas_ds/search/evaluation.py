"""evaluation.json: what a multi-view test found, complete enough to draw every picture from it.

    {
      "checkpoint": "runs/x/checkpoints/step-...",   the weights
      "ema": false,                                  whether they are the moving average
      "split": "test",
      "placement": "even" | "dense",                 of the clips, see vimnas_ds/data/views.py
      "stride": seconds | null,                      of dense clips; null: a quarter of a clip
      "datasets": {NAME: {
        "classes": ["...", ...],                     by class number: the head's outputs
        "clips": 4, "crops": 3,
        "samples": files of the split's list (test: the official one), "count": files scored,
        "skipped": {FILE: reason}}},                 samples = count + those in "skipped": broken
                                                     files and those that are not on the disk
      "archs": {LABEL: {
        "arch": {...},                               as in arch.json
        "datasets": {NAME: {
          "top1", "top5",                            fractions of "count"
          "mean_class",                              accuracy averaged over classes with samples
          "count", "views",                          samples, views of each
          "params", "gflops_per_view",               1e9 multiply-accumulates
          "per_class": {CLASS: {"count", "top1", "top5"}},   null accuracies where count is 0
          "confusion": [[true, predicted, count], ...]}}}}   class numbers; zero cells left out
    }

LABEL is what --arch was given. Beside it a CSV has one row per sub-network and dataset.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vimnas_ds.confusion import class_labels
from vimnas_ds.data.bad import kind_of
from vimnas_ds.search.multiview import MultiViewEvaluator, ViewScore
from vimnas_ds.search.run import SearchRun
from vimnas_ds.space import Arch
from vimnas_ds.train.dry_run import cost_of

#: label -> dataset -> score
Scores = Mapping[str, Mapping[str, ViewScore]]


def evaluation_object(
    run: SearchRun,
    evaluator: MultiViewEvaluator,
    archs: Mapping[str, Arch],
    scores: Scores,
    split: str,
) -> dict[str, Any]:
    """The object above."""
    names = list(next(iter(scores.values())))
    plan = evaluator.plan(names[0])
    return {
        "checkpoint": str(run.checkpoint),
        "ema": run.ema,
        "split": split,
        "placement": plan.placement,
        "stride": plan.stride,
        "datasets": {
            name: {
                "classes": run_classes(run, name),
                "clips": evaluator.plan(name).clips,
                "crops": evaluator.plan(name).crops,
                "samples": evaluator.num_samples(name, split),
                "count": next(iter(scores.values()))[name].count,
                "skipped": evaluator.skipped[name],
            }
            for name in names
        },
        "archs": {
            label: {
                "arch": json.loads(arch.to_json()),
                "datasets": {
                    name: _entry(run, arch, name, score) for name, score in scores[label].items()
                },
            }
            for label, arch in archs.items()
        },
    }


def describe_skipped(found: Mapping[str, Any]) -> list[str]:
    """One line for each dataset of an evaluation of which not all files are scored."""
    lines = []
    for name, dataset in found["datasets"].items():
        reasons = Counter(map(kind_of, dataset["skipped"].values()))
        if reasons:
            why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
            lines.append(
                f"{name}: {reasons.total():,} of {dataset['samples']:,} {found['split']} files not "
                f"scored ({why})"
            )
    return lines


def run_classes(run: SearchRun, dataset: str) -> list[str]:
    """The names of a head's outputs."""
    section = run.config.vimnas.data.datasets[dataset]
    return class_labels(run.data.catalogs[dataset].class_names, section.num_classes)


def _entry(run: SearchRun, arch: Arch, dataset: str, score: ViewScore) -> dict[str, Any]:
    params, gflops = cost_of(run.config, arch, dataset)
    confusion = score.confusion
    rows = zip(
        run_classes(run, dataset),
        confusion.per_class.tolist(),
        confusion.correct.tolist(),
        confusion.top5_hits.tolist(),
        strict=True,
    )
    return {
        "top1": score.top1,
        "top5": score.top5,
        "mean_class": confusion.mean_class,
        "count": score.count,
        "views": score.views,
        "params": params,
        "gflops_per_view": gflops,
        "per_class": {
            name: {
                "count": count,
                "top1": top1 / count if count else None,
                "top5": top5 / count if count else None,
            }
            for name, count, top1, top5 in rows
        },
        "confusion": confusion.triples(),
    }


def write_evaluation(out: Path, found: Mapping[str, Any]) -> None:
    """`out` and, beside it, the CSV."""
    out.write_text(json.dumps(found, indent=1) + "\n")
    rows = [
        {"sub-network": label, "dataset": name}
        | {k: v for k, v in entry.items() if k not in ("per_class", "confusion")}
        for label, arch in found["archs"].items()
        for name, entry in arch["datasets"].items()
    ]
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def short_names(labels: list[str]) -> dict[str, str]:
    """For titles and file names: `largest`, or the folder of an architecture's file; numbered
    where two would be the same."""
    found: dict[str, str] = {}
    for label in labels:
        base = short = Path(label).parent.name or Path(label).stem
        number = 2
        while short in found.values():
            short, number = f"{base}-{number}", number + 1
        found[label] = short
    return found
