"""Peak memory of training a sampled sub-network / the same network in timm.

    python scripts/bench_memory.py

The first case of bench_step.py (vit_s, 8 images): every run is a fresh process that builds one side
and takes three steps. memory_vit_s is the ratio of the processes' peaks, memory_vit_s_growth that
of their growth above what the imports took (on a GPU: of torch.cuda.max_memory_allocated).

Floor: what the supernet holds beyond the sub-network, with equal activations: weights and two
moments, 3 x 4 bytes x (36.4 - 21.8 M), and gradients, 4 x (32.2 - 21.8 M): 217 MB. Of a whole
process of 1.7 GB that is 1.12, of timm's growth of 0.9 GB alone 1.24. About two minutes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from bench_common import arguments, quartiles, ratio_line, start

GOAL, STEPS, MIB = 1.15, 3, 2**20


def resident(field: str) -> int:
    """Bytes of this process's VmRSS (now) or VmHWM (its highest so far)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(side: str, args: argparse.Namespace) -> tuple[int, int]:
    """Peak bytes of one side, and of the whole process; for a fresh process."""
    from bench_step import IMAGES, ours, theirs

    place = start(args)
    before = resident("VmRSS")
    step = {"supernet": ours, "timm": theirs}[side](IMAGES, place)
    for _ in range(STEPS):
        step()
    place.wait()
    if place.device.type == "cuda":
        return torch.cuda.max_memory_allocated(), resident("VmHWM")
    return resident("VmHWM") - before, resident("VmHWM")


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, runs=5)
    parser.add_argument("--side", choices=("supernet", "timm"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side is not None:
        print("peak", *measure(args.side, args))
        return 0
    start(args)
    peaks: dict[str, list[float]] = {"supernet": [], "timm": []}
    whole: dict[str, list[float]] = {"supernet": [], "timm": []}
    order = list(peaks)
    for _ in range(args.runs):
        for side in order:
            command = [sys.executable, __file__, "--side", side, "--device", args.device]
            command += ["--threads", str(args.threads)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            peak, process = done.stdout.split()[-2:]
            peaks[side].append(int(peak) / MIB)
            whole[side].append(int(process) / MIB)
        order.reverse()
    for side, values in peaks.items():
        low, middle, high = quartiles(values)
        process = f"whole process {statistics.median(whole[side]):.0f} MiB"
        print(f"  {side:<10} median {middle:.0f} MiB, quartiles {low:.0f} to {high:.0f}; {process}")
    for name, sides in (("memory_vit_s_growth", peaks), ("memory_vit_s", whole)):
        ratio = statistics.median(sides["supernet"]) / statistics.median(sides["timm"])
        print(ratio_line(name, ratio, GOAL))
    return 0


if __name__ == "__main__":
    sys.exit(main())
