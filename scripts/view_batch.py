"""A batch as the network sees it, as a picture: look at it before you train.

    python scripts/view_batch.py --deepspeed_config ds_configs/demo.json
    python scripts/view_batch.py --deepspeed_config ds_configs/vitl.json --dataset k400 \\
        --batch 3 --out k400.png --set vimnas.data.k400.root=/data/k400 ...

Takes the first samples of a batch of every dataset (or of --dataset) through the run's own loaders
and writes one PNG: pictures cropped, augmented and mixed, only with the normalisation undone; a
clip is a row of evenly chosen frames. Each sample stands under its class and its file's name, a
mixed one under both classes with their shares and the file that it began as.

`train` batches have the run's files, crops and augmentations; pairs and shares of mixup and CutMix
depend on the rank and the step as well, and are drawn as a run could draw them. `alpha` batches
are augmented and not mixed; of `select` and `test` the central view is shown.
Seconds, plus an index for a dataset that has none yet. Exit codes: 0 done, 2 the configuration or
the data cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import Executor
from pathlib import Path

import torch
from PIL import Image

from vimnas_ds.config import ConfigError, RunConfig, load_config
from vimnas_ds.data.bad import BadAnnotations, DataMissing, TooManyBadFiles
from vimnas_ds.data.capacity import decoding_threads
from vimnas_ds.data.joint import JointData, open_datasets
from vimnas_ds.data.loader import Batch, EvalLoader, TrainLoader
from vimnas_ds.data.readers import Readers
from vimnas_ds.processes import end_process
from vimnas_ds.report.pictures import Picture, captions, contact_sheet, under_titles
from vimnas_ds.train.objective import Objective

CPU = torch.device("cpu")
#: Images are shown this large at least: their captions are as wide as they are.
IMAGE_SIDE = 224


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
    parser.add_argument("--dataset", metavar="NAME", help="only this one; default: all of them")
    parser.add_argument(
        "--split", choices=("train", "alpha", "select", "test"), default="train", help="%(default)s"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=0,
        metavar="N",
        help="number of the batch, from 0; of select and test, N times --count samples come before",
    )
    parser.add_argument("--count", type=int, default=8, help="samples to show (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/view_batch.png"), metavar="FILE", help="%(default)s"
    )
    args = parser.parse_args(argv)
    for name, least in (("batch", 0), ("count", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.out.suffix.lower() != ".png":
        parser.error(f"--out must end in .png, got {args.out}")
    return args


def training_batch(
    config: RunConfig,
    data: JointData,
    name: str,
    args: argparse.Namespace,
    pool: Executor,
) -> Batch:
    """The first samples of a batch, `--count` or a few more: the share of a rank that has them."""
    total = config.global_batch if args.split == "train" else config.alpha_batch
    shares = (n for n in range(min(args.count, total), total + 1) if total % n == 0)
    ranks = total // next((n for n in shares if n % 2 == 0), total)  # mixing takes pairs
    section, samples = data.section.datasets[name], data.splits[name][args.split]
    loader = TrainLoader(
        name, section, samples, args.split, config.vimnas.seed, total, 0, ranks, CPU, pool, 0
    )  # fmt: skip
    loader.seek(args.batch)
    try:
        return loader.next()
    finally:
        loader.close()


def evaluation_batch(data: JointData, name: str, args: argparse.Namespace, pool: Executor) -> Batch:
    """Samples of the split in their order, unusable ones left out."""
    samples = data.splits[name][args.split]
    begin = args.batch * args.count
    if begin >= len(samples):
        raise ConfigError(
            f"{name}: --batch {args.batch} begins at sample {begin} of {args.split}, which has "
            f"{len(samples)}"
        )
    chosen = samples[begin : begin + args.count]
    loader = EvalLoader(name, data.section.datasets[name], chosen, 0, 1, len(chosen), CPU, pool)
    try:
        batch = next(iter(loader), None)
    finally:
        loader.close()
    if batch is None:
        path, reason = next(iter(loader.skipped.items()))
        raise ConfigError(f"{name}: none of these {len(chosen)} files is usable ({path}: {reason})")
    return batch


def sheet_of(
    config: RunConfig,
    data: JointData,
    name: str,
    args: argparse.Namespace,
    pool: Executor,
) -> tuple[str, Picture]:
    """(title, picture) of one dataset's batch."""
    section = data.section.datasets[name]
    title = f"{name}: {args.split} batch {args.batch}, {section.size} x {section.size}"
    if args.split in ("train", "alpha"):
        batch = training_batch(config, data, name, args, pool)
    else:
        batch = evaluation_batch(data, name, args, pool)
    x, y = batch.x, batch.y
    if args.split == "train":
        x, y = Objective(section).mix(x, y, args.batch)
        title += "".join(
            f", {kind} {value:g}"
            for kind, value in (("mixup", section.mixup), ("CutMix", section.cutmix))
            if value
        )
    if not section.is_image:
        title += f", {section.frames} frames at {section.fps:g} fps"
    names = captions(y, data.catalogs[name].class_names)
    labels = [f"{of} | {Path(file).name}" for of, file in zip(names, batch.names, strict=True)]
    side = {"min_side": IMAGE_SIDE} if section.is_image else {}
    return title, contact_sheet(x, labels, max_samples=args.count, **side)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        config = load_config(args.deepspeed_config, args.set)
        known = config.vimnas.data.datasets
        if args.dataset is not None and args.dataset not in known:
            raise ConfigError(
                f"--dataset {args.dataset}: {args.deepspeed_config} has {', '.join(known)}"
            )
        data = open_datasets(config.vimnas.data)
        with Readers(
            decoding_threads(config.vimnas.data, 1), config.vimnas.data.file_timeout
        ) as pool:
            chosen = list(known) if args.dataset is None else [args.dataset]
            sheets = dict(sheet_of(config, data, name, args, pool) for name in chosen)
        page = Image.fromarray(under_titles(sheets))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        page.save(args.out)
    except (ConfigError, DataMissing, BadAnnotations, TooManyBadFiles, OSError) as error:
        print(f"cannot show a batch:\n{error}", file=sys.stderr)
        return 2
    print("\n".join(sheets))
    print(f"written to {args.out} ({page.width} x {page.height})")
    return 0


if __name__ == "__main__":
    end_process(main())
