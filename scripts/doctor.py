"""Is everything here, and is everything fast? Checks and short self-tests, each on its own.

    python scripts/doctor.py
    python scripts/doctor.py --json > doctor.json
    python scripts/doctor.py --only packages extension

Says what is installed, which path does the work, why a slow one is slow and which command mends it.
About ten seconds on two idle cores, most of them imports; more on a busy machine, or when files are
read for the first time; not timed with a GPU. Nothing is written but temporary files. Exit code 0
when all that can work on this machine works, 1 otherwise (what is optional, or needs a GPU that is
not here, does not count).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from vimnas_ds.doctor import fast_paths, host, media, software, together
from vimnas_ds.doctor.finding import Check, Finding, isolated
from vimnas_ds.report.table import format_table


def checks(output_dir: Path) -> list[Check]:
    """All of them, in the order of the report."""
    torch = ("torch",)
    return [
        Check("python", software.python),
        Check("packages", software.packages),
        Check("gpu", software.gpu, torch),
        Check("extension", fast_paths.extension, torch),
        Check("sliced linear", fast_paths.sliced_linear, ("vimnas_ds.ops.sliced_linear",)),
        Check("attention", fast_paths.attention, ("vimnas_ds.model.attention",)),
        Check("apex", fast_paths.apex, ("vimnas_ds.ops.apex",)),
        Check("gates", fast_paths.gates, ("vimnas_ds.ops.gates",)),
        Check("adamw", fast_paths.adamw, ("vimnas_ds.ops.adamw",)),
        Check("codecs", media.codecs, ("vimnas_ds.data.decode",)),
        Check("dali", media.dali, ("vimnas_ds.data.pipelines",)),
        Check("collectives", together.collectives, ("torch.distributed",)),
        Check("deepspeed", together.engine, ("deepspeed", "vimnas_ds.train.engine")),
        Check("memory", host.memory),
        Check("disk", functools.partial(host.disk, output_dir)),
    ]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    names = [check.name for check in checks(Path())]
    parser.add_argument("--only", nargs="+", choices=names, metavar="CHECK", help=", ".join(names))
    parser.add_argument(
        "--seconds",
        type=float,
        default=60,
        help="most that one self-test may take; they need less than 10 on an idle machine (60)",
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs"), help="where runs are written (runs)"
    )
    return parser.parse_args(argv)


def describe(findings: Sequence[Finding]) -> str:
    """The table, what to do, and one sentence."""
    rows = [[f.name, f.state, f"{f.seconds:.1f}", f.detail] for f in findings]
    lines = [format_table(["what", "state", "s", "found"], rows), ""]
    for f in findings:
        if f.state in ("slow", "missing", "failed") and f.mend:
            lines.append(f"{f.name}{'' if f.required else ' (optional)'}: {f.mend}")
    bad = [f.name for f in findings if f.counts]
    lines.append(f"to be mended: {', '.join(bad)}" if bad else "all that can work here works")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with contextlib.suppress(Exception):  # once for all checks; without it each says that it fails
        importlib.import_module("torch")
    findings = [
        finding
        for check in checks(args.output_dir)
        if args.only is None or check.name in args.only
        for finding in isolated(check, args.seconds)
    ]
    code = int(any(f.counts for f in findings))
    if args.json:
        print(json.dumps({"exit_code": code, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        print(describe(findings))
    return code


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # else the checks' processes would outlive it
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
