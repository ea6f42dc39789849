r"""Index a dataset: probe every file once, so that training knows what it can rely on.

    python scripts/index_data.py --dataset k400 --root /data/k400
    python scripts/index_data.py --dataset k400 --root /data/k400 \
        --annotations train.csv --test_annotations val.csv        (Kinetics' CSV, or lists)
    python scripts/index_data.py --dataset ssv2 --root /data/ssv2 --annotations labels
    python scripts/index_data.py --dataset imagenet --root /data/imagenet \
        --annotations LOC_val_solution.csv              (the official flat validation folder)
    python scripts/index_data.py --update indexes/k400.parquet            (only what has changed)

Annotations are recognised by their content (--layout decides otherwise) and lie relative to the
root. The dataset's other settings come from --deepspeed_config. Writes INDEX_DIR/DATASET.parquet
and DATASET.report.json, prints the report and warns of what training will refuse. May be killed and
started again at any time: it goes on where it was. A trial (--limit) never replaces a finished
index. Costs about 0.1 CPU-seconds for a 10 s video,
0.2 ms for an image (header only).
Exit codes: 0 done, 2 the data or the configuration cannot be used.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from vimnas_ds.config import (
    ConfigError,
    DataSection,
    DatasetSection,
    dataset_section,
    load_config,
    override_value,
)
from vimnas_ds.data.bad import (
    MIN_SEEN,
    BadAnnotations,
    DataMissing,
    TooManyUnusable,
    are_too_many,
)
from vimnas_ds.data.index_build import build_index, locked
from vimnas_ds.data.index_file import read_header
from vimnas_ds.data.probe_pool import ProbeLimits
from vimnas_ds.data.recognise import recognise_layout
from vimnas_ds.data.shards import MEMBERS
from vimnas_ds.processes import cores_per_process
from vimnas_ds.report.index_report import describe, summarise

OPTIONS = ("root", "layout", "annotations", "test_annotations", "videos", "synsets")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--dataset", metavar="NAME", help="its name in the configuration")
    which.add_argument("--update", type=Path, metavar="INDEX", help="renew this index")
    parser.add_argument(
        "--deepspeed_config", default="ds_configs/vitl.json", metavar="FILE", help="%(default)s"
    )
    parser.add_argument("--root", metavar="DIR", help="folder of the data")
    parser.add_argument("--annotations", metavar="PATH", help="file or folder, see above")
    parser.add_argument("--test_annotations", metavar="PATH", help="the test list, or CSV")
    parser.add_argument("--layout", help="folders, csv, lists, kinetics, ssv2 or imagenet")
    parser.add_argument("--videos", metavar="DIR", help="the videos' folder; lists: path prefix")
    parser.add_argument("--synsets", metavar="FILE", help="imagenet: order of the devkit's classes")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other key of the dataset, e.g. test_split=validation (repeatable)",
    )
    parser.add_argument(
        "--index_dir", type=Path, metavar="DIR", help="default: the configuration's"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="a trial of N files, evenly chosen")
    parser.add_argument("--recheck", action="store_true", help="probe unchanged files again too")
    parser.add_argument(
        "--thorough", action="store_true", help="read images through, not just headers"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: the cores")
    parser.add_argument(
        "--timeout", type=float, default=60, metavar="SECONDS", help="per file, %(default)s"
    )
    args = parser.parse_args(argv)
    for name in ("limit", "workers", "timeout"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name} must be positive, got {value}")
    return args


def choose(args: argparse.Namespace) -> tuple[str, DatasetSection, Path, float]:
    """The dataset's name, its section with everything the command line says, its index, and the
    share of unusable files that training allows."""
    if args.update is not None:
        if not args.update.is_file():
            raise ConfigError(f"--update {args.update}: there is no such index")
        if (args.update.parent / MEMBERS).exists():
            raise ConfigError(
                f"--update {args.update}: it is of shards; renew the index of the files they were "
                "made from, then make them anew: scripts/make_shards.py --overwrite"
            )
        header = read_header(args.update)
        name, file = header.name, args.update
        values = {**header.section, "root": header.root}
        max_bad_share = DataSection.model_fields["max_bad_share"].default
    else:
        config = load_config(args.deepspeed_config).vimnas.data
        name = args.dataset
        if name not in config.datasets:
            raise ConfigError(
                f"--dataset {name}: {args.deepspeed_config} has {', '.join(config.datasets)}; name "
                "another configuration with --deepspeed_config"
            )
        values, max_bad_share = config.datasets[name].model_dump(mode="json"), config.max_bad_share
        file = (args.index_dir or config.index_dir) / f"{name}.parquet"
    given: dict[str, Any] = {k: v for k in OPTIONS if (v := getattr(args, k)) is not None}
    for override in args.set:
        key, equals, text = override.partition("=")
        if not equals or key not in DatasetSection.model_fields:
            raise ConfigError(f"--set takes KEY=VALUE with a key of the dataset, got {override!r}")
        given[key] = override_value(key, text)
    if "annotations" in given and "layout" not in given:
        root = Path(given.get("root") or values["root"] or ".")
        given["layout"] = recognise_layout(root / given["annotations"])
        print(f"{name}: {given['annotations']} is read as layout {given['layout']}")
    section = dataset_section(name, {**values, **given, "shards": None})
    return name, section, file, max_bad_share


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        name, section, file, max_bad_share = choose(args)
        limits = ProbeLimits(args.workers or cores_per_process(1), args.timeout, args.thorough)
        with locked(file):
            if args.limit is not None and file.exists() and read_header(file).limit is None:
                raise ConfigError(
                    f"{file} is a finished index, a trial (--limit) would replace it: --index_dir "
                    "DIR puts the trial elsewhere"
                )
            built = build_index(name, section, file, limits, args.limit, args.recheck)
        report = summarise(built, section)
        file.with_suffix(".report.json").write_text(json.dumps(report, indent=2) + "\n")
    except (ConfigError, DataMissing, BadAnnotations, OSError) as error:
        print(f"cannot index: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(describe(report))
    unusable, seen = built.unusable(), built.probed + built.kept
    if are_too_many(len(unusable), seen, max_bad_share):
        warning = TooManyUnusable(name, unusable, seen, max_bad_share, file)
        print(f"warning: training will refuse this:\n{warning}", file=sys.stderr)
    elif len(unusable) > max_bad_share * seen:
        share = f"{len(unusable)} of {seen} files are unusable, more than {max_bad_share:.0%}"
        print(
            f"warning: {share}; of fewer than {MIN_SEEN} training takes the rest", file=sys.stderr
        )
    print(f"written to {file} ({file.stat().st_size:,} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
