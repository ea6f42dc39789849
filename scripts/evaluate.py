"""Report sub-networks of a trained supernet on the test splits.

    python scripts/evaluate.py                            (largest and smallest of the latest run)
    python scripts/evaluate.py --checkpoint runs/vitl --arch runs/vitl/evolution/arch.json largest
    deepspeed --num_gpus 2 scripts/evaluate.py --arch runs/demo/perturbation/arch.json

Several views a sample, softmax averaged: Kinetics 4 clips x 3 crops, SSV2 2 x 3, images one centre
crop (vimnas.data.NAME.test_clips, test_crops). Prints top-1, top-5, params and GFLOPs per view x
views, and writes them to RUN/evaluation.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from vimnas_ds.arch_file import named_arch
from vimnas_ds.report.console import format_table
from vimnas_ds.search.cli import Progress, build_parser, choose_datasets, run_script
from vimnas_ds.search.multiview import MultiViewEvaluator
from vimnas_ds.search.run import open_run
from vimnas_ds.train.dry_run import cost_of
from vimnas_ds.train.ranks import start_ranks


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
    ranks = start_ranks(engine=False)
    run = open_run(args.checkpoint, ranks, args.set)
    datasets = choose_datasets(run, args.datasets)
    archs = {name: named_arch(name, run.net.space) for name in args.arch}
    evaluator = MultiViewEvaluator(run, args.single_view)
    views = sum(len(evaluator.views(name)) for name in datasets)
    progress = Progress(len(archs) * views, "evaluation", 1, ranks.is_main)
    rows: list[list[str]] = []
    results: dict[str, Any] = {}
    for label, arch in archs.items():
        results[label] = {"arch": json.loads(arch.to_json()), "datasets": {}}
        for name in datasets:
            score = evaluator.score(
                partial(run.net, arch=arch, dataset=name),
                name,
                args.split,
                progress,
            )
            params, gflops = cost_of(run.config, arch, name)
            results[label]["datasets"][name] = {
                "top1": score.top1,
                "top5": score.top5,
                "count": score.count,
                "views": score.views,
                "params": params,
                "gflops_per_view": gflops,
            }
            cost = f"{gflops:.4g} x {score.views}"
            top = [f"{score.top1:.1%}", f"{score.top5:.1%}"]
            rows.append([Path(label).parent.name or label, name, *top, f"{params:,}", cost])
    progress.close()
    if ranks.is_main:
        out = args.out or run.files.root / "evaluation.json"
        out.write_text(json.dumps({"split": args.split, "archs": results}, indent=2) + "\n")
        head = ["sub-network", "dataset", "top-1", "top-5", "params", "GFLOPs x views"]
        print(format_table(head, rows))
        print(f"({args.split} split; written to {out})")
    for name, reasons in evaluator.skipped.items():
        for path, reason in reasons.items():
            print(f"left out: {name}: {path}: {reason}", file=sys.stderr)
    evaluator.close()
    run.close()
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_script(lambda: evaluate(args))


if __name__ == "__main__":
    sys.exit(main())
