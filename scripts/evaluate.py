"""Report sub-networks of a trained supernet on the test splits: numbers, JSON, pictures.

    python scripts/evaluate.py                            (largest and smallest of the latest run)
    python scripts/evaluate.py --checkpoint runs/vitl --arch runs/vitl/evolution/arch.json largest
    python scripts/evaluate.py --views dense --stride 1 --set vimnas.data.k400.test_clips=10
    deepspeed --num_gpus 2 scripts/evaluate.py --arch runs/demo/perturbation/arch.json

Several views a sample, softmax averaged: Kinetics 4 clips x 3 crops, SSV2 2 x 3, images one centre
crop (vimnas.data.NAME.test_clips, test_crops). Crops lie along the longer side, clips

    --views even     evenly from the video's start to its end (default; the published protocols)
    --views dense    --stride seconds apart in its middle, closer where the video is too short

Every file is opened and decoded once for all its views and sub-networks. Under the launcher the
ranks share the files; the numbers stay the same. A file of the official list that cannot be used,
or is not on the disk, is left out of the accuracies, counted and named.

Prints top-1, top-5, params and GFLOPs per view x views. Writes RUN/evaluation.json (every field:
vimnas_ds/search/evaluation.py), .csv, and one picture per dataset and sub-network beside them,
evaluation-DATASET-NAME.png: confusion matrix and accuracy per class; with more than 40 classes the
most confused pairs and the worst classes. Cost: the network's, and on a CPU 0.3 CPU-seconds of
decoding, resizing and cropping for 4 x 3 views of a 10 s, 340 x 256 video (bench_views.py).
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

from vimnas_ds.arch_file import named_arch
from vimnas_ds.config import ConfigError
from vimnas_ds.processes import end_process
from vimnas_ds.report.confusion import confusion_figure, write_figure
from vimnas_ds.report.table import format_table
from vimnas_ds.search.cli import (
    Progress,
    build_parser,
    choose_datasets,
    run_script,
    say_left_out,
)
from vimnas_ds.search.evaluation import (
    describe_skipped,
    evaluation_object,
    run_classes,
    short_names,
    write_evaluation,
)
from vimnas_ds.search.multiview import MultiViewEvaluator, ViewScore
from vimnas_ds.search.run import open_run
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
    parser.add_argument(
        "--views",
        choices=("even", "dense"),
        default="even",
        help="even: clips from the video's start to its end; dense: --stride apart in its middle",
    )
    parser.add_argument(
        "--stride",
        type=float,
        metavar="SECONDS",
        help="between the starts of dense clips; default: a quarter of a clip",
    )
    parser.add_argument("--single_view", action="store_true", help="one centre clip and crop")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/evaluation.json")
    return parser.parse_args(argv)


def evaluate(args: argparse.Namespace) -> int:
    if args.single_view and args.views == "dense":
        raise ConfigError("--single_view and --views dense exclude each other")
    if args.stride is not None and args.views != "dense":
        raise ConfigError(f"--stride {args.stride:g}: a stride is for dense views, --views dense")
    if args.stride is not None and not 0 < args.stride < math.inf:
        raise ConfigError(f"--stride must be above 0 seconds, got {args.stride:g}")
    if args.out is not None and args.out.suffix != ".json":
        raise ConfigError(f"--out {args.out} must end in .json: a CSV and pictures go beside it")
    ranks = start_ranks(SEARCH_TIMEOUT, engine=False)
    run = open_run(args.checkpoint, ranks, args.set, ema=args.ema)
    datasets = choose_datasets(run, args.datasets)
    archs = {name: named_arch(name, run.net.space) for name in args.arch}
    evaluator = MultiViewEvaluator(run, args.single_view, args.views, args.stride)
    out = args.out or run.files.root / "evaluation.json"
    if ranks.is_main:
        out.parent.mkdir(parents=True, exist_ok=True)
    files = sum(evaluator.num_files(name, args.split) for name in datasets)
    progress = Progress(files, "evaluation", ranks.world_size, ranks.is_main)
    scores: dict[str, dict[str, ViewScore]] = {label: {} for label in archs}
    for name in datasets:
        forwards = {k: partial(run.net, arch=a, dataset=name) for k, a in archs.items()}
        for label, score in evaluator.scores(forwards, name, args.split, progress).items():
            scores[label][name] = score
    progress.close()
    if ranks.is_main:
        found = evaluation_object(run, evaluator, archs, scores, args.split)
        write_evaluation(out, found)
        short = short_names(list(archs))
        for label, by_dataset in scores.items():
            for name, score in by_dataset.items():
                title = f"{name} ({args.split}), {short[label]}, {score.plan.describe()}"
                figure = confusion_figure(score.confusion, run_classes(run, name), title)
                write_figure(figure, out.with_name(f"{out.stem}-{name}-{short[label]}.png"))
        say_left_out(evaluator.skipped)
        print(describe(found, short))
        print("".join(f"{line}\n" for line in describe_skipped(found)), end="")
        print(f"({args.split} split; written to {out}, pictures to {out.stem}-*.png beside it)")
    evaluator.close()
    run.close()
    return 0


def describe(found: dict[str, Any], short: dict[str, str]) -> str:
    """One row a sub-network and dataset."""
    head = ["sub-network", "dataset", "samples", "top-1", "top-5", "classes' mean"]
    head += ["worst class", "params", "GFLOPs x views"]
    lines = []
    for label, arch in found["archs"].items():
        for name, r in arch["datasets"].items():
            skipped = len(found["datasets"][name]["skipped"])
            samples = f"{r['count']:,}" + (f" ({skipped} left out)" if skipped else "")
            tops = [f"{r[key]:.1%}" for key in ("top1", "top5", "mean_class")]
            classes = {c: v["top1"] for c, v in r["per_class"].items() if v["count"]}
            worst = min(classes, key=classes.__getitem__)
            cost = f"{r['gflops_per_view']:.4g} x {r['views']}"
            last = f"{worst[:24]} {classes[worst]:.0%}"
            lines.append([short[label], name, samples, *tops, last, f"{r['params']:,}", cost])
    return format_table(head, lines)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_script(lambda: evaluate(args))


if __name__ == "__main__":
    end_process(main())
