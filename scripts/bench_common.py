"""Shared by the benches: options, the machine in words, interleaved runs, ratio lines.

Every bench compares sides that take turns, in alternating order, so that a machine that slows down
slows all of them; it prints each side's median and quartiles, and as its last lines, one a claim,

    NAME ratio VALUE goal VALUE

The ratio is ours / theirs: below the goal is better. On a CPU everything is float32 on 2 threads,
on a GPU bf16 weights and activations; both sides always alike.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vimnas_ds.model.attention import attention_backend
from vimnas_ds.ops import _extension
from vimnas_ds.processes import keep_freed_memory, processor_name

Side = Callable[[], object]


def arguments(doc: str | None, runs: int = 15) -> argparse.ArgumentParser:
    """The parser with the options that all benches share."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=runs, help="timed runs of each side")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser


@dataclass(frozen=True)
class Place:
    """Where a bench runs, and in which type."""

    device: torch.device
    dtype: torch.dtype
    runs: int

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def start(args: argparse.Namespace) -> Place:
    """Set threads and seed, say what the numbers were taken on."""
    if args.device == "cpu":
        keep_freed_memory()  # as training does; both sides run under it
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(f"machine: {machine(device)}, {args.threads} threads, {dtype}, torch {torch.__version__}")
    print(
        f"compiled extension: {'yes' if _extension.available() else 'no'}; "
        f"attention: {attention_backend()}",
        flush=True,
    )
    return Place(device, dtype, args.runs)


def machine(device: torch.device) -> str:
    """The processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def interleave(
    sides: Mapping[str, Side], place: Place, warmup: int = 2, floor_seconds: float = 0.0
) -> dict[str, float]:
    """Median seconds of every side. A run repeats a side until it lasts `floor_seconds`."""
    repeats = 1
    for side in sides.values():
        for _ in range(warmup):
            side()
        repeats = max(repeats, math.ceil(floor_seconds / _seconds(side, 1, place)))
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for _ in range(place.runs):
        for name in order:
            times[name].append(_seconds(sides[name], repeats, place) / repeats)
        order.reverse()
    for name, values in times.items():
        low, middle, high = quartiles(values)
        print(
            f"  {name:<40} median {_time(middle)}  quartiles {_time(low)} to {_time(high)}",
            flush=True,
        )
    return {name: statistics.median(values) for name, values in times.items()}


def interleave_cpu(
    sides: Mapping[str, Callable[[int], object]], runs: int, unit: str, units: int = 1
) -> dict[str, float]:
    """Median CPU-seconds of every side, all threads of the process counted, per `unit`, of which a
    call makes `units`. Sides are called with the number of the round; the first two warm up."""
    costs: dict[str, list[float]] = {name: [] for name in sides}
    walls: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for i in range(runs + 2):
        for name in order:
            wall, cpu = time.perf_counter(), time.process_time()
            sides[name](i)
            if i >= 2:
                costs[name].append((time.process_time() - cpu) / units)
                walls[name].append((time.perf_counter() - wall) / units)
        order.reverse()
    for name, values in costs.items():
        low, middle, high = (1e3 * value for value in quartiles(values))
        print(
            f"  {name:<34} {middle:8.3f} CPU-ms {unit}, quartiles {low:.3f} to {high:.3f}; "
            f"{1 / statistics.median(walls[name]):.1f}/s",
            flush=True,
        )
    return {name: statistics.median(values) for name, values in costs.items()}


def _seconds(side: Side, repeats: int, place: Place) -> float:
    place.wait()
    started = time.perf_counter()
    for _ in range(repeats):
        side()
    place.wait()
    return time.perf_counter() - started


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:9.3f} ms"


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


def ratio_line(name: str, ratio: float, goal: float) -> str:
    """The line that a bench ends with."""
    return f"{name} ratio {ratio:.3f} goal {goal:.2f}"


class Masters:
    """What the optimiser steps: the parameters themselves in float32, float32 copies of bf16 ones.

    Both sides of a bench train through it, so on a GPU both pay for the same copies.
    """

    def __init__(self, net: nn.Module):
        self.network = dict(net.named_parameters())
        self.named = {name: _master(p) for name, p in self.network.items()}
        self._pairs = [
            (p, self.named[n]) for n, p in self.network.items() if p is not self.named[n]
        ]

    def pull_gradients(self) -> None:
        """To be called between backward and the optimiser's step."""
        for parameter, master in self._pairs:
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    @torch.no_grad()
    def push_weights(self) -> None:
        """To be called after the optimiser's step."""
        if self._pairs:
            network: list[Tensor] = [p for p, _ in self._pairs]
            torch._foreach_copy_(network, [m for _, m in self._pairs])


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().float(), parameter.requires_grad)
