"""Classify a video or picture with an exported sub-network.

    python scripts/predict.py exports/demo clip.mp4
    python scripts/predict.py exports/demo clip.mp4 --dataset k400 --top 3 --strip seen.png --json

Every head that takes such a file says what it sees, or the one of --dataset alone. --strip draws
what the network was shown: the frames in their order, at most sixteen of them, resized and cropped.
Needs the export's folder only: neither DeepSpeed nor DALI, no training configuration. A second or
two, most of them imports. Exit codes: 0 done, 2 the export or the file cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from PIL import Image

from vimnas_ds.data.bad import BadFile
from vimnas_ds.export import ExportError
from vimnas_ds.predict import Classifier, Prediction
from vimnas_ds.processes import end_process
from vimnas_ds.report.pictures import contact_sheet, under_titles

#: Frames of a strip.
MAX_FRAMES = 16


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=Path, metavar="EXPORT", help="what export.py has written")
    parser.add_argument("file", type=Path, metavar="FILE", help="a video or a picture")
    parser.add_argument("--dataset", metavar="NAME", help="only this head; default: all that fit")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes (%(default)s)")
    parser.add_argument("--strip", type=Path, metavar="PNG", help="draw what the network saw")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    args = parser.parse_args(argv)
    if args.top < 1:
        parser.error(f"--top must be at least 1, got {args.top}")
    if args.strip is not None and args.strip.suffix.lower() != ".png":
        parser.error(f"--strip must end in .png, got {args.strip}")
    return args


def draw_strip(found: dict[str, Prediction], file: Path, to: Path) -> None:
    """One row a head under its name, the most probable class above it."""
    sheets = {
        name: contact_sheet(
            p.seen, [f"{p.labels[0]} {p.probabilities[0]:.0%}"], max_frames=MAX_FRAMES
        )
        for name, p in found.items()
    }
    page = under_titles({f"{name}: {file.name}": sheet for name, sheet in sheets.items()})
    to.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(page).save(to)


def show(found: dict[str, Prediction], file: Path) -> str:
    """A block a head, a line a class."""
    lines = []
    for name, p in found.items():
        lines.append(f"{file.name}, {name}:")
        pairs = zip(p.labels, p.probabilities, strict=True)
        lines += [f"  {share:6.1%}  {label}" for label, share in pairs]
    return "\n".join(lines)


def as_json(found: dict[str, Prediction], file: Path) -> str:
    heads = {
        name: [
            {"label": label, "probability": share}
            for label, share in zip(p.labels, p.probabilities, strict=True)
        ]
        for name, p in found.items()
    }
    return json.dumps({"file": str(file), "heads": heads}, indent=2)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        classifier = Classifier(args.export)
        names = classifier.heads_for(args.file) if args.dataset is None else (args.dataset,)
        found = {name: classifier(args.file, name, args.top) for name in names}
        print((as_json if args.json else show)(found, args.file))
        if args.strip is not None:
            draw_strip(found, args.file, args.strip)
            print(f"what the network saw: {args.strip}", file=sys.stderr)
    except (ExportError, BadFile, OSError) as err:
        print(f"cannot classify: {err}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    end_process(main())
