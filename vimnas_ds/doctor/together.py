"""Processes that talk to one another, and DeepSpeed's engine around a tiny supernet."""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

from vimnas_ds.doctor.finding import SETUP, Finding, has_gpu


def collectives() -> list[Finding]:
    """Two processes sum over gloo; over NCCL as many as there are GPUs."""
    findings = [_sum("gloo", 2)]
    if not has_gpu():
        return [*findings, Finding("nccl", "skipped", "no GPU")]
    import torch

    return [*findings, _sum("nccl", torch.cuda.device_count())]


def _sum(backend: str, count: int) -> Finding:
    context = multiprocessing.get_context("fork")
    results: Any = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder).absolute()}/store"
        ranks = [
            context.Process(target=_rank, args=(backend, store, rank, count, results))
            for rank in range(count)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    wanted, found = count * (count + 1) / 2, []
    while not results.empty():
        found.append(results.get())
    if found == [wanted] * count:
        return Finding(backend, "ok", f"{count} process(es) summed")
    codes = [process.exitcode for process in ranks]
    told = f"{count} processes cannot sum: got {found}, exit codes {codes}"
    # what each does for itself: the interface that it takes
    return Finding(backend, "failed", told, f"export {backend.upper()}_SOCKET_IFNAME=lo")


def _rank(backend: str, store: str, rank: int, count: int, results: Any) -> None:
    import datetime

    import torch
    import torch.distributed as dist

    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=store,
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=30),
    )
    value = torch.tensor([rank + 1.0], device="cuda" if backend == "nccl" else "cpu")
    dist.all_reduce(value)
    results.put(value.item())
    dist.destroy_process_group()


def engine() -> list[Finding]:
    """One step of a nano supernet: what was sampled moves, what was not keeps its bits."""
    import torch
    from torch.nn import functional as F

    from vimnas_ds.config import parse_config
    from vimnas_ds.layout import Activation
    from vimnas_ds.train.engine import build_engine
    from vimnas_ds.train.ranks import start_ranks

    image = {"kind": "image", "num_classes": 3, "size": 32, "base_lr": 1e-2, "weight_decay": 0.1}
    config = parse_config(
        {
            "train_batch_size": 2,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 5000},
            "vimnas": {
                "output_dir": "unused",
                "space": "nano",
                "tokens": {"tubes": [{"kernel": [1, 8, 8], "stride": [1, 8, 8]}]},
                "data": {"datasets": {"one": image, "other": image}},
                "schedule": {"image_dataset": "one", "warmup": 0},
            },
        }
    )
    ranks = start_ranks()
    engine = build_engine(config, ranks)
    arch, before = config.vimnas.search_space.smallest(), engine.weights(keep=True)
    x = torch.randn(2, 3, 32, 32, device=ranks.device, dtype=engine.dtype)
    y = torch.tensor([0, 1], device=ranks.device)
    engine.optimizer.activate(Activation((arch,), "one", True), 1e-2, 0.1)
    engine.weight_step(F.cross_entropy(engine.deepspeed(x, arch, "one").float(), y))
    after = engine.weights(keep=True)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    right = "heads.one.weight" in moved and not {n for n in moved if n.startswith("heads.other")}
    told = f"one step on {ranks.device.type} in {engine.dtype}: "
    if right and engine.was_applied:
        return [Finding("deepspeed", "ok", told + "the sampled weights moved, no others")]
    return [Finding("deepspeed", "failed", f"{told}wrong weights moved: {sorted(moved)}", SETUP)]
