"""How many files are decoded at once and how many batches wait: from the machine, in advance.

    workers = cores of this process, 16 at most, or vimnas.data.workers
    depth   = batches that keep every worker busy, 8 or vimnas.data.prefetch at least,
              as long as depth x (decoded + finished batch) fits a quarter of the free memory

Clips cost many times what images cost and large sub-networks many times what small ones do: it
takes several batches to even out which of loader and step is slower at the moment.

What a decoded sample takes is the largest dataset's (see `footprint`): the network's input for
clips decoded here, the whole file for those that the GPU decodes. A finished one is float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from vimnas_ds.config import DataSection, DatasetSection
from vimnas_ds.processes import available_memory, cores_per_process, local_processes

#: Share of the free memory of this process that batches ahead may take.
SHARE = 0.25
#: Batches ahead where nothing asks for more and memory allows it.
DEPTH = 8
#: Finished batches on a GPU lie in its memory: two are enough to never wait.
READY_ON_GPU = 2


@dataclass(frozen=True)
class Capacity:
    """`workers` decoding threads; `decoding` batches decoded ahead and `ready` finished ones, in
    `bytes` of memory at most, of which `free` were there at the start."""

    workers: int
    decoding: int
    ready: int
    bytes: int
    free: int

    def __str__(self) -> str:
        return (
            f"data: {self.workers} decoding threads, {self.decoding} batches decoded ahead, "
            f"{self.ready} finished ones waiting, in at most {self.bytes / 2**20:,.0f} MiB of "
            f"{self.free / 2**20:,.0f} MiB free memory per rank"
        )


def decoding_threads(section: DataSection, world_size: int) -> int:
    """Threads with which one process of `world_size` reads and decodes files."""
    return section.workers or min(16, cores_per_process(world_size))


def plan_capacity(
    section: DataSection,
    sample_bytes: Mapping[str, int],
    batch_sizes: Iterable[int],
    world_size: int,
    device: torch.device,
) -> Capacity:
    """What one process of `world_size` does ahead.

    Args:
        sample_bytes: what a decoded sample takes, by dataset.
        batch_sizes: samples per batch of this process, of every kind of batch it will ask for.
    """
    sizes = list(batch_sizes)
    workers = decoding_threads(section, world_size)
    free = available_memory() // local_processes(world_size)
    decoded = max(sizes) * max(sample_bytes.values())
    finished = max(sizes) * max(_finished_bytes(d) for d in section.datasets.values())
    gpu = device.type == "cuda"
    each = decoded + (0 if gpu else finished)
    wanted = max(DEPTH, section.prefetch, math.ceil(workers / min(sizes)) + 1)
    depth = _fitting(wanted, each, free)
    ready = min(depth, READY_ON_GPU) if gpu else depth
    return Capacity(workers, depth, ready, depth * each, free)


def plan_ahead(wanted: int, each: int, world_size: int) -> int:
    """How many batches, or samples, of `each` bytes an evaluation decodes ahead: `wanted`, or fewer
    (at least 1) where the memory that is free now is short."""
    return _fitting(wanted, each, available_memory() // local_processes(world_size))


def _fitting(wanted: int, each: int, free: int) -> int:
    return max(1, min(wanted, int(SHARE * free / each)))


def _finished_bytes(data: DatasetSection) -> int:
    """A sample of a batch, float32."""
    return 4 * (data.frames or 1) * 3 * data.size**2
