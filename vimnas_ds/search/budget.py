"""The searches' options about costs, and the constraints they make."""

from __future__ import annotations

import argparse
import sys

from vimnas_ds.config import ConfigError
from vimnas_ds.search.constraints import Constraints, parse_about, parse_range, split_dataset
from vimnas_ds.search.latency import latency_table
from vimnas_ds.search.resources import UNITS, CostModel, Resource
from vimnas_ds.search.run import SearchRun

RESOURCES = {
    "params": "parameters with one head (computed)",
    "gflops": "1e9 multiply-accumulates of one input (computed)",
    "latency_ms": "milliseconds of one forward pass of a batch of --latency_batch, summed over a "
    "table that is measured on this device, stand-alone networks, eval mode, medians; kept in "
    "RUN/latency/, its error stated (measured)",
    "memory_mb": "2^20 bytes at the peak of that pass: weights, input and the tensors alive "
    "together, without kernels' workspaces and the process itself (computed)",
}


def add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    """Ranges of every resource, and what latency and memory are of."""
    group = parser.add_argument_group(
        "constraints",
        "ranges HIGH or LOW:HIGH, repeatable, all must hold; DATASET: whose head and input it is\n"
        "for, by default the run's first. Ranges that hold no sub-network are answered with what\n"
        "can be reached, exactly.",
    )
    for name, text in RESOURCES.items():
        metavar = "[DATASET=][LOW:]HIGH"
        group.add_argument(f"--{name}", action="append", default=[], metavar=metavar, help=text)
    group.add_argument(
        "--about", metavar="[DATASET=]N", help="parameters within 2 %% of N, e.g. 23M"
    )
    group.add_argument(
        "--latency_batch", type=int, default=1, metavar="N", help="inputs a pass (default 1)"
    )
    group.add_argument(
        "--latency_threads",
        type=int,
        default=1,
        metavar="N",
        help="on a CPU, threads that latency is measured with, however many the ranks use (default "
        "1: the processor time of that thread, without what other processes take)",
    )


def read_budget(
    args: argparse.Namespace, run: SearchRun, against: str | None = None
) -> tuple[CostModel, Constraints, Resource | None]:
    """What the options ask for, after measuring the latencies that are needed. `against`: a
    resource, or RESOURCE=DATASET, to be had as well.

    Raises ConfigError in words, for ranges that cannot be reached with what can.
    """
    for name in ("latency_batch", "latency_threads"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(args, name)}")
    ranges = [parse_range(n, text, run.datasets) for n in UNITS for text in getattr(args, n)]
    if args.about is not None:
        ranges.append(parse_about(args.about, run.datasets))
    needed = {(r.resource, r.dataset) for r in ranges}
    cost: tuple[str, str] | None = None
    if against is not None:
        name = against.partition("=")[0]
        if name not in UNITS:
            raise ConfigError(f"--pareto {against}: {name!r} is none of {', '.join(UNITS)}")
        dataset = against.partition("=")[2] or run.datasets[0]
        cost = name, split_dataset(f"--pareto {against}", f"{dataset}=", run.datasets)[0]
        needed.add(cost)
    model = CostModel(run.config, run.net.space, args.latency_batch, run.dtype.itemsize)
    for dataset in sorted(d for resource, d in needed if resource == "latency_ms"):
        table = latency_table(run, dataset, args.latency_batch, args.latency_threads)
        model.latencies[dataset] = table
        if run.ranks.is_main:
            print(table, file=sys.stderr)  # noqa: T201
    constraints = Constraints(ranges, run.config, run.net.space, model)
    return model, constraints, None if cost is None else model.resource(*cost)
