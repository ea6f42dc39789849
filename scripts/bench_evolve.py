"""Candidates per second of the evolutionary search: two ranks / one rank, one thread each.

    python scripts/bench_evolve.py                       about three minutes; more is better

An untrained vit_t supernet, 16 random 224-pixel images as the select split, a generation of 16 and
one of 16 children. The script starts two ranks with the deepspeed launcher; they take turns: both
share the search (`Evaluations`: chunks dealt by cost, results gathered), or rank 0 searches alone
while the other waits. Floor: 2.0 less what the unequal halves of a chunk wait for each other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from bench_common import arguments, machine, quartiles, ratio_line

from vimnas_ds.config import RunConfig, parse_config
from vimnas_ds.data.batches import Batch
from vimnas_ds.data.listing import Sample
from vimnas_ds.search.constraints import Constraints
from vimnas_ds.search.evolve import Evolution, EvolutionOptions
from vimnas_ds.search.objective import parse_objective
from vimnas_ds.search.run import SearchRun
from vimnas_ds.search.scoring import ArchScorer, EvaluationLog, Evaluations
from vimnas_ds.train.engine import build_supernet
from vimnas_ds.train.evaluate import Evaluator
from vimnas_ds.train.ranks import Ranks, settle_on_cpu, start_ranks

GOAL = 1.8
FILE = Path(__file__).resolve().parents[1] / "ds_configs" / "vitt.json"
DATASET, SAMPLES = "imagenet", 16
OPTIONS = EvolutionOptions(population=16, generations=2, top_k=8, crossovers=8, mutations=8)


class InMemory(Evaluator):
    """The evaluator on images that are there already."""

    def __init__(self, ranks: Ranks, names: tuple[str, ...]):
        super().__init__(cast(Any, None), ranks, torch.float32, SAMPLES, 0)
        x = torch.randn(SAMPLES, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        self._batch = Batch(x, torch.arange(SAMPLES), names)

    def _batches(self, dataset: str, split: str) -> Iterator[Batch]:
        yield self._batch


def configuration() -> RunConfig:
    raw = json.loads(FILE.read_text(encoding="utf-8"))
    datasets = raw["vimnas"]["data"]["datasets"]
    raw["vimnas"]["data"]["datasets"] = {DATASET: datasets[DATASET]}
    return parse_config(raw)


def open_search(config: RunConfig, net: torch.nn.Module, ranks: Ranks, folder: Path) -> ArchScorer:
    names = tuple(map(str, range(SAMPLES)))
    data = SimpleNamespace(splits={DATASET: {"select": [Sample(name, 0) for name in names]}})
    evaluator = InMemory(ranks, names)
    run = SearchRun(
        config, folder, cast(Any, net), torch.float32, "", False, {}, {}, cast(Any, data),
        cast(Any, None), evaluator, ranks,
    )  # fmt: skip
    log = EvaluationLog(folder / "evaluations.csv", [DATASET], ranks.is_main)
    return ArchScorer(Evaluations(run, log, parse_objective(None, [DATASET])))


def search(config: RunConfig, net: torch.nn.Module, ranks: Ranks, seed: int) -> tuple[float, str]:
    """(Candidates per second, the best one) of one search."""
    with tempfile.TemporaryDirectory() as folder:
        scorer = open_search(config, net, ranks, Path(folder))
        constraints = Constraints([], config, config.vimnas.search_space)
        evolution = Evolution(scorer, constraints, OPTIONS, seed)
        started = time.perf_counter()
        list(evolution.generations(lambda: None))
        return len(scorer.scores) / (time.perf_counter() - started), str(evolution.ranked()[0])


def worker(runs: int) -> int:
    ranks = start_ranks(engine=False)
    settle_on_cpu(1, ranks)
    config = configuration()
    torch.manual_seed(0)
    net = build_supernet(config).eval().requires_grad_(False)
    alone = Ranks(0, 1, ranks.device)
    rates: dict[str, list[float]] = {"one rank": [], "two ranks": []}
    order = list(rates)
    for seed in range(runs + 1):
        found = {}
        for name in order:
            dist.barrier()
            if name == "two ranks" or ranks.is_main:
                rate, found[name] = search(
                    config, net, ranks if name == "two ranks" else alone, seed
                )
                rates[name] += [rate] if seed else []  # the first run warms up
        order.reverse()
        assert len(set(found.values())) == 1, found
    dist.barrier()
    if ranks.is_main:
        middles = {}
        for name, values in rates.items():
            low, middles[name], high = quartiles(values)
            print(
                f"  {name:<12} {middles[name]:.2f} candidates/s, quartiles {low:.2f} to {high:.2f}"
            )
        print(ratio_line("evolve_two_ranks", middles["two ranks"] / middles["one rank"], GOAL))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, runs=3)
    parser.set_defaults(threads=1)
    parser.add_argument("--local_rank", type=int, help="the launcher's: this is a rank")
    args = parser.parse_args(argv)
    if args.local_rank is not None:
        return worker(args.runs)
    print(f"machine: {machine(torch.device(args.device))}, one thread a rank, float32", flush=True)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if args.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(
        [*command, "--runs", str(args.runs)], env=environment, stdout=subprocess.PIPE, text=True
    )
    shown = [s for s in done.stdout.splitlines() if s.startswith("  ") or " ratio " in s]
    print("\n".join(shown))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
