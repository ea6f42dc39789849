"""How many processes share this machine, and what one of them may use (no torch)."""

from __future__ import annotations

import os


def local_processes(world_size: int) -> int:
    """Processes on this machine: the launcher says (torchrun LOCAL_WORLD_SIZE, DeepSpeed
    LOCAL_SIZE); without one, all of them."""
    for key in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if key in os.environ:
            return max(1, int(os.environ[key]))
    return max(1, world_size)


def cores_per_process(world_size: int) -> int:
    """This process's share of the machine's cores, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // local_processes(world_size))
