"""Run by the launcher on 1, 2 or 3 ranks: save, load what other numbers of ranks saved, fail.

    checkpoint_cases.py save ROOT        train some steps, save; saves that must fail
    checkpoint_cases.py reload ROOT OUT  load ROOT's checkpoint on these ranks, save to OUT, go on

Every case prints one line `RESULT name {json}` on rank 0; the claims are checked by pytest.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.small import small_config
from vimnas_ds.config import parse_config
from vimnas_ds.layout import Activation
from vimnas_ds.processes import end_process
from vimnas_ds.train.alpha_step import AlphaLearner
from vimnas_ds.train.checkpoint import SaveFailed, load_checkpoint, save_checkpoint
from vimnas_ds.train.engine import Engine, build_engine
from vimnas_ds.train.ranks import gather_objects, start_ranks

BATCH, STEPS = 12, 4
ranks = start_ranks()
torch.set_num_threads(1)
config = parse_config(small_config(train_batch_size=BATCH))


def report(name: str, **values: object) -> None:
    if ranks.is_main:
        print("RESULT", name, json.dumps(values), flush=True)


def step(engine: Engine, number: int) -> float:
    """One step on a batch that is the same whatever the number of ranks; the mean loss."""
    rng, generator = random.Random(number), torch.Generator().manual_seed(number)
    dataset = ("imagenet", "k400")[number % 2]
    shape = (3, 32, 32) if dataset == "imagenet" else (3, 8, 32, 32)
    x = torch.randn(BATCH, *shape, generator=generator)
    y = torch.randint(0, 5, (BATCH,), generator=generator)
    share = slice(ranks.rank, BATCH, ranks.world_size)
    engine.net.eval()  # drop path draws differ by rank
    activation = Activation((engine.net.space.sample(rng),), dataset, dataset == "imagenet")
    logits = engine.deepspeed(x[share], activation.archs[0], dataset)
    loss = F.cross_entropy(logits.float(), y[share])
    engine.optimizer.activate(activation, 1e-2, 0.05)
    engine.weight_step(loss)
    losses = gather_objects(float(loss.detach()))
    return sum(losses) / len(losses)


def state_of(learner: AlphaLearner) -> dict:
    return {"learner": learner.state_dict(), "position": {"step": STEPS}, "odd": {3: (1.5, None)}}


def refusal(root: Path, engine: Engine, state: dict) -> list[str]:
    """What every rank says when a save fails."""
    try:
        save_checkpoint(root, 99, engine, state, ranks, keep=2)
    except SaveFailed as err:
        return gather_objects(str(err))
    return gather_objects("nothing failed")


engine = build_engine(config, ranks)
learner = AlphaLearner(engine.net.space, config.vimnas.alpha, 0, ranks)
mode, root, *out = (Path(a) for a in sys.argv[1:] if not a.startswith("--local_rank"))
if mode.name == "save":
    for number in range(STEPS):
        step(engine, number)
    state = state_of(learner)
    for number in (2, 3, STEPS):
        save_checkpoint(root, number, engine, state, ranks, keep=2, is_best=number == 2)
    report("kept", names=sorted(p.name for p in root.iterdir()))
    # rank 1's file may not become larger than this: the disk is full in the middle of it
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    full = refusal(root, engine, state)
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    read_only = refusal(Path("/sys/vimnas"), engine, state)
    report("failed", full=full, read_only=read_only, left=sorted(p.name for p in root.iterdir()))
    report("loss", value=step(engine, STEPS))
else:
    with torch.no_grad():  # nothing may be right by chance
        engine.set_weights({n: torch.full_like(p, 7.0) for n, p in engine.net.named_parameters()})
    state = load_checkpoint(root / f"step{STEPS:08d}", engine, ranks)
    learner.load_state_dict(state["learner"])
    save_checkpoint(out[0], STEPS, engine, state_of(learner), ranks, keep=2)
    report("odd", same=state["odd"] == {3: (1.5, None)})
    report("loss", value=step(engine, STEPS))
end_process(0)
