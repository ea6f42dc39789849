"""Put what the searches picked beside its controls: does it beat random ones of its size?

    python scripts/compare.py                             (the picks of the latest run under runs/)
    python scripts/compare.py --checkpoint runs/vitl --k 20 --datasets k400 ssv2
    python scripts/compare.py --pick mine=arch.json --split select
    deepspeed --num_gpus 2 scripts/compare.py             (the same result)

Picks are RUN/*/result.json (perturbation, evolution, front, ...) and what --pick names. Beside
them: largest, smallest, the argmax of the alphas, perturbation with fixed alphas, for each pick
evolution under its number of parameters and as many evaluations as its own search took (where it
does not tell: as perturbation needs; RUN/evolution's pick is its own control unless more than
parameters bound it), and k random sub-networks within a few percent of its parameters. Picks of
other weights are named and left out. The searches read the `select` split (and its
cache), the table the `test` split with the datasets' own views (--single_view: one).

Prints a table for each dataset and, for each pick, whether it beats the random ones (an exact rank
test of the mean over datasets: it must be better than all of 20). With --split select nothing is
claimed: the picks were chosen there. Writes RUN/compare/compare.json and compare.png. Costs two
searches and one test of all sub-networks; a minute or two for the demo on a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import partial

from vimnas_ds.config import ConfigError
from vimnas_ds.processes import end_process
from vimnas_ds.report.comparison import comparison_figure
from vimnas_ds.report.confusion import write_figure
from vimnas_ds.report.search_board import SearchBoard
from vimnas_ds.report.table import format_table
from vimnas_ds.search.cli import (
    Progress,
    add_search_arguments,
    build_parser,
    check_samples,
    open_evaluations,
    run_script,
    say_left_out,
)
from vimnas_ds.search.comparison import HEAD, Measured, comparison_object, judge, rows_of
from vimnas_ds.search.controls import (
    Entry,
    Pick,
    architectures,
    corners,
    evolution_of_size,
    find_picks,
    fixed_perturbation,
    random_alike,
)
from vimnas_ds.search.multiview import MultiViewEvaluator
from vimnas_ds.search.objective import parse_objective
from vimnas_ds.search.perturb import PerturbationSearch
from vimnas_ds.search.prefix import PrefixCache, free_budget
from vimnas_ds.search.run import SearchRun, open_run
from vimnas_ds.search.scoring import Evaluations
from vimnas_ds.space import Arch
from vimnas_ds.train.dry_run import cost_of
from vimnas_ds.train.ranks import SEARCH_TIMEOUT, start_ranks


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    add_search_arguments(parser, "compare")
    parser.add_argument(
        "--pick",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="another sub-network to judge: a file holding an architecture (repeatable)",
    )
    parser.add_argument("--k", type=int, default=20, help="random ones for each pick (default 20)")
    parser.add_argument(
        "--evaluations",
        type=int,
        metavar="N",
        help="of the evolution under a pick's size; default: as many as the pick's own search "
        "took, or perturbation needs",
    )
    parser.add_argument("--split", choices=("test", "select"), default="test")
    parser.add_argument("--single_view", action="store_true", help="one centre clip and crop")
    return parser.parse_args(argv)


def compare(args: argparse.Namespace) -> int:
    check_samples(args.samples)
    for name in ("k", "evaluations"):
        if getattr(args, name) is not None and getattr(args, name) < 2:
            raise ConfigError(f"--{name} must be at least 2, got {getattr(args, name)}")
    ranks = start_ranks(SEARCH_TIMEOUT, engine=False)
    run = open_run(args.checkpoint, ranks, args.set, args.samples, args.ema)
    folder = args.out or run.files.root / "compare"
    objective = parse_objective(args.datasets, run.datasets, args.metric)
    picks, notes = find_picks(run, args.pick, objective)
    if ranks.is_main:
        for note in notes:
            print(note, file=sys.stderr)
    evaluations = open_evaluations(run, args, folder)
    entries, within = gather(args, evaluations, picks)
    table = measure(run, evaluations.datasets, entries, args.split, args.single_view)
    if ranks.is_main:
        weights = evaluations.objective.weights
        data = run.config.vimnas.data.datasets
        about = {
            "checkpoint": str(run.checkpoint),
            "ema": run.ema,
            "split": args.split,
            "seed": args.seed,
            "views": {n: 1 if args.single_view else math.prod(data[n].views) for n in weights},
            "random_within_percent": within,
        }
        found = comparison_object(entries, table, weights, about)
        (folder / "compare.json").write_text(json.dumps(found, indent=1) + "\n")
        figure = comparison_figure(found, evaluations.datasets)
        write_figure(figure, folder / "compare.png")
        board = SearchBoard(args.out or run.files.tensorboard / "compare")
        board.figure("controls", comparison_figure(found, evaluations.datasets))
        board.close()
        for name in evaluations.datasets:
            print(f"\n{name} ({args.split})\n{format_table(HEAD, rows_of(name, entries, table))}")
        print()
        for verdict in judge(entries, table, weights, args.split):
            print(verdict)
        print(f"written to {folder}/compare.json and compare.png")
    run.close()
    return 0


def gather(
    args: argparse.Namespace, evaluations: Evaluations, picks: dict[str, Pick]
) -> tuple[list[Entry], dict[str, int]]:
    """Everything compared, each pick followed by its random ones; and within how many percent."""
    run = evaluations.run
    needed = PerturbationSearch(evaluations, alphas=None).num_evaluations()
    budgets = {
        name: args.evaluations or pick.evaluations or needed
        for name, pick in picks.items()
        if not pick.evolved
    }
    world, main = run.ranks.world_size, run.ranks.is_main
    progress = Progress(needed + sum(budgets.values()), "controls", world, main)
    prefixes = PrefixCache(run, free_budget(run))
    controls = [*corners(run), fixed_perturbation(evaluations, progress, prefixes)]
    prefixes.clear()
    for name, budget in budgets.items():
        controls.append(
            evolution_of_size(evaluations, name, picks[name].arch, budget, args.seed, progress)
        )
    progress.close()
    entries, within = [], {}
    chosen = [pick.arch for pick in picks.values()]
    for name, pick in picks.items():
        entries.append(Entry(name, "pick", pick.arch, evaluations=pick.evaluations))
        alike, within[name] = random_alike(
            run, evaluations.datasets[0], pick.arch, args.k, chosen, args.seed
        )
        entries += [Entry("random", "random", a, name) for a in alike]
    return [*entries, *controls], within


def measure(
    run: SearchRun, datasets: tuple[str, ...], entries: list[Entry], split: str, single_view: bool
) -> dict[Arch, dict[str, Measured]]:
    """All sub-networks on a split of every dataset; every file is decoded once for all of them."""
    archs = architectures(entries)
    evaluator = MultiViewEvaluator(run, single_view)
    samples = sum(evaluator.num_samples(name, split) for name in datasets)
    progress = Progress(samples, split, run.ranks.world_size, run.ranks.is_main)
    table: dict[Arch, dict[str, Measured]] = {arch: {} for arch in archs}
    for name in datasets:
        forwards = {a.to_json(): partial(run.net, arch=a, dataset=name) for a in archs}
        scores = evaluator.scores(forwards, name, split, progress)
        for arch in archs:
            score = scores[arch.to_json()]
            table[arch][name] = Measured(
                score.top1, score.top5, score.count, *cost_of(run.config, arch, name)
            )
    progress.close()
    if run.ranks.is_main:
        say_left_out(evaluator.skipped)
    evaluator.close()
    return table


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_script(lambda: compare(args))


if __name__ == "__main__":
    end_process(main())
