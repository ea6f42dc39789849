r"""Train the supernet: Algorithm 1 of VIM-NAS on the data and recipe of one configuration file.

    deepspeed scripts/train.py --deepspeed_config ds_configs/vitl.json
    deepspeed --num_gpus 2 scripts/train.py --deepspeed_config ds_configs/demo.json   (on a CPU too)
    torchrun --nproc_per_node 2 scripts/train.py --deepspeed_config ds_configs/demo.json
    python scripts/train.py --deepspeed_config ds_configs/vitl.json --dry_run
    deepspeed scripts/train.py --deepspeed_config ds_configs/vitl.json \
        --arch runs/vitl/perturbation/arch.json --inherit runs/vitl

Writes under vimnas.output_dir: train.log, tensorboard/, checkpoints/, summary.json. The demo takes
about five minutes on two CPU cores; the reference runs' costs stand in their files.
Exit codes of every rank: 0 done; 1 an unexpected error, or a rank that died or got stuck; 2 the
configuration or the data cannot run (said before any work); 3 the run stopped itself (non-finite
steps, training that would not stay sound, broken data, ranks that disagree, a full disk); 75
pre-empted (SIGTERM, Ctrl-C, a launcher that is gone): saved, --resume continues. A launcher may
make another code of it: status.json in vimnas.output_dir says how a run ended.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vimnas_ds.arch_file import read_arch
from vimnas_ds.config import ConfigError, RunConfig, load_config
from vimnas_ds.data.bad import BadAnnotations, DataMissing, TooManyBadFiles
from vimnas_ds.durable import DISK_ERRORS
from vimnas_ds.processes import end_process
from vimnas_ds.train.open_data import open_data
from vimnas_ds.train.ranks import (
    ALONE,
    CannotStart,
    RanksDisagree,
    leave_ranks,
    rank_zero_decides,
    run_together,
    settle_on_cpu,
    start_ranks,
)
from vimnas_ds.train.status import Exit
from vimnas_ds.train.watch import Watch

if TYPE_CHECKING:
    from vimnas_ds.train.loop import Trainer

STARTED = time.time()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deepspeed_config", required=True, metavar="FILE", help="the JSON file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key, e.g. vimnas.data.k400.root=/data/k400 (repeatable; JSON values)",
    )
    parser.add_argument("--dry_run", action="store_true", help="say what would run, and exit")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="PATH|auto",
        help="continue the latest checkpoint of vimnas.output_dir, or the one given; auto: "
        "continue the run if there is one, else begin it",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="delete an earlier run in vimnas.output_dir"
    )
    parser.add_argument(
        "--arch",
        type=Path,
        metavar="FILE",
        help="train this one sub-network alone, same recipe and engine; the run goes to "
        "OUTPUT_DIR_subnet unless --set vimnas.output_dir says otherwise",
    )
    parser.add_argument(
        "--inherit",
        type=Path,
        metavar="CHECKPOINT",
        help="start from the weights of this supernet run or checkpoint",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, watched: bool = False) -> int:
    """`watched`: this process is the run's alone; signals and launchers are heeded, and whatever
    hangs when it should end is cut off."""
    args = parse(argv)
    rank = os.environ.get("RANK", "0")
    watch = Watch()
    try:
        if args.dry_run:
            from vimnas_ds.train.dry_run import describe_run

            if rank == "0":
                print(describe_run(configure(args), int(os.environ.get("WORLD_SIZE", "1"))))
            return Exit.DONE
        if watched:
            watch.start()
        trainer = prepare(args, watch)
    except (ConfigError, DataMissing, BadAnnotations, CannotStart, RanksDisagree, OSError) as err:
        if watched and isinstance(err, OSError) and "WORLD_SIZE" in os.environ:
            watch.fail(err, Exit.CANNOT_START)  # the other ranks may be anywhere
        if rank == "0":  # it knows what the others cannot start with
            print(f"cannot start:\n{err}", file=sys.stderr)
        watch.leave(Exit.CANNOT_START)
        leave_ranks()
        return Exit.CANNOT_START
    except Exception as err:
        watch.fail(err)
    return run(trainer, watch)


def configure(args: argparse.Namespace) -> RunConfig:
    """The configuration with everything the command line says about it."""
    overrides = list(args.set)
    if args.arch is not None:
        overrides.append(f"vimnas.arch={read_arch(args.arch).to_json()}")
        if not any(o.startswith("vimnas.output_dir=") for o in overrides):
            plain = load_config(args.deepspeed_config, overrides)
            overrides.append(f"vimnas.output_dir={plain.vimnas.output_dir}_subnet")
    if args.inherit is not None:
        overrides.append(f"vimnas.model.inherit={args.inherit}")
    return load_config(args.deepspeed_config, overrides)


def prepare(args: argparse.Namespace, watch: Watch) -> Trainer:
    """Check, with all ranks, what can be checked before any work, then set the run up."""
    from vimnas_ds.train.claim import choose_start
    from vimnas_ds.train.loop import Trainer
    from vimnas_ds.train.run_files import RunFiles
    from vimnas_ds.train.warm_start import check_source

    world_size = int(os.environ.get("WORLD_SIZE", "1"))

    def check() -> RunConfig:
        config = configure(args)
        config.micro_batch(world_size)
        config.micro_batch(world_size, config.alpha_batch)
        return config

    def choose() -> str:
        start = choose_start(RunFiles(config.vimnas.output_dir), args.resume, args.overwrite)
        if start is None:
            check_source(config.vimnas.model)
        return str(start or "")

    ranks = ALONE
    if world_size > 1:  # they meet first, to hear what another cannot start with
        ranks = start_ranks()
        watch.join(ranks)
    config = run_together(check, ranks)
    found = rank_zero_decides(choose, ranks)
    if world_size == 1:
        ranks = start_ranks()
        watch.join(ranks)
    watch.set_limits(config.vimnas.faults)
    start = Path(found) if found else None
    data = open_data(config.vimnas.data, ranks, Path(args.deepspeed_config))
    settle_on_cpu(config.vimnas.cpu_threads, ranks)
    trainer = Trainer(config, data, ranks, start, watch, args.overwrite)
    trainer.console.say(f"ready {time.time() - STARTED:.1f} s after the process started")
    return trainer


def run(trainer: Trainer, watch: Watch) -> int:
    """Train; how it ends is said on stderr by the rank that knows, and in the run's files."""
    from vimnas_ds.train.checkpoint import SaveFailed, last_good
    from vimnas_ds.train.guard import NotSound
    from vimnas_ds.train.loop import Preempted, TooManySkippedSteps

    text, code = "done", Exit.DONE
    try:
        trainer.run()
    except Preempted as end:
        text, code = str(end), Exit.RESUMABLE
    except (
        TooManySkippedSteps,
        NotSound,
        DataMissing,
        TooManyBadFiles,
        RanksDisagree,
        SaveFailed,
    ) as err:
        watch.fail(err, Exit.STOPPED)
    except BaseException as err:
        if isinstance(err, OSError) and err.errno in DISK_ERRORS:  # of the log, of TensorBoard
            words = f"{err}; {last_good(trainer.files.checkpoints)}"
            watch.fail(OSError(words), Exit.STOPPED)
        watch.fail(err)
    watch.leave(code)
    try:
        if trainer.ranks.is_main:
            trainer.last_words(text, code)
        trainer.close()
    except OSError as err:
        print(f"the run's files do not hold how it ended ({text}): {err}", file=sys.stderr)
    leave_ranks()
    return code


if __name__ == "__main__":
    end_process(main(watched=True))
