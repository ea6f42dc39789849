"""The machine: memory, shared memory, open files, clock, the disk that a run writes to."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

from vimnas_ds.doctor.finding import Finding, State
from vimnas_ds.processes import available_memory, processor_name

GB, BLOCK = 1e9, 2**26


def memory() -> list[Finding]:
    """Free memory, shared memory, open files; nothing of it stops a run by itself."""
    cores, free = len(os.sched_getaffinity(0)), available_memory()
    state: State = "ok" if free > 4 * GB else "slow"
    told = f"{free / GB:.1f} GB free, {cores} cores of {processor_name()}"
    mend = "" if state == "ok" else "end other programs: batches ahead take a quarter of it"
    return [Finding("memory", state, told, mend, False), _shared(), _files()]


def _shared() -> Finding:
    place = Path("/dev/shm")
    if not place.exists():
        return Finding("shared memory", "missing", "no /dev/shm: NCCL needs it", required=False)
    size = shutil.disk_usage(place).total
    if size >= GB:
        return Finding("shared memory", "ok", f"/dev/shm has {size / GB:.1f} GB")
    told = f"/dev/shm has {size / 1e6:.0f} MB: too little for NCCL between GPUs"
    return Finding("shared memory", "slow", told, "docker run --shm-size=8g ...", required=False)


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= 4096 or soft == resource.RLIM_INFINITY:
        return Finding("open files", "ok", f"{soft} at once")
    return Finding("open files", "slow", f"{soft} at once", f"ulimit -n {hard}", required=False)


def disk(folder: Path) -> list[Finding]:
    """Speed of 64 MiB written to disk where runs are written, and that disk's clock."""
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
    try:
        with tempfile.NamedTemporaryFile(dir=place) as file:
            data = os.urandom(BLOCK)
            started, clock = time.perf_counter(), time.time()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            speed = BLOCK / (time.perf_counter() - started)
            late = Path(file.name).stat().st_mtime - clock
    except OSError as err:
        mend = "--set vimnas.output_dir=ANOTHER"
        return [Finding("disk", "failed", f"{place} cannot be written: {err}", mend)]
    free = shutil.disk_usage(place).free
    told = f"{place}: {speed / 1e6:.0f} MB/s with fsync, {free / GB:.1f} GB free"
    mend = "" if speed > 1e8 else "--set vimnas.output_dir=FASTER, or a larger checkpoint.every"
    state: State = "ok" if speed > 1e8 else "slow"
    return [Finding("disk", state, told, mend, required=False), _clock(late, BLOCK / speed)]


def _clock(late: float, took: float) -> Finding:
    """`late`: the file's time after this machine's clock; `took`: what writing it took."""
    off = max(-late, late - took, 0.0)
    told = time.strftime("%Y-%m-%d %H:%M:%S %z")
    if off > 5:
        told += f": {off:.0f} s away from the disk's clock"
        return Finding("clock", "failed", told, "timedatectl set-ntp true", required=False)
    return Finding("clock", "ok", told)
