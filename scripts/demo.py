"""The whole path on a laptop: data, training, both searches, controls, test scores, export.

    python scripts/demo.py                    (what `make demo` runs, on 2 ranks)

Makes the demo data, trains the nano supernet with the deepspeed launcher, selects a sub-network by
perturbation, evolves another under a parameter budget, takes random ones of the same size as
controls, scores all of them on the test splits, exports the evolved one, loads it back and
classifies a clip. About eight minutes on two CPU cores. One table, and RUN/summary.json with
datasets.NAME.chance and datasets.NAME.picks.PICK.{top1, params, gflops} as fractions and 1e9 MACs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import evolve
import export
import make_demo_data
import perturb_select

from vimnas_ds.arch_file import read_arch
from vimnas_ds.config import ConfigError
from vimnas_ds.predict import classify
from vimnas_ds.report.table import format_table
from vimnas_ds.search.cli import Progress, run_script, say_left_out
from vimnas_ds.search.constraints import Constraints, Range
from vimnas_ds.search.evolve import sample_distinct
from vimnas_ds.search.multiview import MultiViewEvaluator
from vimnas_ds.search.run import SearchRun, open_run
from vimnas_ds.space import Arch
from vimnas_ds.train.dry_run import cost_of
from vimnas_ds.train.ranks import start_ranks

CONFIG = "ds_configs/demo.json"
BUDGET = 180_000  # parameters, between the smallest (89k) and the largest (276k) sub-network
CONTROLS = 5


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="training processes")
    parser.add_argument("--seed", type=int, default=0, help="of the searches")
    args = parser.parse_args(argv)
    return run_script(lambda: demo(args))


def demo(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    if make_demo_data.main(["--out", "runs/demo_data", "--force"]):
        return 2
    train(args.ranks)
    run = Path("runs/demo")
    seed = ["--checkpoint", str(run), "--seed", str(args.seed)]
    say("selection by perturbation")
    if perturb_select.main(seed):
        return 2
    say(f"evolution under {BUDGET:,} parameters")
    small = ["--population", "20", "--generations", "4", "--crossovers", "8", "--mutations", "8"]
    if evolve.main([*seed, "--params", str(BUDGET), *small]):
        return 2
    opened = open_run(run, start_ranks(engine=False))
    try:
        report(opened, args.seed)
        say("export, load back, classify")
        classify_one(opened, run / "export")
    finally:
        opened.close()
    print(f"TensorBoard: tensorboard --logdir {run / 'tensorboard'}")
    print(f"checkpoints: {run / 'checkpoints'}")
    print(f"the whole demo took {time.perf_counter() - started:.0f} s")
    return 0


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def train(ranks: int) -> None:
    """Through the real launcher; a failure ends the demo with its exit code."""
    say(f"training the supernet on {ranks} ranks")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    command += ["scripts/train.py", "--deepspeed_config", CONFIG, "--overwrite"]
    if (code := subprocess.run(command, env=os.environ).returncode) != 0:
        sys.exit(code)


def choose(run: SearchRun, seed: int) -> tuple[dict[str, list[Arch]], str]:
    """The picks, and in words how large the random ones are: within 5 % of the evolved one's
    parameters and of its budget, or within more where there are too few."""
    space, root = run.net.space, run.files.root
    evolved = read_arch(root / "evolution" / "arch.json", space)
    perturbed = read_arch(root / "perturbation" / "arch.json", space)
    picks = {
        "largest": [space.largest()],
        "smallest": [space.smallest()],
        "perturbation": [perturbed],
        "evolution": [evolved],
    }
    first, rng = run.datasets[0], random.Random(f"{seed}/controls")
    size = cost_of(run.config, evolved, first)[0]
    for percent in (5, 10, 20, 40):
        low, high = size * (1 - percent / 100), min(size * (1 + percent / 100), BUDGET)
        alike = Constraints([Range("params", first, low, high)], run.config, space)
        found = sample_distinct(alike, CONTROLS, [evolved, perturbed], rng)
        if len(found) == CONTROLS:
            break
    if not found:
        raise ConfigError(f"no other sub-network within 40 % of {size:,} parameters")
    words = f"{len(found)} within {percent} % of the evolved one's {size:,} parameters"
    return {**picks, "random": found}, words


def report(run: SearchRun, seed: int) -> None:
    """Score every pick on the test splits; print the table and write summary.json."""
    picks, alike = choose(run, seed)
    say("test splits")
    evaluator = MultiViewEvaluator(run)
    unique = list(dict.fromkeys(a for archs in picks.values() for a in archs))
    total = sum(evaluator.num_files(name, "test") for name in run.datasets)
    progress = Progress(total, "test", 1, True)
    top1: dict[tuple[Arch, str], float] = {}
    counts: dict[str, int] = {}
    for name in run.datasets:
        forwards = {a.to_json(): partial(run.net, arch=a, dataset=name) for a in unique}
        scores = evaluator.scores(forwards, name, "test", progress)
        for arch in unique:
            score = scores[arch.to_json()]
            top1[arch, name], counts[name] = score.top1, score.count
    progress.close()
    say_left_out(evaluator.skipped)
    evaluator.close()
    datasets: dict[str, Any] = {}
    rows = []
    for name in run.datasets:
        chance = 1 / len(run.data.catalogs[name].class_names)
        entry: dict[str, Any] = {"chance": chance, "test_samples": counts[name], "picks": {}}
        for pick, archs in picks.items():
            found = [top1[a, name] for a in archs]
            costs = [cost_of(run.config, a, name) for a in archs]
            entry["picks"][pick] = {
                "top1": statistics.fmean(found),
                "params": statistics.fmean(p for p, _ in costs),
                "gflops": statistics.fmean(g for _, g in costs),
                "k": len(archs),
                "archs": [json.loads(a.to_json()) for a in archs],
            }
            shown = f"{statistics.fmean(found):.1%}"
            if len(archs) > 1:
                error = statistics.stdev(found) / math.sqrt(len(found))
                entry["picks"][pick]["top1_se"] = error
                shown += f" +- {error:.1%}"
            pick_costs = entry["picks"][pick]
            params, gflops = f"{pick_costs['params']:,.0f}", f"{pick_costs['gflops']:.4f}"
            rows.append([name, f"{chance:.1%}", pick, shown, params, gflops])
        datasets[name] = entry
    files = run.files
    summary = json.loads(files.summary.read_text())
    summary["datasets"] = datasets
    files.summary.write_text(json.dumps(summary, indent=2) + "\n")
    print(format_table(["dataset", "chance", "pick", "top-1", "params", "GFLOPs"], rows))
    print(
        f"(test splits; random: mean and standard error of {alike}; GFLOPs: 1e9 "
        "multiply-accumulates per input)"
    )


def classify_one(run: SearchRun, folder: Path) -> None:
    """Export the evolved sub-network and classify the first test clip with the export alone."""
    if export.main(
        [
            "--checkpoint",
            str(run.files.root),
            "--arch",
            str(run.files.root / "evolution" / "arch.json"),
            "--out",
            str(folder),
        ]
    ):
        sys.exit(2)
    name = next(n for n, d in run.config.vimnas.data.datasets.items() if not d.is_image)
    catalog = run.data.catalogs[name]
    sample = catalog.test[0]
    found = classify(folder, catalog.root / sample.path, name, top=3)
    best = ", ".join(
        f"{label} {p:.0%}" for label, p in zip(found.labels, found.probabilities, strict=True)
    )
    print(f"{sample.path} is {catalog.class_names[sample.label]!r}; predicted: {best}")


if __name__ == "__main__":
    sys.exit(main())
