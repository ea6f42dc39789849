"""Latency on this device as a table: measured once, then the same numbers for every candidate.

Timing every candidate would be slow and noisy, and no two ranks would agree. Measured are the parts
that sub-networks of a space are made of, stand-alone as they are exported,

    latency(arch) = c (stem(E) + sum_l [attention(E, h_l) + mlp(E, F_l)])

(stem: tokens, last norm and head), in eval mode on random inputs, all parts in turn, round after
round, each part's median over its runs. Whole random sub-networks take their turns among them:
half of them set c, for parts run alone find their weights in nearer caches; with the other half
the table is compared, and its error is the median of |predicted - measured| / measured.

The table is a JSON file with the conditions it holds under; rank 0 measures and writes, all ranks
use what it read or wrote. Other conditions: it is measured anew.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vimnas_ds.config import ConfigError, RunConfig
from vimnas_ds.model.subnet import SubNetwork
from vimnas_ds.processes import processor_name
from vimnas_ds.search.run import SearchRun
from vimnas_ds.space import Arch, SearchSpace
from vimnas_ds.train.dry_run import model_layout
from vimnas_ds.train.engine import model_options
from vimnas_ds.train.ranks import gather_objects
from vimnas_ds.train.run_files import network_of

WHOLES = 8  #: random sub-networks timed as a whole
ROUNDS, LEAST_ROUNDS, SECONDS = 21, 5, 30.0  #: rounds; no more than the least once so long is over
TURN = 0.005  #: seconds; a part is run again within its turn until they are over


@dataclass(frozen=True)
class LatencyTable:
    """Nanoseconds of each part: "stem E", "attention E HEADS", "mlp E HIDDEN"."""

    conditions: dict[str, Any]
    parts: dict[str, int]
    checks: list[dict[str, Any]]  #: arch, predicted_ms, measured_ms

    def nanoseconds(self, arch: Arch) -> int:
        e = arch.embed_dim
        layers = range(arch.depth)
        total = sum(self.parts[f"attention {e} {arch.num_heads[i]}"] for i in layers)
        return (
            self.parts[f"stem {e}"]
            + total
            + sum(self.parts[f"mlp {e} {arch.hidden_dim(i)}"] for i in layers)
        )

    @property
    def error(self) -> float:
        """Median relative error over the checks."""
        return statistics.median(
            abs(c["predicted_ms"] - c["measured_ms"]) / c["measured_ms"] for c in self.checks
        )

    def __str__(self) -> str:
        on = self.conditions
        return (
            f"latency of {on['dataset']} (batch {on['batch']}, {on['dtype']}, "
            f"{on['threads']} threads, {on['device']}): table within {self.error:.1%} of "
            f"{len(self.checks)} whole sub-networks (median)"
        )


def latency_table(run: SearchRun, dataset: str, batch: int, threads: int) -> LatencyTable:
    """The table of `dataset` for batches of `batch` inputs, the same on all ranks: read from
    RUN/latency/, or measured and written there. `threads` counts on a CPU.

    Raises ConfigError for a file that is none.
    """
    path = run.files.root / "latency" / f"{dataset}_batch{batch}.json"
    table = _read(path)  # by all ranks: a bad file ends all of them
    if run.ranks.is_main:
        now = conditions(run.config, dataset, batch, threads, run.ranks.device, run.dtype)
        if table is None or table.conditions != now:
            table = measure(run.config, dataset, batch, threads, run.ranks.device, run.dtype)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_suffix(".part")
                part.write_text(json.dumps(asdict(table), indent=2) + "\n")
                part.replace(path)
            except OSError as err:
                print(f"{path} cannot be written ({err.strerror}): the next search measures again")  # noqa: T201
    found = table if run.ranks.world_size == 1 else gather_objects(table)[0]
    assert isinstance(found, LatencyTable)
    return found


def _read(path: Path) -> LatencyTable | None:
    if not path.is_file():
        return None
    try:
        return LatencyTable(**json.loads(path.read_text()))
    except (TypeError, ValueError) as err:
        raise ConfigError(f"{path} is no latency table ({err}): delete it") from err


def conditions(
    config: RunConfig,
    dataset: str,
    batch: int,
    threads: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What a latency depends on besides the architecture."""
    data, on_cpu = config.vimnas.data.datasets[dataset], device.type == "cpu"
    return {
        "device": processor_name() if on_cpu else torch.cuda.get_device_name(device),
        "threads": threads if on_cpu else 0,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "dataset": dataset,
        "batch": batch,
        "input": [data.frames or 1, data.size, data.size],
        "network": {key: repr(value) for key, value in network_of(config).items()},
        "space": repr(config.vimnas.search_space),
    }


def measure(
    config: RunConfig,
    dataset: str,
    batch: int,
    threads: int,
    device: torch.device,
    dtype: torch.dtype,
) -> LatencyTable:
    """Time all parts of the configured space on `device`. One round warms up and sets how often a
    part runs in its turn."""
    section = config.vimnas
    space, data = section.search_space, section.data.datasets[dataset]
    frames = () if data.frames is None else (data.frames,)
    shape = (batch, 3, *frames, data.size, data.size)
    x = torch.randn(shape, device=device, dtype=dtype)
    options, layout = model_options(config), model_layout(config)

    def build(arch: Arch) -> SubNetwork:
        net = SubNetwork(
            arch,
            space.head_dim,
            section.tokens.geometry(),
            {dataset: data.num_classes},
            options,
            section.position_dim,
        )
        return net.to(device, dtype).eval()

    num_tokens = layout.num_tokens(data.frames, data.size)
    runs: dict[str, Callable[[], Tensor]] = {}
    for e in space.embed_dim:
        tokens = torch.randn(batch, num_tokens, e, device=device, dtype=dtype)
        stem = build(Arch(e, 0, (), ()))
        runs[f"stem {e}"] = lambda net=stem: net(x, dataset)  # type: ignore[misc]
        for heads, ratio in _one_layer(space):
            net = build(Arch(e, 1, (heads,), (ratio,)))
            for name, branch in _branches(net):
                key = f"{name} {e} {heads if name == 'attention' else int(e * ratio)}"
                runs.setdefault(key, lambda f=branch, t=tokens: f(t))  # type: ignore[misc]
    rng = random.Random(0)
    archs = list(dict.fromkeys(space.sample(rng) for _ in range(10 * WHOLES)))[:WHOLES]
    wholes = {arch.to_json(): build(arch) for arch in archs}
    runs |= {key: lambda net=net: net(x, dataset) for key, net in wholes.items()}  # type: ignore[misc]
    with _threads(threads, device), torch.inference_mode():
        times = _time_in_turns(runs, device)
    on = conditions(config, dataset, batch, threads, device, dtype)
    return fit(
        on,
        {k: t for k, t in times.items() if k not in wholes},
        {a: times[a.to_json()] for a in archs},
    )


def fit(on: dict[str, Any], parts: dict[str, int], wholes: dict[Arch, int]) -> LatencyTable:
    """The table of `parts`, scaled to the first half of `wholes` and compared with the others; all
    in nanoseconds."""
    alone = LatencyTable(on, parts, [])
    ratios = [time / alone.nanoseconds(arch) for arch, time in wholes.items()]
    half = len(wholes) // 2
    scale = statistics.median(ratios[:half] or [1.0])
    scaled = {key: round(scale * time) for key, time in parts.items()}
    table = LatencyTable(on, scaled, [])
    for arch, measured in list(wholes.items())[half:]:
        predicted = table.nanoseconds(arch)
        table.checks.append(
            {
                "arch": json.loads(arch.to_json()),
                "predicted_ms": predicted / 1e6,
                "measured_ms": measured / 1e6,
            }
        )
    return table


def _one_layer(space: SearchSpace) -> Iterator[tuple[int, float]]:
    """Heads and ratio of as few one-layer networks as show every choice."""
    heads = sorted({h for layer in space.num_heads for h in layer})
    ratios = sorted({r for layer in space.mlp_ratio for r in layer})
    for i in range(max(len(heads), len(ratios))):
        yield heads[min(i, len(heads) - 1)], ratios[min(i, len(ratios) - 1)]


def _branches(net: SubNetwork) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """The two halves of a network's one block."""
    block: Any = net.blocks[0]
    yield "attention", lambda t: t + block.ls1(block.attn(block.norm1(t)))
    yield "mlp", lambda t: t + block.ls2(block.mlp(block.norm2(t)))


@contextmanager
def _threads(count: int, device: torch.device) -> Iterator[None]:
    """On a CPU, torch with `count` threads; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count if device.type == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _time_in_turns(runs: dict[str, Callable[[], Tensor]], device: torch.device) -> dict[str, int]:
    """Median nanoseconds of each of `runs`. A single CPU thread is timed by its own clock, which
    stands still while other processes have the processor."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time_ns if alone else time.perf_counter_ns

    def once(run: Callable[[], Tensor]) -> int:
        started = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - started

    for run in runs.values():  # the first pass plans and allocates
        once(run)
    counts = {key: math.ceil(TURN * 1e9 / once(run)) for key, run in runs.items()}
    seen: dict[str, list[int]] = {key: [] for key in runs}
    started = time.perf_counter()
    for number in range(ROUNDS):
        if number >= LEAST_ROUNDS and time.perf_counter() - started > SECONDS:
            break
        for key, run in runs.items():
            once(run)  # the other parts have filled the caches
            seen[key] += [once(run) for _ in range(counts[key])]
    return {key: round(statistics.median(values)) for key, values in seen.items()}
