"""The whole path on a laptop: data, training, both searches, controls, test scores, export.

    python scripts/demo.py                    (what `make demo` runs, on 2 ranks)

Makes the demo data, trains the nano supernet with the deepspeed launcher, selects a sub-network by
perturbation, evolves another under a parameter budget, puts both beside their controls on the test
splits, exports the evolved one, loads it back, classifies a clip and writes RUN/report.html. About
eight minutes on two CPU cores. Tables, and RUN/summary.json with datasets.NAME.chance and
datasets.NAME.picks.PICK.{top1, params, gflops} as fractions and 1e9 MACs; "random": the mean of
those of the evolved one's size.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import compare
import evolve
import export
import make_demo_data
import perturb_select
import report

from vimnas_ds.predict import classify
from vimnas_ds.processes import end_process
from vimnas_ds.search.cli import run_script
from vimnas_ds.search.run import SearchRun, open_run
from vimnas_ds.search.statistics import standard_error
from vimnas_ds.train.ranks import start_ranks

CONFIG = "ds_configs/demo.json"
BUDGET = 180_000  # parameters, between the smallest (89k) and the largest (276k) sub-network
CONTROLS = 20  # random ones for each pick: so many are needed to tell that it beats them


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
    say("both beside their controls on the test splits")
    if compare.main([*seed, "--k", str(CONTROLS)]):
        return 2
    opened = open_run(run, start_ranks(engine=False))
    try:
        summarise(opened)
        say("export, load back, classify")
        classify_one(opened, run / "export")
    finally:
        opened.close()
    say("the run and its searches on one page")
    if report.main([str(run)]):
        return 2
    print(f"TensorBoard: tensorboard --logdir {run / 'tensorboard'}")
    print(f"checkpoints: {run / 'checkpoints'}")
    print("for commands of your own: source .venv/bin/activate")
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


def summarise(run: SearchRun) -> None:
    """Puts the comparison's numbers into RUN/summary.json."""
    found = json.loads((run.files.root / "compare" / "compare.json").read_text())
    datasets: dict[str, Any] = {}
    for name in run.datasets:
        picks: dict[str, Any] = {}
        for entry in found["entries"]:
            if entry["role"] != "random":
                picks[entry["name"]] = {**entry["datasets"][name], "arch": entry["arch"]}
        alike = [e["datasets"][name] for e in found["entries"] if e["like"] == "evolution"]
        mean = {k: statistics.fmean(m[k] for m in alike) for k in ("top1", "params", "gflops")}
        error = standard_error([m["top1"] for m in alike])
        picks["random"] = {**mean, "top1_se": error, "k": len(alike)}
        chance = 1 / len(run.data.catalogs[name].class_names)
        datasets[name] = {"chance": chance, "picks": picks}
    summary = json.loads(run.files.summary.read_text())
    summary["datasets"] = datasets
    run.files.summary.write_text(json.dumps(summary, indent=2) + "\n")


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
    end_process(main())
