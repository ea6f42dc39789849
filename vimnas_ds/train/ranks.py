"""Everything about processes: start them together, reduce over them, prove that they agree."""

from __future__ import annotations

import atexit
import datetime
import enum
import functools
import itertools
import operator
import os
import random
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vimnas_ds.processes import cores_per_process, keep_freed_memory

_CPU = torch.device("cpu")
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all of them, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


#: one process that has started nothing yet
ALONE = Ranks(0, 1, _CPU)


def has_gpu() -> bool:
    """Whether work goes to a GPU: there is one and DS_ACCELERATOR does not say cpu."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


#: minutes; a search's ranks wait for one another's whole evaluations, a training's for one step or
#: one save, and long before that its watch ends it (vimnas.faults)
SEARCH_TIMEOUT, TRAINING_TIMEOUT = 24 * 60, 4 * 60


def start_ranks(timeout_minutes: float = TRAINING_TIMEOUT, engine: bool = True) -> Ranks:
    """Join the process group: NCCL on GPUs, gloo on CPUs. Works with no launcher, as one rank.

    A process leaves gloo's at its end, if not before. NCCL's must only be left once all ranks are
    done: it waits for collectives that others may never join. DeepSpeed's engine keeps the group's
    threads even then: programs end by `processes.end_process`.

    `engine` is False for tools that use no DeepSpeed engine: they start without importing it, and
    one process starts no group at all.
    """
    gpu, world_size = has_gpu(), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else _CPU
    if gpu:
        torch.cuda.set_device(device)
    if not engine and world_size == 1:
        return Ranks(0, 1, device)
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not gpu:
        atexit.register(leave_ranks)
    backend, timeout = "nccl" if gpu else "gloo", datetime.timedelta(minutes=timeout_minutes)
    if not engine:
        dist.init_process_group(backend, timeout=timeout)
        return Ranks(dist.get_rank(), dist.get_world_size(), device)
    import deepspeed

    if not gpu:
        # its shared-memory operator is for inference only and needs a compiler at start-up
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def leave_ranks() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def settle_on_cpu(threads: int | None, ranks: Ranks) -> None:
    """On a CPU, give torch `threads`, or this process's share of the cores, and let it reuse
    freed memory. Before the model is built."""
    if ranks.device.type == "cpu":
        keep_freed_memory()
        torch.set_num_threads(threads or cores_per_process(ranks.world_size))


_ports_given: set[int] = set()


def free_port() -> int:
    """A TCP port of this machine that nothing listens on at the moment: another one at each call,
    and none that the kernel could give to a connection before it is used."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1000):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
            try:
                sock.bind(("", port))
            except OSError:
                continue
        if port not in _ports_given:
            _ports_given.add(port)
            return port
    raise OSError("none of 1,000 TCP ports from 20,000 to 32,000 is free")


class CannotStart(RuntimeError):
    """What other ranks cannot start with, in their words."""


def run_together(part: Callable[[], T], ranks: Ranks, within_timeout: bool = False) -> T:
    """part() on every rank; where it fails on one, no rank goes on.

    Ranks wait for the slowest as long as SEARCH_TIMEOUT, whatever the group's timeout is: one may
    be building an index for hours. Therefore no collective is used, but the store they met in;
    parts that take no longer than the group's timeout need no store, which a launcher may hold that
    is gone (torchrun).

    Raises what part() raises here, else CannotStart with what it raised elsewhere, and where.
    """
    if ranks.world_size == 1:
        return part()
    error: Exception | None = None
    try:
        value = part()
    except Exception as err:
        error = err
    problem = "" if error is None else str(error) or repr(error)
    problems = gather_objects(problem) if within_timeout else _exchange(problem, ranks)
    if error is not None:
        raise error
    found = {problem: rank for rank, problem in reversed([*enumerate(problems)]) if problem}
    if found:
        raise CannotStart("\n".join(f"rank {rank}: {problem}" for problem, rank in found.items()))
    return value


def rank_zero_decides(part: Callable[[], str], ranks: Ranks, within_timeout: bool = False) -> str:
    """What part() says on rank 0, on all ranks. As `run_together`."""
    said = run_together(lambda: part() if ranks.is_main else "", ranks, within_timeout)
    if ranks.world_size == 1:
        return said
    found: list[str] = gather_objects(said) if within_timeout else _exchange(said, ranks)
    return found[0]


_exchanges = itertools.count()


def _exchange(mine: str, ranks: Ranks) -> list[str]:
    """One text of every rank, in rank order."""
    store, number = dist.distributed_c10d._get_default_store(), next(_exchanges)
    texts, read = (
        [f"{what}/{number}/{rank}" for rank in range(ranks.world_size)] for what in ("text", "read")
    )
    timeout = datetime.timedelta(minutes=SEARCH_TIMEOUT)
    store.set(texts[ranks.rank], mine)
    store.wait(texts, timeout)
    found = [store.get(key).decode() for key in texts]
    store.set(read[ranks.rank], "")
    if ranks.is_main:  # the store may end with this process
        store.wait(read, timeout)
    return found


class Wish(enum.IntFlag):
    """What one rank asks all ranks to do once the step that is under way is done."""

    SAVE = 1
    STOP = 2  #: leave the step out, save, and end with a status that says: to be resumed


class StopAsked(Exception):
    """All ranks know that one was asked to stop: raised on all of them at the same place."""


class RanksDisagree(RuntimeError):
    """Ranks were about to train different things."""


def check_agreement(fingerprint: int, what: str, ranks: Ranks, wish: int = 0) -> int:
    """Raise RanksDisagree, naming the ranks, unless all hold the same 63-bit fingerprint.

    Returns the union of all ranks' wishes (63 bits), which then all know (see `Wish`).
    """
    if ranks.world_size == 1:
        return wish
    mine = torch.tensor([fingerprint, wish], dtype=torch.int64, device=ranks.device)
    seen = [torch.empty_like(mine) for _ in range(ranks.world_size)]
    dist.all_gather(seen, mine)
    values, wishes = (column.tolist() for column in torch.stack(seen).T)
    if len(set(values)) > 1:
        odd = [r for r, v in enumerate(values) if v != values[0]]
        raise RanksDisagree(f"{what}: ranks {odd} differ from rank 0 (this rank: {ranks.rank})")
    return functools.reduce(operator.or_, wishes)


def sum_over_ranks(value: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The sum over all ranks, in place."""
    if ranks.world_size > 1:
        dist.all_reduce(value)
    return value


def gather_objects(value: Any) -> list[Any]:
    """One object of every rank, in rank order."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
