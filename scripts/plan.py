r"""What a configuration needs and how long it runs, before anybody rents a node.

    python scripts/plan.py --deepspeed_config ds_configs/vitl.json --gpus 8 --gpu a100-40
    python scripts/plan.py --deepspeed_config ds_configs/vitl.json --gpus 8 --nodes 4 \
        --gpu h100-80 --network 100 --efficiency 0.35 --json plan.json

Memory per GPU, the largest micro batch, days with and without alpha steps, what the loaders must
give, traffic, disk. Everything is computed from formulas and published figures of the GPUs; no
GPU figure was measured. Takes seconds. Exit code 2 where the configuration cannot run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from vimnas_ds.config import ConfigError, load_config
from vimnas_ds.data.bad import BadAnnotations, DataMissing
from vimnas_ds.data.capacity import READY_ON_GPU
from vimnas_ds.durable import write_text
from vimnas_ds.gpus import GPUS
from vimnas_ds.report.plan import describe, numbers
from vimnas_ds.train.dry_run import find_data, model_layout
from vimnas_ds.training_plan import Machines, Plan


def share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share: above 0, at most 1")
    return value


def whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1 is needed")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deepspeed_config", required=True, metavar="FILE", help="the JSON file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--gpu", choices=GPUS, default="a100-40")
    parser.add_argument("--gpus", type=whole, default=8, help="of one node")
    parser.add_argument("--nodes", type=whole, default=1)
    parser.add_argument(
        "--efficiency",
        type=share,
        default=0.4,
        help="FLOPs of the method / peak, in which all else that a step does is included (0.4)",
    )
    parser.add_argument(
        "--network", type=float, default=25.0, help="GB/s of a node, one direction (25: 200 Gbit/s)"
    )
    parser.add_argument(
        "--reserve",
        type=float,
        default=3.0,
        help="GB of a GPU for CUDA, NCCL, cuBLAS, DALI, fragmentation",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    return parser.parse_args(argv)


def build(args: argparse.Namespace) -> tuple[Plan, str]:
    """The plan, and a note on the datasets' sizes. Raises ConfigError."""
    if not (0 < args.network < math.inf and 0 <= args.reserve < math.inf):
        raise ConfigError("--network must be positive and --reserve at least 0, both finite")
    config = load_config(args.deepspeed_config, args.set)
    data = find_data(config)
    unknown = [name for name, size in data.sizes.items() if not size]
    if unknown:
        keys = ", ".join(f"vimnas.data.{name}.root" for name in unknown)
        raise ConfigError(f"the sizes of {unknown} are unknown: set {keys} (or reference_files)")
    where = Machines(
        GPUS[args.gpu],
        args.gpus,
        args.nodes,
        args.efficiency,
        args.network * 1e9,
        args.reserve * 1e9,
        READY_ON_GPU,
    )
    plan = Plan(config, model_layout(config), data.sizes, where)
    _ = plan.micro  # the recipe's batch must be shared evenly
    return plan, data.notes


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        plan, notes = build(args)
        if args.json is not None:
            found: dict[str, Any] = numbers(plan)
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_text(args.json, json.dumps(found, indent=2))
    except (ConfigError, DataMissing, BadAnnotations, OSError) as err:
        print(f"cannot plan:\n{err}", file=sys.stderr)
        return 2
    print(describe(plan, notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
