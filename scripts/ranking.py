"""Is the supernet ready? Sub-networks trained alone against their inherited accuracy.

    python scripts/ranking.py                                         (the latest run under runs/)
    python scripts/ranking.py --checkpoint runs/vitl --count 12 --epochs 50
    python scripts/ranking.py --from inherited --steps 2000

Trains the smallest, the largest and random sub-networks spread over the parameters between them,
each alone by the run's own recipe in fewer epochs, and compares accuracies on the `select` splits
by Kendall's tau-b, with 95 % bootstrap intervals. If the interval contains 0, do not trust a search
on this supernet yet. Writes to RUN/ranking: ranking.json, ranking.csv, ranking.png, and a folder
for each training. Killed and started again it goes on; finished trainings are kept. The test splits
are not read.

Costs COUNT trainings of EPOCHS each: by default 12 of half the run's epochs, on two CPU cores ten
minutes for the demo and six for weizmann_cifar10.json. Do not use the launcher: on GPUs every
training is launched on all of them, on a CPU as many at once as there are cores. Exit code 2: a
training that failed (with its last lines), or a checkpoint, data or argument that cannot be used.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from vimnas_ds.arguments import folder
from vimnas_ds.config import ConfigError
from vimnas_ds.processes import end_process
from vimnas_ds.report.confusion import write_figure
from vimnas_ds.report.ranking import ranking_figure
from vimnas_ds.report.search_board import SearchBoard
from vimnas_ds.search.alone import Trainings, epochs_within, shortened
from vimnas_ds.search.cli import (
    Progress,
    add_cache_arguments,
    build_parser,
    open_evaluations,
    run_script,
    say_left_out,
)
from vimnas_ds.search.objective import Objective, parse_objective
from vimnas_ds.search.ranking import FEWEST, Ranking, build_ranking, choose_archs
from vimnas_ds.search.run import SearchRun, open_network, open_run
from vimnas_ds.search.scoring import ArchScorer, Evaluations, Scored
from vimnas_ds.space import Arch
from vimnas_ds.train.ranks import start_ranks


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    add = parser.add_argument
    add("--count", type=int, default=FEWEST, metavar="N", help="sub-networks (default %(default)s)")
    add("--trial", action="store_true", help=f"allow fewer than {FEWEST}: it says so in the result")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--epochs", type=int, metavar="E", help="of each training; default: half the run's"
    )
    budget.add_argument(
        "--steps", type=int, metavar="N", help="the whole epochs that N steps allow, instead"
    )
    add(
        "--from",
        dest="start",
        choices=["scratch", "inherited"],
        default="scratch",
        help="weights that each training starts from (default %(default)s)",
    )
    add("--seed", type=int, default=0, help="of the choice and of the bootstrap")
    add("--jobs", type=int, metavar="J", help="trainings at once; default: CPU cores, 1 on GPUs")
    add(
        "--datasets",
        nargs="+",
        metavar="NAME[=WEIGHT]",
        help="datasets compared, and their weights in the mean; default: all of the run, equally",
    )
    add("--out", type=folder, metavar="DIR", help="where results go; default: RUN/ranking")
    add_cache_arguments(parser)
    parser.set_defaults(metric="top1")
    return parser.parse_args(argv)


def rank(args: argparse.Namespace) -> int:
    check(args)
    run = open_run(args.checkpoint, start_ranks(engine=False), args.set, ema=args.ema)
    try:
        parse_objective(args.datasets, run.datasets)  # refused before anything is written
        archs = choose_archs(run.config, run.net.space, args.count, args.seed)
        trainings = plan(run, args, archs)
        trainings.begin()
        print(f"{len(archs)} sub-networks, {trainings.recipe.vimnas.schedule.epochs} epochs each")
        evaluations = open_evaluations(run, args, trainings.root)
        progress = Progress(len(archs), "inherited", 1, True)
        inherited = ArchScorer(evaluations).score_all("inherited", archs, progress)
        progress.close()
        trainings.run(trainings.total_steps(run.data.sizes), args.jobs)
        progress = Progress(len(archs), "alone", 1, True)
        alone = [score_alone(evaluations, trainings, i, progress) for i in range(len(archs))]
        progress.close()
        found = build_ranking(run.config, archs, inherited, alone, args.seed)
        report(run, args, trainings, found, evaluations.objective)
        say_left_out(run.left_out())
    finally:
        run.close()
    return 0


def check(args: argparse.Namespace) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("start scripts/ranking.py with python: it launches its own trainings")
    fewest = 2 if args.trial else FEWEST
    if args.count < fewest:
        hint = "" if args.trial else "; --trial allows fewer, to try the path out"
        raise ConfigError(f"--count {args.count}: at least {fewest} are needed for a tau{hint}")
    if args.ema and args.start == "inherited":
        raise ConfigError("--from inherited starts from the weights themselves: leave out --ema")
    for name in ("epochs", "steps", "jobs"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1, got {value}")


def plan(run: SearchRun, args: argparse.Namespace, archs: list[Arch]) -> Trainings:
    """Same recipe for all, in the epochs that the arguments say."""
    settings: dict[str, Any] = {"from": args.start, "count": args.count, "seed": args.seed}
    overrides = list(args.set)
    if args.start == "inherited":
        settings["weights"] = run.weights
        overrides += ["vimnas.model.init=null", f"vimnas.model.inherit={run.checkpoint}"]
    root = args.out or run.files.root / "ranking"

    def trainings(epochs: int) -> Trainings:
        budget = [*overrides, *shortened(run.config, epochs)]
        script = Path(__file__).with_name("train.py")
        return Trainings(root, archs, script, run.files.config, budget, settings)

    if args.steps is None:
        return trainings(args.epochs or max(1, run.config.vimnas.schedule.epochs // 2))
    sizes = run.data.sizes
    return trainings(epochs_within(args.steps, lambda e: trainings(e).total_steps(sizes)))


def score_alone(
    evaluations: Evaluations, trainings: Trainings, number: int, progress: Progress
) -> Scored:
    """A training's own weights on the samples that the run has decoded."""
    run = evaluations.run
    checkpoint = trainings.checkpoint(number)
    assert checkpoint is not None  # it is finished
    alone = open_network(checkpoint, run.ranks, ema=run.ema)
    theirs = replace(
        run, config=alone.config, checkpoint=alone.checkpoint, net=alone.net, weights=alone.weights
    )
    own = Evaluations(theirs, evaluations.log, evaluations.objective)
    return ArchScorer(own).score_all("alone", [trainings.archs[number]], progress)[0]


def report(
    run: SearchRun,
    args: argparse.Namespace,
    trainings: Trainings,
    found: Ranking,
    objective: Objective,
) -> None:
    """Files, picture, TensorBoard, table, verdict."""
    trial = f"a trial of {args.count} sub-networks: " if args.count < FEWEST else ""
    schedule = trainings.recipe.vimnas.schedule
    details = {
        "checkpoint": str(run.checkpoint),
        "from": args.start,
        "epochs": schedule.epochs,
        "steps": trainings.total_steps(run.data.sizes),
        "seed": args.seed,
        "weights": dict(objective.weights),
        "trial": bool(trial),
        "left_out": run.left_out(),
    }
    found.write(trainings.root, details)
    panels = [(f"{p.name}\n{p.agreement}", p.inherited, p.alone) for p in found.panels]
    title = f"{trial}{len(found.archs)} sub-networks, {schedule.epochs} epochs each alone"
    figure = ranking_figure(panels, found.params, title)
    write_figure(figure, trainings.root / "ranking.png")
    board = SearchBoard(args.out or run.files.tensorboard / "ranking")
    board.figure("inherited_against_alone", figure)
    board.close()
    print(found.table())
    for warning in found.warnings():
        print(warning)
    print(f"(select splits; written to {trainings.root})")
    print(f"{trial}{found.overall.agreement.verdict()}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_script(lambda: rank(args))


if __name__ == "__main__":
    end_process(main())
