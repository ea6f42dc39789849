"""Take in one of AutoFormer's published supernet checkpoints, as a run.

    python scripts/import_autoformer.py supernet-tiny.pth --out runs/autoformer
    python scripts/evaluate.py --checkpoint runs/autoformer --set vimnas.data.imagenet.root=DIR
    python scripts/export.py --checkpoint runs/autoformer --arch largest --out exports/autoformer

The file is loaded as tensors only (weights_only) and kept as safetensors. The search space follows
from its depth and heads; what is allocated beyond the largest choice is left out. Everything that
reads a run works on it: evaluate.py, the searches, export.py (no timm format: timm has no relative
positions in values), and train.py --deepspeed_config RUN/config.json --inherit RUN. AutoFormer
trained on the files that are held out here, so scores on `select` are too high. Exports resize by
the bicubic filter as AutoFormer's evaluation did, evaluation here by the bilinear one.
Seconds. Exit codes: 0 done, 2 the file cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vimnas_ds.arguments import folder
from vimnas_ds.autoformer import fill, fitting_space, read_checkpoint, run_object
from vimnas_ds.config import ConfigError, parse_config
from vimnas_ds.space import SPACES
from vimnas_ds.train.engine import build_supernet
from vimnas_ds.train.imported import check_free, write_imported
from vimnas_ds.train.run_files import RunFiles


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="the published .pth")
    parser.add_argument("--out", type=folder, required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--space", choices=tuple(SPACES), help="default: the one that fits")
    parser.add_argument(
        "--dataset", default="imagenet", metavar="NAME", help="the head's name (imagenet)"
    )
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="class names, one a line; default: class 0, ..."
    )
    return parser.parse_args(argv)


def bring_in(args: argparse.Namespace) -> str:
    """Write the run; returns what it is. Raises ConfigError in words."""
    check_free(RunFiles(args.out))
    weights = read_checkpoint(args.checkpoint)
    space = SPACES[args.space] if args.space is not None else fitting_space(weights)
    config = parse_config(run_object(weights, space, args.dataset, args.out))
    data = config.vimnas.data.datasets[args.dataset]
    labels = [f"class {i}" for i in range(data.num_classes)]
    if args.labels is not None:
        labels = args.labels.read_text(encoding="utf-8").splitlines()
    if len(labels) != data.num_classes:
        raise ConfigError(f"{args.labels} has {len(labels)} names for {data.num_classes} classes")
    net = build_supernet(config)
    fill(net, weights)
    write_imported(net, config, {args.dataset: labels})
    return f"{space.name}, {data.num_classes} classes, {data.size} x {data.size}"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        print(bring_in(args))
    except (ConfigError, OSError, UnicodeDecodeError) as err:
        print(f"cannot import: {err}", file=sys.stderr)
        return 2
    print(f"written to {args.out}")
    print(f"next: python scripts/export.py --checkpoint {args.out} --arch largest")
    return 0


if __name__ == "__main__":
    sys.exit(main())
