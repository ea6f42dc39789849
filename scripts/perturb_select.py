"""Choose a sub-network by perturbation of a trained supernet.

    python scripts/perturb_select.py                                  (the latest run under runs/)
    python scripts/perturb_select.py --checkpoint runs/vitl --datasets k400 ssv2
    python scripts/perturb_select.py --alphas fixed --rule eliminate --order from_the_input
    deepspeed --num_gpus 2 scripts/perturb_select.py --tune_steps 50             (killed? --resume)

Each decision costs one evaluation of the superposed network on the `select` splits per open choice,
and one more; what lies before the perturbed layer is computed once and kept, which halves the time
where memory allows. The demo takes about half a minute on a CPU. Writes to RUN/perturbation:
result.json, arch.json, evaluations.csv, drops.png and, when tuning, decisions/NN-NAME/ after each.
After every decision, all drops so far and the accuracy before it go to TensorBoard. The test splits
are not read.
Exit code 2: the checkpoint, the data or an argument cannot be used.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from itertools import chain

from vimnas_ds.config import ConfigError
from vimnas_ds.processes import end_process
from vimnas_ds.report.confusion import write_figure
from vimnas_ds.report.decisions import DecisionRow, decisions_table, drops_figure
from vimnas_ds.report.search_board import SearchBoard
from vimnas_ds.search.cli import (
    Progress,
    add_search_arguments,
    build_parser,
    check_samples,
    open_evaluations,
    run_script,
    say_left_out,
)
from vimnas_ds.search.perturb import Decision, PerturbationSearch
from vimnas_ds.search.prefix import PrefixCache, free_budget
from vimnas_ds.search.results import result_object, write_result
from vimnas_ds.search.run import open_run
from vimnas_ds.search.scoring import ArchScorer, Evaluations
from vimnas_ds.search.stages import TuningStages
from vimnas_ds.search.tune import Tuner
from vimnas_ds.train.ranks import SEARCH_TIMEOUT, start_ranks


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    add_search_arguments(parser, "perturbation")
    parser.add_argument(
        "--rule",
        choices=("keep", "eliminate"),
        default="keep",
        help="keep the choice whose removal costs most, or drop the least costly until one is left",
    )
    parser.add_argument(
        "--order",
        choices=("as_listed", "from_the_input", "random"),
        default="as_listed",
        help="embed_dim, depth, then the layers; the layers upwards and depth last; or shuffled",
    )
    parser.add_argument(
        "--alphas",
        choices=("learned", "fixed"),
        default="learned",
        help="probabilities: softmax of the learned alphas, or uniform",
    )
    parser.add_argument(
        "--tune_steps", type=int, default=0, help="training steps between decisions"
    )
    parser.add_argument(
        "--tune_lr", type=float, help="their learning rate; default: a tenth of the run's peak"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on after the last decision of a killed search with --tune_steps",
    )
    parser.add_argument(
        "--keep", type=int, default=2, help="decisions whose tuned weights stay on disk; default: 2"
    )
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument(
        "--prefix_mb",
        type=int,
        metavar="MB",
        help="memory per rank for activations before the perturbed layer; default: half of what "
        "is free; 0 keeps one batch's",
    )
    memory.add_argument(
        "--no_prefix", action="store_true", help="compute every evaluation from the pixels"
    )
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    check_samples(args.samples)
    if args.tune_steps < 0:
        raise ConfigError(f"--tune_steps must be at least 0, got {args.tune_steps}")
    if args.resume and not args.tune_steps:
        raise ConfigError("--resume goes on with a tuned search: add its --tune_steps")
    if args.tune_lr is not None and not 0 < args.tune_lr < math.inf:
        raise ConfigError(f"--tune_lr must be above 0, got {args.tune_lr}")
    if args.tune_lr is not None and not args.tune_steps:
        raise ConfigError(f"--tune_lr {args.tune_lr} goes with tuning: add --tune_steps")
    if args.keep < 1:
        raise ConfigError(f"--keep must be at least 1, got {args.keep}")
    if args.prefix_mb is not None and args.prefix_mb < 0:
        raise ConfigError(f"--prefix_mb must be at least 0, got {args.prefix_mb}")


def search(args: argparse.Namespace) -> int:
    check(args)
    ranks = start_ranks(SEARCH_TIMEOUT, engine=args.tune_steps > 0)
    run = open_run(args.checkpoint, ranks, args.set, args.samples, args.ema)
    folder = args.out or run.files.root / "perturbation"
    lr = run.config.vimnas.peak_lr / 10 if args.tune_lr is None else args.tune_lr
    original = run.net
    evaluations = open_evaluations(run, args, folder, keep=args.tune_steps == 0)
    alphas = run.alphas if args.alphas == "learned" else None
    asked: dict[str, object] = {
        "rule": args.rule,
        "order": args.order,
        "alphas": args.alphas,
        "tune_steps": args.tune_steps,
    }
    tuner = stages = None
    if args.tune_steps:
        run.net = copy.deepcopy(original)  # the pick is scored with the checkpoint's own weights
        tuner = Tuner(run, args.tune_steps, lr, lambda: None)
        more = {"seed": args.seed, "tune_lr": lr, "objective": str(evaluations.objective)}
        csv = evaluations.log.path
        stages = TuningStages(folder / "decisions", tuner, asked | more, args.keep, csv)
    prefixes = None
    if not args.no_prefix:
        megabytes = args.prefix_mb
        prefixes = PrefixCache(run, free_budget(run) if megabytes is None else megabytes * 2**20)
    chooser = PerturbationSearch(
        evaluations, alphas, args.rule, args.order, args.seed, stages, prefixes
    )
    if args.resume and stages is not None:
        chooser.go_on_from(stages.resume())
    progress = Progress(chooser.num_evaluations(), "perturbation", ranks.world_size, ranks.is_main)
    tuning = None
    if tuner is not None:
        steps = args.tune_steps * chooser.num_tunings()
        tuner.progress = tuning = Progress(steps, "tuning steps", 1, ranks.is_main)
    events = args.out or run.files.tensorboard / "perturbation"
    board = SearchBoard(events) if ranks.is_main else None
    decisions: list[Decision] = []
    for decision in chain(tuple(chooser.made), chooser.decide_all(progress)):
        decisions.append(decision)
        if board is not None:
            number = len(decisions) - 1
            board.scalars({"accuracy_before_decision": decision.accuracy_before}, number)
            board.figure("drops", drops_figure(as_rows(decisions), args.metric), number)
    if tuning is not None:
        tuning.close()
    progress.close()
    arch = chooser.state.arch()
    details = {**asked, "decisions": [d.to_json() for d in decisions]}
    if tuner is not None:
        tuned = ArchScorer(evaluations).score_all("tuned", [arch], lambda: None)[0]
        details |= {"tune_lr": lr, "accuracy_tuned": tuned.accuracy}
        tuner.close()
        run.net = original
        evaluations = Evaluations(run, evaluations.log, evaluations.objective)
    scored = ArchScorer(evaluations).score_all("picked", [arch], lambda: None)[0]
    if board is not None:
        write_result(folder, result_object(run, "perturbation", arch, scored, details))
        if decisions:
            write_figure(drops_figure(as_rows(decisions), args.metric), folder / "drops.png")
        board.close()
        print(decisions_table(as_rows(decisions), args.metric))
        unsure = sum(d.in_noise for d in decisions)
        print(f"{unsure} of {len(decisions)} decisions are within two standard errors of the noise")
        print(f"picked: {arch}\nmean top-1 on select {scored.accuracy:.1%}; written to {folder}")
        say_left_out(run.left_out())
    run.close()
    return 0


def as_rows(decisions: Sequence[Decision]) -> list[DecisionRow]:
    return [DecisionRow(d.name, d.drop, d.kept, *d.margin, d.note) for d in decisions]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_script(lambda: search(args))


if __name__ == "__main__":
    end_process(main())
