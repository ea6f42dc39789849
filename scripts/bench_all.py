"""All benches, one after the other, and their ratios in one table.

    python scripts/bench_all.py                    on a CPU, 2 threads, float32: about 15 minutes
    python scripts/bench_all.py --device cuda      on a GPU, bf16

Each line of the table is ours / theirs as the bench defines it in its docstring. Exit code 1 if a
bench fails; a missed goal is shown, not an error.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from bench_common import arguments

BENCHES = (
    ("bench_sliced_linear.py",),
    ("bench_adamw.py",),
    ("bench_alpha.py",),
    ("bench_step.py",),
    ("bench_step.py", "--space", "vit_b", "--smallest"),
    ("bench_step.py", "--video"),
    ("bench_engine.py",),
    ("bench_memory.py",),
    ("bench_plan.py",),
    ("bench_loader.py",),
    ("bench_loader.py", "--images"),
    ("bench_views.py",),
    ("bench_evolve.py",),
    ("bench_perturb.py",),
)
#: benches whose ratio is to be above its goal
MORE_IS_BETTER = frozenset({"evolve_two_ranks"})
LINE = re.compile(r"^(\S+) ratio (\S+) goal (\S+)$")


def run(command: list[str]) -> tuple[list[tuple[str, float, float]], int]:
    """Run one bench, its output passed on; its ratios and exit code."""
    found = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if match := LINE.match(line.strip()):
                found.append((match[1], float(match[2]), float(match[3])))
    return found, process.returncode


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.set_defaults(runs=None)
    args = parser.parse_args(argv)
    rest = ["--threads", str(args.threads), "--device", args.device]
    rest += [] if args.runs is None else ["--runs", str(args.runs)]
    ratios, failed = [], []
    for script, *options in BENCHES:
        print(f"\n== {' '.join([script, *options])}", flush=True)
        path = str(Path(__file__).with_name(script))
        found, code = run([sys.executable, path, *options, *rest])
        ratios += found
        if code:
            failed.append(" ".join([script, *options]))
    print(f"\n{'bench':<44} {'ratio':>7} {'goal':>6}")
    for name, ratio, goal in ratios:
        met = ratio >= goal if name in MORE_IS_BETTER else ratio <= goal
        print(f"{name:<44} {ratio:7.3f} {goal:6.2f}  {'met' if met else 'missed'}")
    for name in failed:
        print(f"failed: {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
