"""Search sub-networks under resource constraints by evolution (Algorithm 2).

    python scripts/evolve.py --params 150k                            (the latest run under runs/)
    python scripts/evolve.py --checkpoint runs/vitl --params 200M:250M --gflops k400=:300
    deepspeed --num_gpus 2 scripts/evolve.py --params 150k            (the same result)

Ranges are HIGH or LOW:HIGH, with a dataset before: k400=LOW:HIGH; GFLOPs are 1e9 MACs per input.
Each candidate costs one pass over the `select` splits. Writes to RUN/evolution: result.json,
arch.json, evaluations.csv. The test splits are not read. Exit code 2: a constraint that cannot be
reached (with the reachable range), or a checkpoint, data or argument that cannot be used.
"""

from __future__ import annotations

import argparse
import statistics
import sys

from vimnas_ds.report.search_board import SearchBoard, candidates_figure
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
from vimnas_ds.search.constraints import Constraints, parse_range
from vimnas_ds.search.evolve import Evolution, EvolutionOptions, Generation
from vimnas_ds.search.results import result_object, write_result
from vimnas_ds.search.run import open_run
from vimnas_ds.search.scoring import ArchScorer
from vimnas_ds.train.ranks import SEARCH_TIMEOUT, start_ranks

HELP = {
    "population": "sub-networks of the first generation",
    "generations": "generations, the first included",
    "top_k": "best ones so far that become parents",
    "crossovers": "children of two parents per generation",
    "mutations": "mutated parents per generation",
    "depth_probability": "probability that a mutation changes depth, and that it changes embed_dim",
    "block_probability": "probability that a mutation changes a layer's block",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    add_search_arguments(parser, "evolution")
    for resource in ("params", "gflops"):
        parser.add_argument(
            f"--{resource}",
            action="append",
            default=[],
            metavar="[DATASET=][LOW:]HIGH",
            help="a constraint (repeatable; all must hold)",
        )
    defaults = EvolutionOptions()
    for name, text in HELP.items():
        default = getattr(defaults, name)
        kind = type(default)
        text = f"{text} (default {default})"
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=text)
    return parser.parse_args(argv)


def search(args: argparse.Namespace) -> int:
    options = EvolutionOptions(
        args.population,
        args.generations,
        args.top_k,
        args.crossovers,
        args.mutations,
        args.depth_probability,
        args.block_probability,
    )
    check_samples(args.samples)
    ranks = start_ranks(SEARCH_TIMEOUT, engine=False)
    run = open_run(args.checkpoint, ranks, args.set, args.samples)
    ranges = [parse_range("params", text, run.datasets) for text in args.params]
    ranges += [parse_range("gflops", text, run.datasets) for text in args.gflops]
    constraints = Constraints(ranges, run.config, run.net.space)
    folder = args.out or run.files.root / "evolution"
    where = args.out or run.files.tensorboard / "evolution"
    board = SearchBoard(where) if ranks.is_main else None
    scorer = ArchScorer(open_evaluations(run, args, folder))
    evolution = Evolution(scorer, constraints, options, args.seed)
    most = options.population + (options.generations - 1) * (options.crossovers + options.mutations)
    progress = Progress(most, "evolution", ranks.world_size, ranks.is_main)
    history = []
    for generation in evolution.generations(progress):
        history.append(generation)
        if board is not None:
            board.scalars(spread(generation), generation.number)
    progress.close()
    best = evolution.ranked()[0]
    if board is not None:
        details = {
            "constraints": [str(r) for r in ranges],
            "evaluated": len(scorer.scores),
            "generations": [{"number": g.number, **spread(g)} for g in history],
        }
        result = result_object(run, "evolution", best, scorer.scores[best], details)
        write_result(folder, result)
        ranked = evolution.ranked()
        params = [max(p for p, _ in scorer.costs(a).values()) for a in ranked]
        title = f"{len(ranked)} candidates; {'; '.join(map(str, ranges)) or 'no constraint'}"
        accuracies = [scorer.scores[a].accuracy for a in ranked]
        board.figure("score_against_params", candidates_figure(params, accuracies, 0, title))
        board.close()
        print(describe(history))
        if len(history) < options.generations:
            print(f"stopped after {len(history)} generations: no new sub-network was found")
        print(f"best of {len(scorer.scores)}: {best}")
        print(f"mean top-1 on select {scorer.scores[best].accuracy:.1%}; written to {folder}")
        say_left_out(run.left_out())
    run.close()
    return 0


def spread(generation: Generation) -> dict[str, float]:
    """The best so far, and the members' mean, lowest and standard deviation."""
    found = generation.accuracies
    return {
        "best": generation.best_accuracy,
        "mean": statistics.fmean(found),
        "lowest": min(found),
        "spread": statistics.pstdev(found),
    }


def describe(history: list[Generation]) -> str:
    rows = [
        [str(g.number), str(len(g.members)), *(f"{v:.1%}" for v in spread(g).values())]
        for g in history
    ]
    return format_table(["generation", "new", "best so far", "mean", "lowest", "spread"], rows)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_script(lambda: search(args))


if __name__ == "__main__":
    sys.exit(main())
