r"""The memory model of scripts/plan.py against the peak of real training steps on a CPU.

    python scripts/bench_plan.py                 (about two minutes, below 1.5 GiB)
    python scripts/bench_plan.py --case vit_s 8 0

Each case is a fresh process: one step of a space's largest sub-network, or of a sandwich, in
float32 (forward, backward, the sampled AdamW), after a small one that loads the libraries. Measured
is the growth of the process's highest resident size; freed tensors go back to the kernel at once
(MALLOC_MMAP_THRESHOLD_), so that it is the peak of live tensors. One constant, what the process
takes besides, is fitted on three cases; the others are predicted with it.

The last line is `plan_memory ratio VALUE goal 1.10`: the worst unfitted prediction, whichever of
predicted / measured and its inverse is larger.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_common import arguments, ratio_line
from bench_memory import resident
from torch.nn import functional as F

from vimnas_ds.cost import Layout
from vimnas_ds.layout import Activation, ParamGrids
from vimnas_ds.model.alphas import Alphas
from vimnas_ds.model.options import ModelOptions
from vimnas_ds.model.supernet import Supernet
from vimnas_ds.space import SPACES, Arch, SearchSpace
from vimnas_ds.train.optimizer import SampledAdamW
from vimnas_ds.training_memory import Activations, layer_params, supernet_params
from vimnas_ds.tubes import TUBEVIT

CLASSES, SIZE, MIB, GOAL = {"data": 1000}, 224, 2**20, 1.10


@dataclass(frozen=True)
class Case:
    """What is trained: `frames` 0 for images; `kind` weights, checkpointing, sandwich or alpha."""

    space: str
    batch: int
    frames: int
    kind: str = "weights"

    def predicted(self) -> float:
        """Bytes, without the constant."""
        space, layout = SPACES[self.space], Layout()
        checkpointing = self.kind == "checkpointing"
        step = Activations(layout, self.frames or None, SIZE, self.batch, 4, checkpointing)
        states = 12 * supernet_params(space, CLASSES, layout) + 4 * step.pixels()
        if self.kind == "alpha":
            return states + step.alpha_peak(space)
        grads = [4.0 * layer_params(space, i, layout) for i in range(space.max_depth)]
        grads.append(4.0 * CLASSES["data"] * space.max_embed_dim)
        if self.kind == "sandwich":
            return states + step.sandwich_peak(sandwich(space), grads)
        return states + step.weight_peak(space.largest(), lambda i: (grads[i], grads[i]))

    def measured(self, runs: int, threads: int) -> float:
        """Bytes by which a fresh process grows, median of `runs`."""
        return statistics.median(self._growth(threads) for _ in range(runs))

    def _growth(self, threads: int) -> int:
        command = [sys.executable, __file__, "--threads", str(threads), "--case", self.space]
        command += [str(self.batch), str(self.frames), self.kind]
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
        env["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
        return int(done.stdout.split()[-1])

    def __str__(self) -> str:
        what = f"{self.batch} clips of {self.frames}" if self.frames else f"{self.batch} images"
        return f"{self.space}, {what}, {self.kind}"


FITTED = (Case("vit_t", 8, 0), Case("vit_t", 1, 32), Case("vit_s", 2, 0))
CHECKED = (
    Case("vit_s", 6, 0),
    Case("vit_s", 2, 64, "checkpointing"),
    Case("vit_s", 2, 32, "alpha"),
    Case("vit_t", 8, 0, "sandwich"),
)


def sandwich(space: SearchSpace) -> tuple[Arch, ...]:
    """The largest, the smallest, and the largest once more in the place of a drawn one."""
    return space.largest(), space.smallest(), space.largest()


def steps(space: SearchSpace, batch: int, frames: int, kind: str) -> None:
    """Build a supernet and do one step of its largest sub-network."""
    options = ModelOptions(drop_path=0.1, activation_checkpointing=kind == "checkpointing")
    net = Supernet(space, TUBEVIT, CLASSES, options).train()
    optimizer = SampledAdamW(net.named_parameters(), ParamGrids(net.layouts(), space))
    optimizer.bind_plain()
    clip = (frames,) if frames else ()
    x, y = torch.randn(batch, 3, *clip, SIZE, SIZE), torch.zeros(batch, dtype=torch.int64)
    if kind == "alpha":
        alphas = Alphas(space, 1e-3, torch.Generator())
        loss = F.cross_entropy(net.superposed(x, alphas.probabilities(), "data"), y)
        torch.autograd.grad(loss, list(alphas))
        return
    archs = sandwich(space) if kind == "sandwich" else (space.largest(),)
    logits = net(x, archs if kind == "sandwich" else archs[0], "data").view(-1, CLASSES["data"])
    F.cross_entropy(logits, y.repeat(len(archs))).backward()
    optimizer.activate(Activation(archs, "data", not frames), 1e-3, 0.05)
    optimizer.step()


def measure(case: Case, threads: int) -> int:
    """For a fresh process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    steps(SPACES["nano"], 1, case.frames, case.kind)
    before = resident("VmRSS")
    steps(SPACES[case.space], case.batch, case.frames, case.kind)
    return resident("VmHWM") - before


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, runs=1)
    parser.add_argument("--case", nargs="+", metavar="SPACE BATCH FRAMES [KIND]")
    args = parser.parse_args(argv)
    if args.case is not None:
        space, batch, frames, *kind = args.case
        print("peak", measure(Case(space, int(batch), int(frames), *kind), args.threads))
        return 0
    if args.device != "cpu":
        print("the model is checked on the CPU, whatever --device says")
    rows = [
        (case, case.measured(args.runs, args.threads), case.predicted())
        for case in (*FITTED, *CHECKED)
    ]
    constant = statistics.mean(m - p for _, m, p in rows[: len(FITTED)])
    print(f"fitted constant: {constant / MIB:.1f} MiB")
    worst = 1.0
    for number, (case, grown, computed) in enumerate(rows):
        prediction, fitted = computed + constant, number < len(FITTED)
        ratio = prediction / grown
        worst = worst if fitted else max(worst, ratio, 1 / ratio)
        print(
            f"  {case!s:<40} measured {grown / MIB:6.0f} MiB, predicted {prediction / MIB:6.0f}, "
            f"ratio {ratio:.3f} {'(fitted)' if fitted else ''}"
        )
    print(ratio_line("plan_memory", worst, GOAL))
    return 0


if __name__ == "__main__":
    sys.exit(main())
