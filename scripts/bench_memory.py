"""Peak memory of training a sampled sub-network / the same network in timm.

    python scripts/bench_memory.py

The first case of bench_step.py (vit_s, 8 images): every run is a fresh process that builds one side
and takes three steps. On a CPU it reports by how much the resident set grew above what the imports
took, at its highest; on a GPU torch.cuda.max_memory_allocated.

Floor 1.12: the supernet's weights, gradients and two moments beyond the sub-network's, 4 x 4 bytes
x (33.7 - 21.6 M) = 194 MB and its other tubes, over about 1750 MB. About two minutes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from bench_common import arguments, ratio_line, start

GOAL, STEPS, MIB = 1.15, 3, 2**20


def resident(field: str) -> int:
    """Bytes of this process's VmRSS (now) or VmHWM (its highest so far)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(side: str, args: argparse.Namespace) -> int:
    """Peak bytes of one side; for a fresh process."""
    from bench_step import IMAGES, ours, theirs

    place = start(args)
    before = resident("VmRSS")
    step = {"supernet": ours, "timm": theirs}[side](IMAGES, place)
    for _ in range(STEPS):
        step()
    place.wait()
    if place.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM") - before


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, runs=5)
    parser.add_argument("--side", choices=("supernet", "timm"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side is not None:
        print("peak", measure(args.side, args))
        return 0
    start(args)
    peaks: dict[str, list[float]] = {"supernet": [], "timm": []}
    order = list(peaks)
    for _ in range(args.runs):
        for side in order:
            command = [sys.executable, __file__, "--side", side, "--device", args.device]
            command += ["--threads", str(args.threads)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            peaks[side].append(int(done.stdout.split()[-1]) / MIB)
        order.reverse()
    for side, values in peaks.items():
        low, high = min(values), max(values)
        middle = statistics.median(values)
        print(f"  {side:<10} median {middle:.0f} MiB, {low:.0f} to {high:.0f}")
    ratio = statistics.median(peaks["supernet"]) / statistics.median(peaks["timm"])
    print(ratio_line("memory_vit_s", ratio, GOAL))
    return 0


if __name__ == "__main__":
    sys.exit(main())
