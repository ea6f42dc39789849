"""One optimiser step and one alpha step of a whole space on one clip: seconds and peak memory.

    python scripts/bench_vitl_step.py                       (vit_l, 64 frames, 224 x 224, fp32)
    python scripts/bench_vitl_step.py --checkpointing --dataset ssv2

The largest sub-network's step inside the DeepSpeed engine (ZeRO-2, one rank), then the superposed
network's. Random pixels: time and memory do not depend on them. Takes a minute or two and about
10 GiB on a CPU; prints `NAME seconds VALUE peak_gib VALUE`, one line a step.
"""

from __future__ import annotations

import argparse
import time

import torch

from vimnas_ds.config import load_config
from vimnas_ds.layout import Activation
from vimnas_ds.processes import end_process
from vimnas_ds.report.console import peak_memory
from vimnas_ds.train.alpha_step import AlphaLearner
from vimnas_ds.train.engine import build_engine
from vimnas_ds.train.ranks import start_ranks


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deepspeed_config", default="ds_configs/vitl.json", metavar="FILE")
    parser.add_argument("--dataset", default="k400", help="whose input and head to use")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--steps", type=int, default=1)
    args = parser.parse_args(argv)
    switch = str(args.checkpointing).lower()
    config = load_config(
        args.deepspeed_config,
        [
            "train_batch_size=1",
            "vimnas.data.imagenet.mixup=0",
            "vimnas.data.imagenet.cutmix=0",
            "vimnas.data.ssv2.mixup=0",
            f"vimnas.model.activation_checkpointing={switch}",
        ],
    )
    ranks = start_ranks()
    engine = build_engine(config, ranks)
    space, data = config.vimnas.search_space, config.vimnas.data.datasets[args.dataset]
    learner = AlphaLearner(space, config.vimnas.alpha, 0, ranks)
    frames = () if data.is_image else (data.frames or 1,)
    x = torch.randn(1, 3, *frames, data.size, data.size, device=ranks.device, dtype=engine.dtype)
    y = torch.zeros(1, dtype=torch.int64, device=ranks.device)
    print(
        f"{space.name}, {args.dataset}, checkpointing {switch}, {torch.get_num_threads()} threads"
    )
    print(f"built peak_gib {peak_memory() / 2**30:.2f}")
    for _ in range(args.steps):
        started = time.perf_counter()
        logits = engine.deepspeed(x, space.largest(), args.dataset)
        loss = torch.nn.functional.cross_entropy(logits.float(), y)
        activation = Activation((space.largest(),), args.dataset, data.is_image)
        engine.optimizer.activate(activation, config.vimnas.peak_lr, data.weight_decay)
        engine.weight_step(loss)
        _report("optimiser_step", started)
        started = time.perf_counter()
        learner.step(engine.net, x, y, args.dataset)
        _report("alpha_step", started)
    return 0


def _report(name: str, started: float) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    print(f"{name} seconds {seconds:.2f} peak_gib {peak_memory() / 2**30:.2f}", flush=True)


if __name__ == "__main__":
    end_process(main())
