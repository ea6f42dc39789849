"""Export one sub-network of a trained supernet as a folder that stands alone.

    python scripts/export.py --arch runs/demo/perturbation/arch.json --out exports/demo
    python -c 'import vimnas_ds; print(vimnas_ds.load_subnet("exports/demo"))'

Writes model.safetensors, arch.json, labels.json and preprocess.json, loads them back and compares
the logits with the supernet's (a few seconds). Loading needs neither DeepSpeed nor DALI.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from vimnas_ds.arch_file import named_arch
from vimnas_ds.arguments import folder
from vimnas_ds.export import ExportError, export_subnet, load_subnet
from vimnas_ds.search.cli import build_parser, run_script
from vimnas_ds.search.run import TrainedNetwork, choose_checkpoint, open_network
from vimnas_ds.space import Arch
from vimnas_ds.train.ranks import start_ranks


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument("--arch", required=True, help="largest, smallest, or a file with one")
    parser.add_argument("--out", type=folder, metavar="DIR", help="default: RUN/export")
    return parser.parse_args(argv)


def write_export(network: TrainedNetwork, arch: Arch, folder: Path) -> float:
    """Export, load back, and return the largest difference of logits from the supernet's.

    Raises ExportError if what was loaded back is another network.
    """
    net, sections = network.net.float(), network.config.vimnas.data.datasets
    device = next(net.parameters()).device
    steps = {
        name: {"size": d.size, "resize": d.test_resize, "frames": d.frames, "fps": d.fps}
        for name, d in sections.items()
    }
    labels = json.loads(network.files.labels.read_text())
    source = {
        "checkpoint": str(network.checkpoint),
        "ema": network.ema,
        "space": network.config.vimnas.space,
    }
    export_subnet(net.extract(arch), folder, net.space.head_dim, labels, steps, source)
    loaded = load_subnet(folder).to(device)
    worst = 0.0
    with torch.no_grad():
        for name, d in sections.items():
            frames = () if d.frames is None else (d.frames,)
            x = torch.randn(2, 3, *frames, d.size, d.size, device=device)
            expected, found = net(x, arch, name), loaded(x, name)
            if not torch.allclose(expected, found, atol=1e-3, rtol=1e-3):
                raise ExportError(f"{folder}: logits on {name} are not the supernet's")
            worst = max(worst, float((expected - found).abs().max()))
    return worst


def export(args: argparse.Namespace) -> int:
    ranks = start_ranks(engine=False)
    if not ranks.is_main:
        return 0  # one process is enough
    network = open_network(choose_checkpoint(args.checkpoint, ranks), ranks, args.set, args.ema)
    arch = named_arch(args.arch, network.net.space)
    folder = args.out or network.files.root / "export"
    worst = write_export(network, arch, folder)
    print(f"exported {arch}\nto {folder}; logits differ from the supernet's by at most {worst:.1e}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_script(lambda: export(args))


if __name__ == "__main__":
    sys.exit(main())
