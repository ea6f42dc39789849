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
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vimnas_ds.arch_file import named_arch
from vimnas_ds.export import ExportError, export_subnet, load_subnet
from vimnas_ds.model.subnet import SubNetwork
from vimnas_ds.programs import CannotExpress, Head, Run, write_onnx, write_torch_export
from vimnas_ds.search.cli import build_parser, run_script
from vimnas_ds.search.run import TrainedNetwork, open_network
from vimnas_ds.space import Arch
from vimnas_ds.timm_vit import write_timm
from vimnas_ds.train.ranks import start_ranks

FORMATS = {"torch_export": write_torch_export, "onnx": write_onnx, "timm": write_timm}
#: Largest difference of logits, absolute and relative: float32 in another order of summation.
TOLERANCE = 1e-4


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument("--arch", required=True, help="largest, smallest, or a file with one")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/export")
    parser.add_argument(
        "--formats",
        nargs="*",
        choices=tuple(FORMATS),
        help="the heads' programs to write (none: no name); default: all that can be made",
    )
    return parser.parse_args(argv)


def write_export(network: TrainedNetwork, arch: Arch, folder: Path) -> SubNetwork:
    """The folder itself; returns the sub-network as loaded back from it."""
    net = network.net
    steps = {
        name: {"size": d.size, "resize": d.test_resize, "frames": d.frames, "fps": d.fps}
        for name, d in network.config.vimnas.data.datasets.items()
    }
    labels = json.loads(network.files.labels.read_text())
    source = {"checkpoint": str(network.checkpoint), "space": network.config.vimnas.space}
    export_subnet(net.extract(arch), folder, net.space.head_dim, labels, steps, source)
    return load_subnet(folder)


@torch.no_grad()
def difference(run: Run, pixels: Tensor, expected: Tensor, what: str) -> float:
    """The largest between run(pixels) and the supernet's logits; ExportError beyond TOLERANCE."""
    found = run(pixels)
    largest = float((found - expected).abs().max())
    if not torch.allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE):
        raise ExportError(f"{what}: logits are not the supernet's, they differ by {largest:.1e}")
    return largest


def write_heads(
    network: TrainedNetwork, arch: Arch, folder: Path, formats: Sequence[str] | None
) -> Iterator[str]:
    """Check what was exported and write the programs; a line for each head and format.

    Raises ExportError if what was loaded back is another network. An asked-for format that no head
    can have raises CannotExpress.
    """
    for kind in FORMATS:
        remove_programs(folder, kind)
    loaded = write_export(network, arch, folder)
    refused: dict[str, list[str]] = {}
    for name, d in network.config.vimnas.data.datasets.items():
        shape = (d.size, d.size) if d.frames is None else (d.frames, d.size, d.size)
        pixels = torch.randn(3, 3, *shape)
        with torch.no_grad():
            expected = network.net(pixels, arch, name)
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
        if len(refused.get(kind, [])) == len(network.datasets):
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
    network = open_network(args.checkpoint, ranks, args.set)
    network.net.float().cpu()
    arch = named_arch(args.arch, network.net.space)
    folder = args.out or network.files.root / "export"
    for line in write_heads(network, arch, folder, args.formats):
        print(line, flush=True)
    print(f"exported {arch}\nto {folder}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_script(lambda: export(args))


if __name__ == "__main__":
    sys.exit(main())
