"""Does a long run hold on to more and more? Memory, files, threads and processes, from outside.

    python scripts/soak.py                      (2,000 steps: about six minutes on two quiet cores)
    python scripts/soak.py --steps 150

Trains the demo's four datasets jointly on generated data, through the launcher on two CPU ranks,
with an evaluation, pictures and a checkpoint every 50 steps. Meanwhile /proc is read every two
seconds. A quantity is flat if neither the line through the second half of its samples nor their
peaks rise by more than its tolerance (see vimnas_ds/report/endurance.py). Prints the figures;
OUT/soak.json holds them with all samples, OUT/soak.png a picture. Exit code 0: all flat; 1:
something grew, or the run failed.

How small a leak this proves absent depends on the steps: in N of them a steady one of up to
2 x 16 MiB / N a step passes for flat: 16 KiB with 2,000, 1.6 KiB with 20,000. The last line says
how much that was.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from run_processes import Process, find_processes, kill
from small_run import launch, write_config

from vimnas_ds.report.endurance import Series, Trend, endurance_figure, trend
from vimnas_ds.report.table import format_table

MIB = 2**20
#: what is sampled of each rank, and by how much it may rise over the second half of the run
TOLERANCES = {
    "RSS (MiB)": 16.0,
    "anonymous (MiB)": 16.0,
    "PSS (MiB)": math.inf,  # shown only: it moves with every other process that loads torch
    "open files": 2.0,
    "threads": 1.0,
    "child processes": 0.5,
    "/dev/shm (MiB)": 1.0,
}
BATCHES_PER_EPOCH = 16  # of 16 samples, with PER_CLASS files and a fifth held out
PER_CLASS = 10


def configure(out: Path, steps: int) -> Path:
    """At least `steps` joint steps, in whole epochs."""
    every = min(50, max(steps // 4, 1))
    return write_config(
        out,
        PER_CLASS,
        schedule={"epochs": math.ceil(steps / BATCHES_PER_EPOCH), "image_epochs": 0, "warmup": 1},
        alpha={"every": 1},
        log={"every": 5, "images_every": every, "eval_every": every, "eval_subnets": 2},
        checkpoint={"every": every, "keep": 2},
        output_dir=str(out / "run"),
    )


def sample(process: Process) -> dict[str, float]:
    """What a process holds now. Raises OSError when it has ended."""
    folder = Path(f"/proc/{process.pid}")
    status = dict(re.findall(r"^(\w+):\s+(\d+)", (folder / "status").read_text(), re.M))
    pss = re.search(r"^Pss:\s+(\d+)", (folder / "smaps_rollup").read_text(), re.M)
    assert pss is not None
    shared: dict[str, int] = {}
    for line in (folder / "maps").read_text().splitlines():
        if "/dev/shm/" in line:
            first, last = (int(a, 16) for a in line.split()[0].split("-"))
            shared[line.split(None, 5)[5]] = last - first
    children = [c.read_text().split() for c in folder.glob("task/*/children")]
    return {
        "RSS (MiB)": int(status["VmRSS"]) / 1024,
        "anonymous (MiB)": int(status["RssAnon"]) / 1024,
        "PSS (MiB)": int(pss[1]) / 1024,
        "open files": len(list((folder / "fd").iterdir())),
        "threads": int(status["Threads"]),
        "child processes": sum(map(len, children)),
        "/dev/shm (MiB)": sum(shared.values()) / MIB,
    }


def watch(config: Path, out: Path, ranks: int, every: float) -> tuple[int, list[dict[str, Any]]]:
    """The run's exit code, and every sample of every rank since its first step."""
    samples: list[dict[str, Any]] = []
    log, mark, started = out / "run" / "train.log", str(out), time.monotonic()
    with (out / "output.log").open("w") as output:
        args = ["--deepspeed_config", str(config), "--overwrite"]
        runner = launch("train.py", args, ranks, mark, output)
        try:
            while runner.poll() is None:
                time.sleep(every)
                if not (step := last_step(log)):
                    continue
                for process in find_processes(mark):
                    if process.role == "rank":
                        seconds = round(time.monotonic() - started, 1)
                        at = {"rank": process.rank, "step": step, "seconds": seconds}
                        try:
                            samples.append({**at, **sample(process)})
                        except OSError:  # it has just ended
                            continue
        finally:
            kill(find_processes(mark))
    return runner.wait(), samples


def last_step(log: Path) -> int:
    """The last step that the log tells of, 0 if there is none yet."""
    found = re.findall(r"  step (\d+)/", log.read_text()) if log.exists() else []
    return int(found[-1]) if found else 0


def judge(samples: list[dict[str, Any]]) -> tuple[dict[str, dict[str, Series]], list[list[Any]]]:
    """The samples by quantity and rank, and (quantity, rank, trend, whether it is flat); what
    was sampled after the last step is left out, for then things are taken down."""
    series: dict[str, dict[str, Series]] = {}
    found: list[list[Any]] = []
    for quantity, tolerance in TOLERANCES.items():
        for rank in sorted({s["rank"] for s in samples}):
            own = [s for s in samples if s["rank"] == rank and s["step"] < samples[-1]["step"]]
            points = [s["step"] for s in own], [s[quantity] for s in own]
            series.setdefault(quantity, {})[f"rank {rank}"] = points
            one = trend(*points)
            found.append([quantity, rank, one, one.is_flat(tolerance)])
    return series, found


def row(quantity: str, rank: int, one: Trend, flat: bool) -> list[str]:
    judged = TOLERANCES[quantity]
    values = (one.start, one.settled, one.end, *one.slopes, one.rise, one.peak_rise)
    return [
        f"{quantity}, rank {rank}",
        *(f"{value:.1f}" for value in values),
        *(("-", "-") if judged == math.inf else (f"{judged:.1f}", "flat" if flat else "GROWS")),
    ]


def unseen(found: list[list[Any]]) -> str:
    """The largest steady growth of each quantity that would have passed for flat, in words."""
    parts = []
    for quantity, tolerance in TOLERANCES.items():
        if tolerance < math.inf:
            most = max(one.unseen(tolerance) for of, _, one, _ in found if of == quantity)
            name, in_mib, _ = quantity.partition(" (MiB)")
            rate = f"{1024 * most:.3g} KiB a step" if in_mib else f"{1000 * most:.3g} in 1000 steps"
            parts.append(f"{name} {rate}")
    return "a steady leak passes for flat up to: " + ", ".join(parts)


HEAD = ["", "start", "warm", "end", "slope 1", "slope 2", "rise", "peaks", "allowed", ""]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between samples")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="data, run, figures")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no run is left behind
    args.out = args.out.resolve()
    config = configure(args.out, args.steps)
    shutil.rmtree(args.out / "run", ignore_errors=True)
    code, samples = watch(config, args.out, args.ranks, args.every)
    if code != 0:
        print(f"the run ended with exit code {code}: see {args.out / 'output.log'}")
        return 1
    series, found = judge(samples)
    endurance_figure(series).savefig(args.out / "soak.png")
    figures = [{"quantity": q, "rank": r, "flat": flat, **vars(one)} for q, r, one, flat in found]
    report = {"steps": samples[-1]["step"], "figures": figures, "samples": samples}
    (args.out / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    print(format_table(HEAD, [row(*one) for one in found]))
    grown = sorted({q for q, _, _, flat in found if not flat})
    print(
        f"{samples[-1]['step']} steps, {samples[-1]['seconds']:.0f} s, {len(samples)} samples; "
        "slopes per 1000 steps of the first and second half, rise over the second half, "
        "rise of peaks: " + (f"not flat: {', '.join(grown)}" if grown else "all flat")
    )
    print(unseen(found))
    return int(bool(grown))


if __name__ == "__main__":
    sys.exit(main())
