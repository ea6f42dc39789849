"""Search sub-networks under resource constraints by evolution (Algorithm 2).

    python scripts/evolve.py --params 150k                            (the latest run under runs/)
    python scripts/evolve.py --checkpoint runs/vitl --params 200M:250M --gflops k400=:300
    python scripts/evolve.py --about 23M --latency_ms k400=:40
    python scripts/evolve.py --pareto latency_ms=k400                 (the whole front in one run)
    deepspeed --num_gpus 2 scripts/evolve.py --params 150k            (the same result)

Each candidate costs one pass over the `select` splits. Writes to RUN/evolution (with --pareto, to
RUN/front): result.json, arch.json, evaluations.csv, with --pareto front.json and front.png. The
test splits are not read. Exit code 2: constraints that cannot be reached (with the reachable
ranges), or a checkpoint, data or argument that cannot be used.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from matplotlib.figure import Figure

from vimnas_ds.config import ConfigError
from vimnas_ds.processes import end_process
from vimnas_ds.report.search_board import SearchBoard, candidates_figure
from vimnas_ds.report.table import format_table
from vimnas_ds.search.budget import add_budget_arguments, read_budget
from vimnas_ds.search.cli import (
    Progress,
    add_search_arguments,
    build_parser,
    check_samples,
    open_evaluations,
    run_script,
    say_left_out,
)
from vimnas_ds.search.evolve import Evolution, EvolutionOptions, Generation
from vimnas_ds.search.front import (
    accuracy_error,
    draw_front,
    front_object,
    front_table,
    parse_pick,
    write_front,
)
from vimnas_ds.search.resources import UNITS
from vimnas_ds.search.results import result_object, write_result
from vimnas_ds.search.run import open_run
from vimnas_ds.search.scoring import ArchScorer
from vimnas_ds.space import Arch
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
    add_search_arguments(parser, "evolution, with --pareto RUN/front")
    add_budget_arguments(parser)
    parser.add_argument(
        "--pareto",
        nargs="?",
        const="params",
        metavar="RESOURCE[=DATASET]",
        help=f"seek the front of accuracy against a cost, {', '.join(UNITS)} (default params), by "
        "NSGA-II, within the constraints; parents then are the best `population` so far",
    )
    parser.add_argument(
        "--pick",
        metavar="knee|best|BUDGET",
        help="with --pareto: the front's point that arch.json gets: the knee (default), the most "
        "accurate one, or that within a budget",
    )
    defaults = EvolutionOptions()
    for name, text in HELP.items():
        default = getattr(defaults, name)
        kind = type(default)
        text = f"{text} (default {default})"
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=text)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError for options that do not go together, or impossible ones."""
    check_samples(args.samples)
    if args.pareto is not None and args.metric != "top1":
        raise ConfigError(
            f"--pareto seeks a front of accuracy: leave out --metric {args.metric}, or --pareto"
        )
    if args.pick is not None and args.pareto is None:
        raise ConfigError(f"--pick {args.pick} chooses a point of a front: add --pareto")


def search(args: argparse.Namespace) -> int:
    check(args)
    options = EvolutionOptions(**{name: getattr(args, name) for name in HELP})
    ranks = start_ranks(SEARCH_TIMEOUT, engine=False)
    run = open_run(args.checkpoint, ranks, args.set, args.samples, args.ema)
    model, constraints, against = read_budget(args, run, args.pareto)
    name = "evolution" if against is None else "front"
    asked = args.pick or "knee"
    pick = parse_pick(asked, constraints.reach(against)[0] if against is not None else 0.0)
    folder = args.out or run.files.root / name
    evaluations = open_evaluations(run, args, folder)
    board = SearchBoard(args.out or run.files.tensorboard / name) if ranks.is_main else None
    datasets, scorer = evaluations.datasets, ArchScorer(evaluations)
    evolution = Evolution(scorer, constraints, options, args.seed, against)
    most = options.population + (options.generations - 1) * (options.crossovers + options.mutations)
    most = int(min(most, constraints.size))
    progress = Progress(most, name, ranks.world_size, ranks.is_main)
    history, front = [], dict[str, Any]()
    for generation in evolution.generations(progress):
        history.append(generation)
        if board is not None:
            board.scalars(spread(generation, args.metric), generation.number)
            if against is not None:
                front = front_object(evolution, pick, model, datasets)
                sizes = {"hypervolume": front["hypervolume"], "front_size": len(front["points"])}
                board.scalars(sizes, generation.number)
                board.figure("front", draw_front(evolution, front), generation.number)
    progress.close()
    if board is not None:
        best = evolution.ranked()[0]
        if against is not None:
            best = Arch.from_json(front["points"][front["picked"]]["arch"])
            write_front(folder, evolution, front)
        details = {
            "constraints": [str(r) for r in constraints.ranges],
            "evaluated": len(scorer.scores),
            "generations": [{"number": g.number, **spread(g, args.metric)} for g in history],
            "costs": model.costs(best, datasets),
        }
        write_result(folder, result_object(run, name, best, scorer.scores[best], details))
        board.figure("score_against_params", candidates(evolution, best))
        board.close()
        print(describe(history, args.metric))
        if len(history) < options.generations:
            print(f"stopped after {len(history)} generations: no new sub-network was found")
        if against is not None:
            print(front_table(front))
        which = "best" if against is None else f"picked ({asked})"
        print(f"{which} of {len(scorer.scores)}: {best}")
        score = scorer.scores[best]
        shown = f"{score.accuracy:.1%} +- {accuracy_error(score):.1%}"
        print(f"mean top-1 on select {shown}; written to {folder}")
        say_left_out(run.left_out())
    run.close()
    return 0


def candidates(evolution: Evolution, best: Arch) -> Figure:
    """Everything evaluated, against its parameters."""
    ranked, scorer = evolution.ranked(), evolution.scorer
    params = [max(p for p, _ in scorer.costs(a).values()) for a in ranked]
    ranges = "; ".join(map(str, evolution.constraints.ranges)) or "no constraint"
    title = f"{len(ranked)} candidates; {ranges}"
    objective = scorer.evaluations.objective
    values = [sign_of(objective.metric) * scorer.scores[a].value for a in ranked]
    return candidates_figure(params, values, ranked.index(best), title, objective.metric)


def sign_of(metric: str) -> int:
    """Of what is shown, against what is maximised."""
    return -1 if metric == "loss" else 1


def spread(generation: Generation, metric: str) -> dict[str, float]:
    """The best so far, and the members' mean, worst and standard deviation: accuracies, or
    losses."""
    found, sign = generation.values, sign_of(metric)
    return {
        "best": sign * generation.best_value,
        "mean": sign * statistics.fmean(found),
        "worst": sign * min(found),
        "spread": statistics.pstdev(found),
    }


def describe(history: list[Generation], metric: str) -> str:
    form = ".4f" if metric == "loss" else ".1%"
    rows = [
        [str(g.number), str(len(g.members)), *(f"{v:{form}}" for v in spread(g, metric).values())]
        for g in history
    ]
    best = "best loss so far" if metric == "loss" else "best top-1 so far"
    return format_table(["generation", "new", best, "mean", "worst", "spread"], rows)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_script(lambda: search(args))


if __name__ == "__main__":
    end_process(main())
