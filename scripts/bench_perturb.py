"""Perturbation selection: prefixes cached / every evaluation from the pixels.

    python scripts/bench_perturb.py                    (two minutes)

The whole search as scripts/perturb_select.py does it, order as listed, rule keep, no tuning: vit_t
(12 to 14 layers) on two batches of images in memory, 4 x 4 patches of 16 x 16 pixels. Both sides
must make the same decisions and give every sample the same loss, bit for bit; exit code 1 if not.

Floor: of a decision of layer l, only l and the layers behind it must be computed, for each of its
c + 1 evaluations: over L equal layers (L + 1) / 2L, 0.542 at 12 and 0.536 at 14. Between attention
and MLP as well, as here: (2L + 1) / 4L, 0.521 at 12. embed_dim acts from the first layer, so its
evaluations are whole on both sides, and every decision takes the kept states on by one branch: with
12 layers kept, 1,207 branches of 2,238, 0.539.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import torch
from bench_common import Place, arguments, interleave, ratio_line, start
from torch import Tensor

from vimnas_ds.data.batches import Batch
from vimnas_ds.data.joint import Loaders
from vimnas_ds.data.listing import Sample
from vimnas_ds.model.alphas import Alphas
from vimnas_ds.model.supernet import Supernet
from vimnas_ds.search.objective import parse_objective
from vimnas_ds.search.perturb import Decision, PerturbationSearch
from vimnas_ds.search.prefix import PrefixCache
from vimnas_ds.search.run import SearchRun
from vimnas_ds.search.scoring import EvaluationLog, Evaluations, Scored
from vimnas_ds.space import SPACES
from vimnas_ds.train.evaluate import Evaluator
from vimnas_ds.train.ranks import Ranks
from vimnas_ds.tubes import TokenGeometry, Tube

GOAL = 0.58
SPACE = SPACES["vit_t"]
TOKENS = TokenGeometry((Tube((1, 16, 16), (1, 16, 16)),), image_tube=0)
IMAGES, BATCHES, CLASSES = 8, 2, 10


class Memory(Evaluator):
    """The evaluator on random images in memory."""

    def __init__(self, place: Place):
        ranks = Ranks(0, 1, place.device)
        super().__init__(cast(Loaders, None), ranks, place.dtype, IMAGES, 0)  # nothing to load
        self._memory = [
            Batch(
                torch.randn(IMAGES, 3, 64, 64),
                torch.randint(CLASSES, (IMAGES,)),
                tuple(f"{batch}/{i}" for i in range(IMAGES)),
            )
            for batch in range(BATCHES)
        ]
        self.samples = [Sample(name, 0) for batch in self._memory for name in batch.names]

    def _batches(self, dataset: str, split: str) -> Iterator[Batch]:
        yield from self._memory


class Losses(EvaluationLog):
    """In place of a file: the loss of every sample in every evaluation."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def add(self, what: str, candidate: str, scored: Scored, costs: object) -> None:
        self.seen += [outcomes.loss for outcomes in scored.outcomes.values()]


class Side:
    """One whole search at each call; keeps the latest one's decisions and losses."""

    def __init__(self, run: SearchRun, budget: int | None):
        self.run, self.budget = run, budget
        self.decisions: list[Decision] = []
        self.losses: list[Tensor] = []

    def __call__(self) -> None:
        prefixes = None if self.budget is None else PrefixCache(self.run, self.budget)
        log = Losses()
        evaluations = Evaluations(self.run, log, parse_objective(None, ["imagenet"]))
        search = PerturbationSearch(evaluations, self.run.alphas, prefixes=prefixes)
        self.decisions, self.losses = list(search.decide_all(lambda: None)), log.seen


def main(argv: list[str] | None = None) -> int:
    args = arguments(__doc__, runs=5).parse_args(argv)
    place = start(args)
    evaluator = Memory(place)
    net = Supernet(SPACE, TOKENS, {"imagenet": CLASSES}).to(place.device, place.dtype).eval()
    run = SimpleNamespace(  # what a search reads of a run
        net=net,
        evaluator=evaluator,
        ranks=evaluator.ranks,
        alphas=Alphas(SPACE, 0.3, torch.Generator().manual_seed(0)).state_dict(),
        data=SimpleNamespace(splits={"imagenet": {"select": evaluator.samples}}),
        map_over_ranks=lambda function, items: list(function(items)),
    )
    plain, cached = (Side(cast(SearchRun, run), budget) for budget in (None, 2**30))
    medians = interleave({"from the pixels": plain, "prefixes cached": cached}, place, warmup=0)
    same = plain.decisions == cached.decisions and all(
        torch.equal(a, b) for a, b in zip(plain.losses, cached.losses, strict=True)
    )
    depth = next(int(d.kept) for d in cached.decisions if d.name == "depth")
    print(
        f"  {len(cached.decisions)} decisions, {len(cached.losses)} evaluations, {depth} layers "
        f"kept; decisions and losses {'equal' if same else 'differ'}"
    )
    print(
        ratio_line("perturb_prefix", medians["prefixes cached"] / medians["from the pixels"], GOAL)
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
