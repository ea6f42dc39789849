"""What the search scripts share: common arguments, start-up, errors in words, progress."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from vimnas_ds.arguments import folder as folder_argument
from vimnas_ds.config import ConfigError
from vimnas_ds.data.bad import BadAnnotations, BadFile, DataMissing, TooManyBadFiles
from vimnas_ds.export import ExportError
from vimnas_ds.search.objective import parse_objective
from vimnas_ds.search.run import SearchRun, TrainedNetwork
from vimnas_ds.search.scoring import EvaluationLog, Evaluations
from vimnas_ds.train.ranks import CannotStart, RanksDisagree, leave_ranks

log = logging.getLogger(__name__)


def build_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what every search script takes."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="a run's folder or one checkpoint; default: the latest run under runs/",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="the moving average of the weights (vimnas.ema) in place of the weights",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key of the run's configuration, e.g. a data root",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    return parser


def add_search_arguments(parser: argparse.ArgumentParser, folder: str) -> None:
    """Arguments of a search over sub-networks."""
    parser.add_argument(
        "--datasets",
        nargs="+",
        metavar="NAME[=WEIGHT]",
        help="datasets whose weighted mean counts; default: all of the run, equally",
    )
    parser.add_argument(
        "--metric", choices=("top1", "loss"), default="top1", help="what decides (default top1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random in the search")
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="at most N samples of each select split, classes in turn; default: all",
    )
    parser.add_argument(
        "--out",
        type=folder_argument,
        metavar="DIR",
        help=f"where results go; default: RUN/{folder}",
    )
    add_cache_arguments(parser)


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Whether and where evaluations are kept."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--cache",
        type=folder_argument,
        metavar="DIR",
        help="where evaluations are kept for every later search; default: RUN/search_cache",
    )
    where.add_argument(
        "--no_cache", action="store_true", help="keep evaluations in memory only, find none"
    )


def open_evaluations(
    run: SearchRun, args: argparse.Namespace, folder: Path, keep: bool = True
) -> Evaluations:
    """The evaluator that a search's arguments ask for; its CSV goes to `folder`.

    `keep` False: no outcome is found or kept on disk (the weights will change).
    """
    objective = parse_objective(args.datasets, run.datasets, args.metric)
    if run.ranks.is_main and (folder / "result.json").exists():
        log.warning("%s: the result that is there will be replaced (--out DIR keeps it)", folder)
    rows = EvaluationLog(folder / "evaluations.csv", objective.datasets, run.ranks.is_main)
    cache = args.cache or run.files.search_cache
    return Evaluations(run, rows, objective, cache if keep and not args.no_cache else None)


def choose_datasets(run: TrainedNetwork, names: Sequence[str] | None) -> tuple[str, ...]:
    """The named datasets, all by default. Raises ConfigError for one the run does not have."""
    for i, name in enumerate(names or ()):
        if name not in run.datasets:
            raise ConfigError(f"--datasets {name}: this run has {', '.join(run.datasets)}")
        if name in (names or ())[:i]:
            raise ConfigError(f"--datasets names {name} twice")
    return tuple(names) if names else run.datasets


def check_samples(count: int | None) -> None:
    """Raises ConfigError for a number of samples that is none."""
    if count is not None and count < 1:
        raise ConfigError(f"--samples must be at least 1, got {count}")


#: Files that are named of each dataset: the results name all of them.
NAMED = 20


def say_left_out(left_out: Mapping[str, Mapping[str, str]]) -> None:
    """Name the files that were left out on stderr, the first of each dataset."""
    for name, reasons in left_out.items():
        for path, reason in islice(reasons.items(), NAMED):
            print(f"left out: {name}: {path}: {reason}", file=sys.stderr)  # noqa: T201
        if len(reasons) > NAMED:
            print(f"left out: {name}: and {len(reasons) - NAMED:,} more", file=sys.stderr)  # noqa: T201


class Progress:
    """A progress bar with ETA on stderr, on rank 0; call it after each unit of work, or several."""

    def __init__(self, total: int, what: str, units: int, enabled: bool):
        self._bar = tqdm(
            total=total, desc=what, disable=not enabled, mininterval=0.5, dynamic_ncols=True
        )
        self._units = units  # ranks work in step: each call of rank 0 stands for that many

    def __call__(self, count: int = 1) -> None:
        left = max((self._bar.total or 0) - self._bar.n, 0)
        self._bar.update(min(count * self._units, left))

    def close(self) -> None:
        self._bar.close()


_MENDABLE = (
    ConfigError,
    DataMissing,
    BadAnnotations,
    BadFile,
    TooManyBadFiles,
    ExportError,
    CannotStart,
    RanksDisagree,
    OSError,
)


def run_script(body: Callable[[], int]) -> int:
    """Run a script's body; what a user can mend is said on stderr, without a traceback.

    Exit codes: the body's own, 2 for a configuration, checkpoint or data that cannot be used.
    """
    try:
        code = body()
        leave_ranks()
        return code
    except _MENDABLE as err:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not isinstance(err, CannotStart):  # which rank 0 says for all
            what = "stopped" if isinstance(err, TooManyBadFiles) else "cannot run"
            who = "" if rank == "0" else f"rank {rank} "
            print(f"{who}{what}: {err}", file=sys.stderr, flush=True)  # noqa: T201
        return 2
