"""Report sub-networks of a trained supernet on the test splits.

    python scripts/evaluate.py                            (largest and smallest of the latest run)
    python scripts/evaluate.py --checkpoint runs/vitl --arch runs/vitl/evolution/arch.json largest
    deepspeed --num_gpus 2 scripts/evaluate.py --arch runs/demo/perturbation/arch.json

Several views a sample, softmax averaged: Kinetics 4 clips x 3 crops, SSV2 2 x 3, images one centre
crop (vimnas.data.NAME.test_clips, test_crops). Prints top-1, top-5, params and GFLOPs per view x
views, and writes them to RUN/evaluation.json and .csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from vimnas_ds.arch_file import named_arch
from vimnas_ds.report.table import format_table
from vimnas_ds.search.cli import (
    Progress,
    build_parser,
    choose_datasets,
    run_script,
    say_left_out,
)
from vimnas_ds.search.multiview import MultiViewEvaluator
from vimnas_ds.search.run import open_run
from vimnas_ds.space import Arch
from vimnas_ds.train.dry_run import cost_of
from vimnas_ds.train.ranks import SEARCH_TIMEOUT, start_ranks


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument(
        "--arch",
        nargs="+",
        default=["largest", "smallest"],
        metavar="ARCH",
        help="largest, smallest, or files holding an architecture",
    )
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="default: all of the run")
    parser.add_argument("--split", choices=("test", "select"), default="test")
    parser.add_argument("--single_view", action="store_true", help="one centre clip and crop")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/evaluation.json")
    return parser.parse_args(argv)


def evaluate(args: argparse.Namespace) -> int:
    ranks = start_ranks(SEARCH_TIMEOUT, engine=False)
    run = open_run(args.checkpoint, ranks, args.set)
    datasets = choose_datasets(run, args.datasets)
    archs = {name: named_arch(name, run.net.space) for name in args.arch}
    out = args.out or run.files.root / "evaluation.json"
    if ranks.is_main:
        out.parent.mkdir(parents=True, exist_ok=True)
    evaluator = MultiViewEvaluator(run, args.single_view)
    views = sum(len(evaluator.views(name)) for name in datasets)
    progress = Progress(views, "evaluation", 1, ranks.is_main)
    rows: list[dict[str, Any]] = []
    for name in datasets:
        forwards = {k: partial(run.net, arch=a, dataset=name) for k, a in archs.items()}
        for label, score in evaluator.scores(forwards, name, args.split, progress).items():
            params, gflops = cost_of(run.config, archs[label], name)
            row = {"sub-network": label, "dataset": name, **asdict(score)}
            rows.append({**row, "params": params, "gflops_per_view": gflops})
    progress.close()
    if ranks.is_main:
        write(out, rows, archs, args.split)
        print(describe(rows))
        print(f"({args.split} split; written to {out})")
    say_left_out(evaluator.skipped)
    evaluator.close()
    run.close()
    return 0


def write(out: Path, rows: list[dict[str, Any]], archs: Mapping[str, Arch], split: str) -> None:
    """JSON by sub-network and dataset, and beside it a CSV with one row for each."""
    found: dict[str, Any] = {
        label: {"arch": json.loads(arch.to_json()), "datasets": {}} for label, arch in archs.items()
    }
    for row in rows:
        values = {k: v for k, v in row.items() if k not in ("sub-network", "dataset")}
        found[row["sub-network"]]["datasets"][row["dataset"]] = values
    out.write_text(json.dumps({"split": split, "archs": found}, indent=2) + "\n")
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def describe(rows: list[dict[str, Any]]) -> str:
    """One row a sub-network and dataset; a file stands for its folder's name."""
    head = ["sub-network", "dataset", "top-1", "top-5", "params", "GFLOPs x views"]
    lines = []
    for r in rows:
        label = Path(r["sub-network"]).parent.name or r["sub-network"]
        tops = [f"{r['top1']:.1%}", f"{r['top5']:.1%}"]
        cost = f"{r['gflops_per_view']:.4g} x {r['views']}"
        lines.append([label, r["dataset"], *tops, f"{r['params']:,}", cost])
    return format_table(head, lines)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_script(lambda: evaluate(args))


if __name__ == "__main__":
    sys.exit(main())
