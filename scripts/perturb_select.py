"""Choose a sub-network by perturbation of a trained supernet.

    python scripts/perturb_select.py                                  (the latest run under runs/)
    python scripts/perturb_select.py --checkpoint runs/vitl --datasets k400 ssv2
    python scripts/perturb_select.py --alphas fixed --rule eliminate --order from_the_input
    deepspeed --num_gpus 2 scripts/perturb_select.py --tune_steps 50

Each decision costs one evaluation of the full superposed network on the `select` splits per open
choice, and one more; the demo takes about half a minute on a CPU. Writes to RUN/perturbation:
result.json, arch.json, evaluations.csv; drops per decision go to TensorBoard. The test splits are
not read. Exit code 2: the checkpoint, the data or an argument cannot be used.
"""

from __future__ import annotations

import argparse
import copy
import sys

from vimnas_ds.config import ConfigError
from vimnas_ds.report.search_board import SearchBoard, drops_figure
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
from vimnas_ds.search.perturb import Decision, PerturbationSearch
from vimnas_ds.search.results import result_object, write_result
from vimnas_ds.search.run import open_run
from vimnas_ds.search.scoring import ArchScorer, Evaluations
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
    return parser.parse_args(argv)


def search(args: argparse.Namespace) -> int:
    check_samples(args.samples)
    if args.tune_steps < 0:
        raise ConfigError(f"--tune_steps must be at least 0, got {args.tune_steps}")
    ranks = start_ranks(SEARCH_TIMEOUT, engine=args.tune_steps > 0)
    run = open_run(args.checkpoint, ranks, args.set, args.samples)
    folder = args.out or run.files.root / "perturbation"
    lr = run.config.vimnas.peak_lr / 10 if args.tune_lr is None else args.tune_lr
    original = run.net
    tuner = None
    if args.tune_steps:
        run.net = copy.deepcopy(original)  # the pick is scored with the checkpoint's own weights
        tuner = Tuner(run, args.tune_steps, lr, lambda: None)
    evaluations = open_evaluations(run, args, folder, keep=tuner is None)
    alphas = run.alphas if args.alphas == "learned" else None
    chooser = PerturbationSearch(evaluations, alphas, args.rule, args.order, args.seed, tuner)
    progress = Progress(chooser.num_evaluations(), "perturbation", ranks.world_size, ranks.is_main)
    decisions = list(chooser.decide_all(progress))
    progress.close()
    arch = chooser.state.arch()
    details: dict[str, object] = {
        "rule": args.rule,
        "order": args.order,
        "alphas": args.alphas,
        "tune_steps": args.tune_steps,
        "decisions": [d.to_json() for d in decisions],
    }
    if tuner is not None:
        tuned = ArchScorer(evaluations).score_all("tuned", [arch], lambda: None)[0]
        details |= {"tune_lr": lr, "accuracy_tuned": tuned.accuracy}
        tuner.close()
        run.net = original
        evaluations = Evaluations(run, evaluations.log, evaluations.objective)
    scored = ArchScorer(evaluations).score_all("picked", [arch], lambda: None)[0]
    if ranks.is_main:
        write_result(folder, result_object(run, "perturbation", arch, scored, details))
        board = SearchBoard(args.out or run.files.tensorboard / "perturbation")
        if decisions:
            board.figure("drops", drops_figure([(d.name, d.drop, d.kept) for d in decisions]))
        board.close()
        print(describe(decisions))
        unsure = sum(d.in_noise for d in decisions)
        print(f"{unsure} of {len(decisions)} decisions are within two standard errors of the noise")
        print(f"picked: {arch}\nmean top-1 on select {scored.accuracy:.1%}; written to {folder}")
        say_left_out(run.left_out())
    run.close()
    return 0


def describe(decisions: list[Decision]) -> str:
    """The decisions as a table; those inside the noise are called so."""
    rows = []
    for d in decisions:
        drops = "  ".join(f"{c:g}: {100 * v:+.2f}" for c, v in d.drop.items())
        note = "tie" if d.tied else "within noise" if d.in_noise else ""
        margin = f"{100 * d.margin:.2f} +- {100 * d.margin_se:.2f}"
        rows.append([d.name, f"{d.kept:g}", drops, margin, note])
    head = ["decision", "kept", "top-1 points lost without", "margin", "note"]
    return format_table(head, rows)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_script(lambda: search(args))


if __name__ == "__main__":
    sys.exit(main())
