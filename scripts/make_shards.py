r"""Pack a dataset into tar shards: a few large files in place of a million small ones.

    python scripts/make_shards.py --dataset k400 --root /data/k400 --out /shards/k400
    python scripts/make_shards.py --index indexes/k400.parquet --out /shards/k400

and then train, search and evaluate with

    --set vimnas.data.k400.shards=/shards/k400

The second form takes everything from an index, the first the dataset's settings from
--deepspeed_config, and builds the index if there is none. Files that it calls unusable are left
out. Writes NAME-000000.tar ... (plain tars; a member's name is its path under the root),
members.parquet (where each file lies) and, last, index.parquet. The folder needs neither the files
nor their annotations any more, and gives the same batches bit for bit: a run may go over to it in
its middle. May be killed and started again at any time: it goes on with the first shard that is
missing. Costs what copying the files costs. Exit codes: 0 done, 2 the data, the configuration or
the folder cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from vimnas_ds.arguments import folder
from vimnas_ds.config import ConfigError, DataSection, dataset_section, load_config
from vimnas_ds.data.bad import BadAnnotations, DataMissing
from vimnas_ds.data.index_file import read_header
from vimnas_ds.data.shard_build import Written, build_shards


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--dataset", metavar="NAME", help="its name in the configuration")
    which.add_argument("--index", type=Path, metavar="FILE", help="take the dataset of this index")
    parser.add_argument(
        "--deepspeed_config", default="ds_configs/vitl.json", metavar="FILE", help="%(default)s"
    )
    parser.add_argument("--root", metavar="DIR", help="folder of the data")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="with --dataset: override a key, as for scripts/train.py (repeatable)",
    )
    parser.add_argument(
        "--out", type=folder, required=True, metavar="DIR", help="the shards' folder"
    )
    parser.add_argument(
        "--shard_mb", type=int, default=1000, metavar="N", help="10^6 bytes a shard, %(default)s"
    )
    parser.add_argument(
        "--max_bad_share",
        type=float,
        metavar="X",
        help="share of unusable files to do without; default: the configuration's (5 %% with "
        "--index)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace shards that are there")
    args = parser.parse_args(argv)
    if args.shard_mb < 1:
        parser.error(f"--shard_mb must be positive, got {args.shard_mb}")
    if args.max_bad_share is not None and not 0 <= args.max_bad_share < 1:
        parser.error(f"--max_bad_share must be from 0 to below 1, got {args.max_bad_share}")
    if args.index is not None and (args.root or args.set):
        parser.error("--index has the root and all other settings itself")
    return args


def choose(args: argparse.Namespace) -> tuple[str, DataSection]:
    """The dataset's name and the section that holds it, read from its files."""
    if args.index is not None:
        if not args.index.is_file():
            raise ConfigError(f"--index {args.index}: there is no such index")
        header = read_header(args.index)
        name, values = header.name, {**header.section, "root": header.root}
        options: dict[str, Any] = {"index_dir": args.index.parent}
        if args.index.name != f"{name}.parquet":
            raise ConfigError(f"--index {args.index}: an index of {name} is called {name}.parquet")
    else:
        config = load_config(args.deepspeed_config, args.set).vimnas.data
        name, options = args.dataset, config.model_dump(exclude={"datasets"})
        if name not in config.datasets:
            raise ConfigError(
                f"--dataset {name}: {args.deepspeed_config} has {', '.join(config.datasets)}; name "
                "another configuration with --deepspeed_config"
            )
        values = config.datasets[name].model_dump(mode="json")
        values["root"] = args.root or values["root"]
    dataset = dataset_section(name, {**values, "shards": None})
    if args.max_bad_share is not None:
        options["max_bad_share"] = args.max_bad_share
    return name, DataSection(**{**options, "datasets": {name: dataset}})


def describe(name: str, out: Path, written: Written) -> str:
    rate = f"{written.copied / written.seconds:,.0f} files/s" if written.copied else "nothing to do"
    return (
        f"{name}: {written.files:,} files, {written.bytes:,} bytes in {written.shards:,} shards "
        f"({written.kept:,} were there); left out: {written.left_out:,} unusable, "
        f"{written.missing:,} missing; {written.seconds:,.1f} s, {rate}\n"
        f"use them with --set vimnas.data.{name}.shards={out.resolve()}"
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        name, section = choose(args)
        written = build_shards(name, section, args.out, args.shard_mb * 10**6, args.overwrite)
    except (ConfigError, DataMissing, BadAnnotations) as error:
        print(f"cannot make shards: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(describe(name, args.out, written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
