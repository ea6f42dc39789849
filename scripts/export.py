"""Export one sub-network of a trained supernet as a folder that stands alone.

    python scripts/export.py --arch runs/demo/perturbation/arch.json --out exports/demo
    python -c 'import vimnas_ds; print(vimnas_ds.load_subnet("exports/demo"))'

Writes model.safetensors, arch.json, labels.json and preprocess.json, and each dataset's head as a
program: torch_export/NAME.pt2, onnx/NAME.onnx, and, for images and layers all alike,
timm/NAME.json with timm/NAME.safetensors. Everything is loaded back and its logits compared with
the supernet's, in float32 on the CPU; a difference beyond 1e-4 ends with exit code 2. About ten
seconds a head for small networks, most of them ONNX's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vimnas_ds.arch_file import named_arch
from vimnas_ds.arguments import folder
from vimnas_ds.export import ExportError, export_subnet, load_subnet
from vimnas_ds.model.supernet import Supernet
from vimnas_ds.processes import end_process
from vimnas_ds.programs import CannotExpress, Head, Run, write_onnx, write_torch_export
from vimnas_ds.search.cli import build_parser, run_script
from vimnas_ds.search.run import choose_checkpoint, open_network
from vimnas_ds.space import Arch
from vimnas_ds.timm_vit import write_timm
from vimnas_ds.train.ranks import Ranks, start_ranks

FORMATS = {"torch_export": write_torch_export, "onnx": write_onnx, "timm": write_timm}
#: Largest difference of logits, absolute and relative: float32 in another order of summation.
TOLERANCE = 1e-4


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument("--arch", required=True, help="largest, smallest, or a file with one")
    parser.add_argument("--out", type=folder, metavar="DIR", help="default: RUN/export")
    parser.add_argument(
        "--formats",
        nargs="*",
        choices=tuple(FORMATS),
        help="the heads' programs to write (none: no name); default: all that can be made",
    )
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Trained:
    """A supernet on the CPU in float32, with what its exports say besides."""

    net: Supernet
    steps: Mapping[str, Mapping[str, Any]]  #: per dataset size, resize, interpolation, frames, fps
    labels: Mapping[str, Sequence[str]]
    source: Mapping[str, Any]
    root: Path


def open_trained(args: argparse.Namespace, ranks: Ranks) -> Trained:
    """A run's checkpoint. Raises ConfigError in words."""
    run = open_network(choose_checkpoint(args.checkpoint, ranks), ranks, args.set, args.ema)
    return Trained(
        run.net.float().cpu(),
        {
            name: {
                "size": d.size,
                "resize": d.test_resize,
                "interpolation": d.export_interpolation,
                "frames": d.frames,
                "fps": d.fps,
            }
            for name, d in run.config.vimnas.data.datasets.items()
        },
        json.loads(run.files.labels.read_text()),
        {
            "checkpoint": str(run.checkpoint),
            "ema": run.ema,
            "space": run.config.vimnas.space,
        },
        run.files.root,
    )


@torch.no_grad()
def difference(run: Run, pixels: Tensor, expected: Tensor, what: str) -> float:
    """The largest between run(pixels) and the supernet's logits; ExportError beyond TOLERANCE."""
    found = run(pixels)
    largest = float((found - expected).abs().max())
    if not torch.allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE):
        raise ExportError(f"{what}: logits are not the supernet's, they differ by {largest:.1e}")
    return largest


def write_heads(
    trained: Trained, arch: Arch, folder: Path, formats: Sequence[str] | None
) -> Iterator[str]:
    """Check what was exported and write the programs; a line for each head and format.

    Raises ExportError if what was loaded back is another network. An asked-for format that no head
    can have raises CannotExpress.
    """
    for kind in FORMATS:
        remove_programs(folder, kind)
    extracted = trained.net.extract(arch)
    export_subnet(extracted, folder, trained.labels, trained.steps, trained.source)
    loaded = load_subnet(folder)
    refused: dict[str, list[str]] = {}
    for name, steps in trained.steps.items():
        side, frames = steps["size"], steps["frames"]
        shape = (side, side) if frames is None else (frames, side, side)
        pixels = torch.randn(3, 3, *shape)
        with torch.no_grad():
            expected = trained.net(pixels, arch, name)
        largest = difference(partial(loaded, dataset=name), pixels, expected, f"{folder}, {name}")
        yield f"{name}: model.safetensors, logits within {largest:.1e} of the supernet's"
        head = Head(loaded, name, shape)
        for kind in FORMATS if formats is None else formats:
            try:
                run = FORMATS[kind](head, folder)
            except CannotExpress as err:
                refused.setdefault(kind, []).append(f"{name}: no {kind}: {err}")
                yield refused[kind][-1]
                continue
            try:
                largest = difference(run, pixels, expected, f"{folder / kind}, {name}")
            except ExportError:
                remove_programs(folder, kind, name)
                raise
            yield f"{name}: {kind}, logits within {largest:.1e}"
    for kind in formats or ():
        if len(refused.get(kind, [])) == len(trained.steps):
            raise CannotExpress(
                f"--formats {kind}: no head can be written\n" + "\n".join(refused[kind])
            )


def remove_programs(folder: Path, kind: str, name: str = "*") -> None:
    """Programs of an earlier export, or one that is wrong."""
    for suffix in ("pt2", "onnx", "safetensors", "json"):
        for file in (folder / kind).glob(f"{name}.{suffix}"):
            file.unlink()


def export(args: argparse.Namespace) -> int:
    ranks = start_ranks(engine=False)
    if not ranks.is_main:
        return 0  # one process is enough
    trained = open_trained(args, ranks)
    arch = named_arch(args.arch, trained.net.space)
    folder = args.out or trained.root / "export"
    if (folder / "arch.json").exists():
        print(f"{folder}: the export that is there is replaced", flush=True)
    for line in write_heads(trained, arch, folder, args.formats):
        print(line, flush=True)
    print(f"exported {arch}\nto {folder}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_script(lambda: export(args))


if __name__ == "__main__":
    end_process(main())
