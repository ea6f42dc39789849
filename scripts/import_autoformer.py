"""Take in one of AutoFormer's published supernet checkpoints.

    python scripts/import_autoformer.py supernet-tiny.pth --out runs/autoformer
    python scripts/export.py --checkpoint runs/autoformer --arch largest --out exports/autoformer
    python scripts/predict.py exports/autoformer picture.jpg

The file is loaded as tensors only (weights_only) and kept as safetensors. The search space follows
from its depth and heads. Any sub-network of it leaves through export.py, as this project's own do
(no timm format: timm has no relative positions in values). Pictures are resized to 256/224 of the
crop with the antialiased bilinear filter, where AutoFormer's evaluation used the bicubic one.
Seconds. Exit codes: 0 done, 2 the file cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vimnas_ds.autoformer import build, fitting_space, keep, read_checkpoint
from vimnas_ds.config import ConfigError
from vimnas_ds.space import SPACES


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="the published .pth")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--space", choices=tuple(SPACES), help="default: the one that fits")
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="class names, one a line; default: class 0, ..."
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        weights = read_checkpoint(args.checkpoint)
        space = SPACES[args.space] if args.space is not None else fitting_space(weights)
        supernet = build(weights, space, "imagenet")
        classes = weights["head.bias"].shape[0]
        labels = [f"class {i}" for i in range(classes)]
        if args.labels is not None:
            labels = args.labels.read_text(encoding="utf-8").splitlines()
        if len(labels) != classes:
            raise ConfigError(f"{args.labels} has {len(labels)} names for {classes} classes")
        keep(supernet, labels, args.out)
    except (ConfigError, OSError, UnicodeDecodeError) as err:
        print(f"cannot import: {err}", file=sys.stderr)
        return 2
    print(
        f"{supernet.space.name}, {classes} classes, {supernet.shape.size} x {supernet.shape.size}"
    )
    print(f"written to {args.out}; next: scripts/export.py --checkpoint {args.out} --arch ...")
    return 0


if __name__ == "__main__":
    sys.exit(main())
