"""The front of a search against a cost: the point that is picked, front.json, picture, table.

{
  "cost": {"resource": "params", "dataset": "imagenet"},
  "picked": 3,                                 a number of "points"
  "hypervolume": 0.61,                         mean best accuracy within a budget (pareto.py)
  "points": [{                                 cheapest first
    "arch": {...}, "cost": 89016.0,
    "accuracy", "loss",                        as in result.json
    "accuracy_se": 0.012,                      its standard error, of the samples drawn
    "costs": {RESOURCE: {DATASET: value}}}]}   everything known
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vimnas_ds.config import ConfigError
from vimnas_ds.report.search_board import front_figure
from vimnas_ds.report.table import format_table
from vimnas_ds.search.constraints import format_cost, parse_number
from vimnas_ds.search.evolve import Evolution
from vimnas_ds.search.pareto import Point, hypervolume, knee
from vimnas_ds.search.resources import CostModel
from vimnas_ds.search.scoring import Scored
from vimnas_ds.space import Arch


def parse_pick(text: str, low: float) -> str | float:
    """`knee`, `best`, or a budget in the cost's unit, at least `low`, the cheapest there is.

    Raises ConfigError.
    """
    if text in ("knee", "best"):
        return text
    try:
        budget = parse_number(text)
    except ValueError as err:
        raise ConfigError(f"--pick {text}: {err}; write knee, best or a budget") from err
    if budget < low:
        raise ConfigError(f"--pick {text}: the cheapest sub-network allowed costs {low:,.6g}")
    return budget


def choose_point(points: Sequence[Point], pick: str | float) -> int:
    """The front's knee, its most accurate point, or its most accurate one within a budget."""
    if isinstance(pick, str):
        return knee(points) if pick == "knee" else len(points) - 1
    return max(i for i, p in enumerate(points) if p.cost <= pick)


def accuracy_error(scored: Scored) -> float:
    """The standard error of the weighted mean accuracy, by the samples' number (binomial)."""
    scores = scored.scores
    variance = sum(
        weight**2 * scores[name].top1 * (1 - scores[name].top1) / scores[name].count
        for name, weight in scored.objective.weights.items()
    )
    return math.sqrt(variance)


def front_object(
    evolution: Evolution, pick: str | float, model: CostModel, datasets: Sequence[str]
) -> dict[str, Any]:
    """What front.json holds, of what `evolution` has evaluated so far."""
    against, scores, front = evolution.against, evolution.scorer.scores, evolution.front()
    assert against is not None
    points = [Point(against.value(a), scores[a].accuracy) for a in front]
    return {
        "cost": {"resource": against.name, "dataset": against.dataset},
        "picked": choose_point(points, pick),
        "hypervolume": hypervolume(points, *evolution.constraints.reach(against)),
        "points": [
            {
                "arch": json.loads(arch.to_json()),
                "cost": point.cost,
                "accuracy": point.accuracy,
                "accuracy_se": accuracy_error(scores[arch]),
                "loss": scores[arch].loss,
                "costs": model.costs(arch, datasets),
            }
            for arch, point in zip(front, points, strict=True)
        ],
    }


def draw_front(evolution: Evolution, found: Mapping[str, Any]) -> Figure:
    """Everything evaluated so far, with the front `found` in it."""
    against, scores = evolution.against, evolution.scorer.scores
    assert against is not None
    archs = evolution.ranked()
    front = [archs.index(Arch.from_json(p["arch"])) for p in found["points"]]
    costs, accuracies = [against.value(a) for a in archs], [scores[a].accuracy for a in archs]
    errors = [p["accuracy_se"] for p in found["points"]]
    return front_figure(costs, accuracies, front, errors, front[found["picked"]], str(against))


def write_front(folder: Path, evolution: Evolution, found: Mapping[str, Any]) -> None:
    """front.json and front.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "front.json").write_text(json.dumps(found, indent=2) + "\n")
    draw_front(evolution, found).savefig(folder / "front.png")


def front_table(found: Mapping[str, Any]) -> str:
    """The front as text; the picked point is marked."""
    resource = found["cost"]["resource"]
    rows = [
        [
            format_cost(resource, p["cost"]),
            f"{p['accuracy']:.1%} +- {p['accuracy_se']:.1%}",
            f"{p['loss']:.4f}",
            "*" if i == found["picked"] else "",
            str(Arch.from_json(p["arch"])),
        ]
        for i, p in enumerate(found["points"])
    ]
    head = [f"{resource} ({found['cost']['dataset']})", "top-1", "loss", "picked", "sub-network"]
    return format_table(head, rows)
