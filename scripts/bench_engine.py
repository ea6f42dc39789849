"""One training step inside the DeepSpeed engine: sampled sub-network / timm's model.

    python scripts/bench_engine.py

The first case of bench_step.py (vit_s d13 e384 h6 r3.5, 8 images) under ZeRO-2 on one rank (gloo on
a CPU, NCCL on a GPU; the script sets the rendezvous itself), ds_configs/vits.json with ImageNet
alone, without mixup and drop path. Theirs: timm's model of that size with torch.optim.AdamW
(fused=True) as DeepSpeed's client optimiser and the same ZeRO settings.

Floor: the same FLOPs, and in both the engine's copy of every gradient into its bucket and partition
(12 bytes an element): ours copies the supernet's 36.4 M elements, theirs 21.8 M: 0.18 GB more. Two
minutes.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import torch
from bench_common import arguments, interleave, ratio_line, start
from bench_step import DATASET, DECAY, IMAGES, LR, build_timm
from torch.nn import functional as F

from vimnas_ds.config import RunConfig, parse_config
from vimnas_ds.layout import Activation
from vimnas_ds.processes import end_process
from vimnas_ds.train.engine import build_engine
from vimnas_ds.train.ranks import start_ranks

GOAL = 1.00
FILE = Path(__file__).resolve().parents[1] / "ds_configs" / "vits.json"


def configuration() -> RunConfig:
    """The reference run's, reduced to what is timed."""
    raw = json.loads(FILE.read_text(encoding="utf-8"))
    raw["train_batch_size"] = IMAGES.batch
    datasets = raw["vimnas"]["data"]["datasets"]
    raw["vimnas"]["data"]["datasets"] = {
        DATASET: {**datasets[DATASET], "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}
    }
    raw["vimnas"]["model"]["drop_path"] = 0.0
    return parse_config(raw)


def main(argv: list[str] | None = None) -> int:
    args = arguments(__doc__).parse_args(argv)
    if args.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    config, ranks = configuration(), start_ranks()
    import deepspeed

    place = start(args)
    engine = build_engine(config, ranks)
    activation = Activation((IMAGES.arch,), DATASET, True)
    net = build_timm(IMAGES)
    trained = [p for p in net.parameters() if p.requires_grad]
    stock = torch.optim.AdamW(trained, lr=LR, weight_decay=DECAY, fused=True)
    settings = config.deepspeed_dict(1, has_gpu=args.device == "cuda")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    timm_engine, *_ = deepspeed.initialize(model=net, optimizer=stock, config=settings)
    x, y = IMAGES.inputs(place)

    def ours() -> None:
        loss = F.cross_entropy(engine.deepspeed(x, IMAGES.arch, DATASET).float(), y)
        engine.optimizer.activate(activation, LR, DECAY)
        engine.weight_step(loss)

    def theirs() -> None:
        timm_engine.backward(F.cross_entropy(timm_engine(x).float(), y))
        timm_engine.step()

    medians = interleave({"supernet": ours, "timm": theirs}, place)
    print(ratio_line("engine_vit_s", medians["supernet"] / medians["timm"], GOAL))
    return 0


if __name__ == "__main__":
    end_process(main())
