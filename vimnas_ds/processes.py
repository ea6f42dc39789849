"""How many processes share this machine, what one of them may use, how one ends (no torch)."""

from __future__ import annotations

import atexit
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn


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


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can still be used here: the machine's free memory, or what the limits of this
    process's control groups leave of it, cached file pages being free. Without Linux's files,
    2 GiB.

    Args:
        root: where `proc` and `sys` are.
    """
    info = root / "proc/meminfo"
    if not info.exists():
        return 2**31
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    return max(0, min([free, *_left_by_groups(root)]))


def _left_by_groups(root: Path) -> Iterator[int]:
    """What each limit leaves: of this process's group and those around it, version 2 and 1.

    In a container the group's own path may not be there; its limit then stands in the top folder.
    """
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = root / "sys/fs/cgroup", ("max", "current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (left := _left(folder, *names)) is not None:
                yield left


def _left(folder: Path, limit: str, used: str, cached: str) -> int | None:
    files = [folder / f"memory.{name}" for name in (limit, used, "stat")]
    if not all(file.exists() for file in files):
        return None
    most, now, stat = (file.read_text().strip() for file in files)
    if most == "max":
        return None
    pages = dict(line.split() for line in stat.splitlines())
    return int(most) - int(now) + int(pages.get(cached, 0))


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


def processor_name() -> str:
    """What the CPU calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def end_process(code: int) -> NoReturn:
    """End this process with `code`, without taking Python apart.

    A C++ thread that needs Python while it is taken apart aborts the process, and a run that is
    done would end with -6: gloo's, when it is the last to hold a collective's tensor (DeepSpeed
    keeps the group, and with it these threads, to the end), or a decoder's. Functions of `atexit`
    are called; files must have been closed and threads joined by whoever opened and started them.
    What cannot be written of the output makes 120 of 0, as in Python.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # None: closed before Python began
                stream.flush()
        except OSError as error:
            code = code or 120
            os.write(2, f"the end of the output is lost: {error}\n".encode())
    os._exit(code)
