"""Prefix caching: what lies before the layer being perturbed is computed once.

Removing a choice of layer l changes nothing before layer l, so each batch's activations are kept
there and all removals of that decision, and the next decisions, go on from them:

    place     0 ---- 2l ---- 2l+1 ---- 2l+2 ----- 2 depth
    acts        embed_dim, num_heads[l], mlp_ratio[l], ...   depth (only mixes states that are kept)

Over L equal layers, every decision of c choices in the order as listed, c + 1 evaluations of 2L
branches each become at least the half behind the decision: 0.5, and, because embed_dim needs all
of them and every decision advances the states once, 0.52 to 0.54 (scripts/bench_perturb.py).

The logits are those of `Supernet.superposed`, by the same operations in the same order: on a CPU
bit for bit. Memory is bounded: batches beyond the budget start from their pixels, once for all the
candidates that are scored in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vimnas_ds.model.alphas import Probabilities, layer_of
from vimnas_ds.model.supernet import Superposed
from vimnas_ds.processes import available_memory, local_processes
from vimnas_ds.search.run import SearchRun
from vimnas_ds.search.scoring import DatasetForward
from vimnas_ds.space import SearchSpace

#: Share of the free memory that states may take unless told otherwise.
SHARE = 0.5

#: a dataset and the files of one batch of it
Batch = tuple[str, tuple[str, ...]]
#: decision -> probabilities as plain numbers, which compare without a device
Values = Mapping[str, tuple[float, ...]]


def free_budget(run: SearchRun) -> int:
    """Bytes for states: `SHARE` of the memory that pixels kept for evaluation leave free."""
    device = run.ranks.device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = available_memory() // local_processes(run.ranks.world_size)
    return int(SHARE * max(free - run.config.vimnas.data.cache_mb * 2**20, 0))


def place_of(name: str, depths: tuple[int, ...]) -> int:
    """Where a decision first acts (see `Superposed.place`); `depths` are those still open."""
    layer = layer_of(name)
    if layer is None:
        return 0 if name == "embed_dim" else 2 * depths[-1]
    return 2 * layer + name.startswith("mlp_ratio")


@dataclass(frozen=True)
class _Kept:
    state: Superposed
    made_with: Values  #: of the decisions that act before it

    @property
    def bytes(self) -> int:
        tensors = {id(t): t for t in (self.state.x, *self.state.ends.values())}
        return sum(t.nbytes for t in tensors.values())

    def leads_to(self, place: int, values: Values, depths: tuple[int, ...]) -> bool:
        """Whether the network at `place` can be computed from here."""
        at = self.state.place
        return (
            at <= place
            and all(values[name] == value for name, value in self.made_with.items())
            and all(depth in self.state.ends for depth in depths if 2 * depth <= at)
        )


class PrefixCache:
    """One state per batch, `budget` bytes in all, and one more for the batch in hand.

    Weights must not change between calls without a `clear`.
    """

    def __init__(self, run: SearchRun, budget: int):
        self.run, self.budget = run, budget
        self.clear()

    def clear(self) -> None:
        """Forget all states: the weights have changed."""
        self._kept: dict[Batch, _Kept] = {}
        self._used = 0
        self._latest: tuple[Batch, _Kept] | None = None

    def forward(self, name: str, before: Probabilities, after: Probabilities) -> DatasetForward:
        """`Supernet.superposed` under `after`, which differs from `before` in decision `name`
        alone; both on the CPU."""
        return partial(self._logits, evaluation=_Evaluation.of(self.run, name, before, after))

    def _logits(self, x: Tensor, *, dataset: str, evaluation: _Evaluation) -> Tensor:
        net, e = self.run.net, evaluation
        batch = dataset, self.run.evaluator.files
        found = self._find(batch, e)
        state = net.start(x) if found is None else found
        if found is None or state.place < e.place:
            state = net.advance(state, e.before, e.depths, e.place)
            self._keep(batch, _Kept(state, e.made_with))
        state = net.advance(state, e.after, e.depths_after, 2 * e.depths_after[-1])
        return net.finish(state, e.after, dataset)

    def _find(self, batch: Batch, e: _Evaluation) -> Superposed | None:
        """The state to go on from, if there is one; a state that leads nowhere is dropped."""
        if self._latest is not None and self._latest[0] == batch:
            latest = self._latest[1]
            if latest.leads_to(e.place, e.values, e.depths):
                return latest.state
        kept = self._kept.get(batch)
        if kept is None:
            return None
        if not kept.leads_to(e.place, e.values, e.depths):
            self._used -= self._kept.pop(batch).bytes
            return None
        return kept.state

    def _keep(self, batch: Batch, fresh: _Kept) -> None:
        """In place of the batch's earlier state; without room that one stays, to start from."""
        old = self._kept.get(batch)
        used = self._used + fresh.bytes - (0 if old is None else old.bytes)
        self._latest = None
        if used <= self.budget:
            self._kept[batch], self._used = fresh, used
        else:
            self._latest = batch, fresh


@dataclass(frozen=True)
class _Evaluation:
    """What one evaluation needs, for all its batches."""

    place: int  #: of the decision that is perturbed
    before: Probabilities
    after: Probabilities
    depths: tuple[int, ...]  #: of non-zero probability before
    depths_after: tuple[int, ...]
    values: Values  #: of `before`
    made_with: Values  #: the part of `values` that acts before `place`

    @classmethod
    def of(
        cls, run: SearchRun, name: str, before: Probabilities, after: Probabilities
    ) -> _Evaluation:
        values = {n: tuple(p.tolist()) for n, p in before.items()}
        space = run.net.space
        depths, depths_after = _open_depths(space, before), _open_depths(space, after)
        place = place_of(name, depths)
        return cls(
            place,
            {n: p.to(run.ranks.device) for n, p in before.items()},
            {n: p.to(run.ranks.device) for n, p in after.items()},
            depths,
            depths_after,
            values,
            {n: v for n, v in values.items() if n != "depth" and place_of(n, depths) < place},
        )


def _open_depths(space: SearchSpace, probabilities: Probabilities) -> tuple[int, ...]:
    shares = probabilities["depth"].tolist()
    return tuple(d for d, share in zip(space.depth, shares, strict=True) if share > 0)
