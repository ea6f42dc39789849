"""How many processes share this machine, and what one of them may use (no torch)."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path


def local_processes(world_size: int) -> int:
    """Processes on this machine: the launcher says (torchrun LOCAL_WORLD_SIZE, DeepSpeed
    LOCAL_SIZE); without one, all of them."""
    for key in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if key in os.environ:
            return max(1, int(os.environ[key]))
    return max(1, world_size)


def spans_machines(world_size: int) -> bool:
    """Whether there are processes on other machines."""
    return local_processes(world_size) < world_size


def cores_per_process(world_size: int) -> int:
    """This process's share of the machine's cores, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // local_processes(world_size))


def available_memory() -> int:
    """Bytes that can still be used here: the machine's free memory, or what the container's limit
    leaves of it. Without Linux's files, 2 GiB."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return 2**31
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup", f"memory.{name}") for name in ("max", "current"))
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return max(free, 0)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # <malloc.h>


def keep_freed_memory() -> None:
    """Let this process reuse the memory that a training step frees, in large pages.

    By default glibc returns large freed blocks to the kernel, and the next step pays a page fault
    for every 4 KiB of them again: a tenth of a CPU step (scripts/bench_step.py). The price is that
    the process keeps its highest need, about a tenth more of it, to its end. To be called before
    the first tensor of any size is made (torch reads the variable then); off Linux's glibc it does
    nothing.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: huge pages for 2 MiB and more
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # older versions refuse more than 32 MiB
        if libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(_M_MMAP_THRESHOLD, 1 << 25):
            libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        libc.mallopt(_M_ARENA_MAX, 2)  # or every decoding thread keeps a heap of its own
