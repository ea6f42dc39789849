"""Train the supernet: Algorithm 1 of VIM-NAS on the data and recipe of one configuration file.

    deepspeed scripts/train.py --deepspeed_config ds_configs/vitl.json
    deepspeed --num_gpus 2 scripts/train.py --deepspeed_config ds_configs/demo.json   (on a CPU too)
    torchrun --nproc_per_node 2 scripts/train.py --deepspeed_config ds_configs/demo.json
    python scripts/train.py --deepspeed_config ds_configs/vitl.json --dry_run

Writes under vimnas.output_dir: train.log, tensorboard/, checkpoints/, summary.json. The demo takes
about five minutes on two CPU cores; the reference runs' costs stand in their files.
Exit codes: 0 done, 2 the configuration or the data cannot run (said before any work), 3 the run
stopped itself (non-finite steps, broken data).
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from vimnas_ds.config import ConfigError, RunConfig, load_config
from vimnas_ds.data.bad import TooManyBadFiles

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
        metavar="PATH",
        help="continue the latest checkpoint of vimnas.output_dir, or the one given",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="delete an earlier run in vimnas.output_dir"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        config = load_config(args.deepspeed_config, args.set)
        if args.dry_run:
            from vimnas_ds.train.dry_run import describe_run

            if is_main:
                print(describe_run(config, int(os.environ.get("WORLD_SIZE", "1"))))
            return 0
        return train(config, args.resume, args.overwrite)
    except (ConfigError, ValueError) as err:
        stopped = isinstance(err, TooManyBadFiles)
        if is_main:
            print(f"{'stopped' if stopped else 'cannot start'}:\n{err}", file=sys.stderr)
        return 3 if stopped else 2


def train(config: RunConfig, resume: str | None, overwrite: bool) -> int:
    """Check everything that can be checked without work, then run."""
    from vimnas_ds.data.joint import open_datasets
    from vimnas_ds.train.run_files import RunFiles, choose_start, write_config

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config.micro_batch(world_size)
    config.micro_batch(world_size, config.alpha_batch)
    files = RunFiles(config.vimnas.output_dir)
    start = choose_start(files, resume, overwrite)
    data = open_datasets(config.vimnas.data)

    import torch
    import torch.distributed as dist

    from vimnas_ds.train.loop import Trainer, TooManySkippedSteps
    from vimnas_ds.train.ranks import start_ranks

    ranks = start_ranks()
    if ranks.device.type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(config.vimnas.cpu_threads or max(1, cores // local))
    if ranks.is_main:
        if overwrite:
            files.remove()
        write_config(files, config)
    dist.barrier()
    trainer = Trainer(config, data, ranks, start)
    trainer.console.say(f"ready {time.time() - STARTED:.1f} s after the process started")
    try:
        trainer.run()
    except TooManySkippedSteps as err:
        trainer.console.say(f"stopped: {err}")
        return 3
    finally:
        trainer.close()
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
