"""AdamW on exactly the sampled sub-blocks, over ZeRO-2's flat fp32 partitions.

ZeRO-2 turns a missing gradient into zeros, and AdamW moves weights on zeros too (decay, momentum),
so this optimiser is told what is active and touches nothing else: unsampled weights and moments
keep their bits. Bias correction uses each cell's own number of updates n (a cell of the choice
grid has one history; see `vimnas_ds.layout`):

    w <- w (1 - lr wd);  m <- m + (1-b1)(g - m);  v <- b2 v + (1-b2) g^2
    w <- w - lr / (1-b1^n) * m / (sqrt(v) / sqrt(1-b2^n) + eps)

the arithmetic, and its order, of `torch.optim.AdamW` (single tensor): the tests compare bits with
the reference, and the compiled `sliced_adamw_` (csrc/adamw.cpp), which updates all rectangles of a
partition in one pass, within rounding. A moving average of the weights, where one is kept, moves in
the same step on the same rectangles (`vimnas_ds.ops.ema`).
Cost: 28 bytes moved per active element; counts are the same on all ranks, a few thousand numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from vimnas_ds.layout import Activation, ParamGrids
from vimnas_ds.ops._extension import usable
from vimnas_ds.ops.adamw import Rates, sliced_adamw_, sliced_adamw_ref_
from vimnas_ds.ops.boxes import as_rows, boxes_in_range, merge_cells
from vimnas_ds.ops.ema import ema_share, sliced_ema_


@dataclass(frozen=True)
class Fragment:
    """Elements param_start .. + numel of a parameter, at flat_start of a flat tensor."""

    name: str
    flat_start: int
    param_start: int
    numel: int


class SampledAdamW(torch.optim.Optimizer):
    """A DeepSpeed client optimiser: `bind_zero` after initialising, `activate` before each step.

    `named` are the supernet's parameters; those whose layout says so get weight decay. `fused`:
    the compiled update; by default wherever it is there.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        grids: ParamGrids,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fused: bool | None = None,
    ):
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        self._named = list(named)
        for name, parameter in self._named:
            (decayed if grids.grids[name].layout.decay else plain).append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": decayed, "decayed": True},
            {"params": plain, "decayed": False},
        ]
        defaults = {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0}
        super().__init__(groups, defaults)
        self.grids, self.fused = grids, fused
        self.ema_decay: float | None = None
        #: updates of every cell, by parameter name
        self.counts = {n: np.zeros(len(g), dtype=np.int64) for n, g in grids.grids.items()}
        #: this rank's pieces of every flat tensor, once bound
        self.fragments: dict[Tensor, list[Fragment]] = {}
        self._names: dict[Tensor, list[str]] = {}
        self._activation: Activation | None = None
        self._active_cells = lru_cache(maxsize=65536)(self._find_active)
        self._rows = lru_cache(maxsize=262144)(self._find_rows)

    # -- where parameters lie ---------------------------------------------------------------

    def bind_zero(self, engine: Any) -> None:
        """Learn the layout of the engine's flat partitions; before any checkpoint is loaded.

        The layout is read from DeepSpeed's internals, so it is proved: every fragment must equal
        the weights bit for bit. Raises RuntimeError otherwise.
        """
        zero = engine.optimizer
        by_name = {name: parameter for parameter, name in engine.param_names.items()}
        for flat, parameters in zip(
            zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True
        ):
            mapped = [(engine.param_names[p], p._hp_mapping) for p in parameters]
            fragments = [
                Fragment(
                    name,
                    m.hp_fragment_address.start,
                    m.lp_fragment_address.start,
                    m.hp_fragment_address.numel,
                )
                for name, m in mapped
                if m is not None
            ]
            for f in fragments:
                weights = by_name[f.name].detach().reshape(-1)
                weights = weights[f.param_start : f.param_start + f.numel].to(flat.dtype)
                held = flat.detach().view(-1)[f.flat_start : f.flat_start + f.numel]
                if not torch.equal(held, weights):
                    raise RuntimeError(
                        f"DeepSpeed's flat partition does not hold {f.name} where its map says: "
                        "this DeepSpeed version lays parameters out differently"
                    )
            self._bind(flat, fragments, [name for name, _ in mapped])

    def bind_plain(self) -> None:
        """Without DeepSpeed: every parameter is a flat tensor of its own."""
        for name, parameter in self._named:
            whole = Fragment(name, 0, 0, parameter.numel())
            self._bind(parameter, [whole], [name])

    def _bind(self, flat: Tensor, fragments: list[Fragment], names: list[str]) -> None:
        self.fragments[flat], self._names[flat] = fragments, names
        # eagerly: DeepSpeed links state for its checkpoints after the first group's step only
        self.state[flat] = {
            "step": 0,
            "exp_avg": torch.zeros_like(flat.detach()),
            "exp_avg_sq": torch.zeros_like(flat.detach()),
        }

    def start_ema(self, decay: float) -> None:
        """Keep a moving average of the weights from now on, from what they are now; after binding,
        before any checkpoint is loaded."""
        self.ema_decay = decay
        for flat in self._names:
            self.state[flat]["ema"] = flat.detach().clone()

    # -- what is active ---------------------------------------------------------------------

    def activate(self, activation: Activation, lr: float, weight_decay: float) -> None:
        """Say what the next step may touch, and its rates. The same on all ranks."""
        self._activation = activation
        for group in self.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decayed"] else 0.0

    def deactivate(self) -> None:
        """Forget the activation, so that a step without a new one is an error."""
        self._activation = None

    def _find_active(self, name: str, extents: tuple[tuple[int, ...], ...]) -> np.ndarray:
        return np.array(self.grids.grids[name].inside(extents))

    def active_cells(self, name: str) -> np.ndarray | None:
        """Mask over the parameter's cells, None when it is frozen as a whole."""
        assert self._activation is not None
        grid = self.grids.grids[name]
        extents = self._activation.extents(grid.layout, grid.head_dim)
        return self._active_cells(name, extents) if extents else None

    def _find_rows(
        self, fragment: Fragment, pattern: tuple[int | None, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rectangles (N, 4) of the fragment's flat tensor, and the number (N,) that `pattern` gives
        to the cells of each; None cells are left out, neighbours of one number joined."""
        grid = self.grids.grids[fragment.name]
        start, stop = fragment.param_start, fragment.param_start + fragment.numel
        rows: list[tuple[int, int, int, int]] = []
        numbers: list[int] = []
        for first, last, number in merge_cells(pattern, grid.counts_per_axis):
            low, high = grid.corner(first), grid.corner(last)
            for box in boxes_in_range(grid.layout.shape, low, high, start, stop):
                found = list(as_rows(box))
                rows += found
                numbers += [number] * len(found)
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        table[:, 0] += fragment.flat_start - start
        return table, np.array(numbers, dtype=np.int64)

    # -- the update -------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the active cells of `self.param_groups` (ZeRO calls this once per group)."""
        if closure is not None:
            raise ValueError("a closure is not supported")
        if self._activation is None:
            raise RuntimeError("activate() must say what is sampled before every step")
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is None:
                    continue
                for name in self._names[flat]:
                    active = self.active_cells(name)
                    if active is not None:
                        self.counts[name] += active
                self.state[flat]["step"] += 1
                self._update(group, flat)

    def _update(self, group: dict[str, Any], flat: Tensor) -> None:
        """All active rectangles of one flat tensor."""
        fused = usable(flat) and flat.dtype == torch.float32 if self.fused is None else self.fused
        lr, betas, state = group["lr"], group["betas"], self.state[flat]
        rows, rates = self._rated_rows(flat, partial(_bias_corrections, lr=lr, betas=betas))
        if not len(rows):
            return
        assert flat.grad is not None
        tensors = (flat.detach(), flat.grad, state["exp_avg"], state["exp_avg_sq"])
        update = sliced_adamw_ if fused else sliced_adamw_ref_
        update(tensors, rows, rates, lr, group["weight_decay"], betas, group["eps"])
        if self.ema_decay is not None:
            rows, shares = self._rated_rows(flat, partial(ema_share, decay=self.ema_decay))
            sliced_ema_(state["ema"], flat.detach(), rows, shares)

    def _rated_rows(
        self, flat: Tensor, rate: Callable[[int], Rates | float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The active rectangles (N, 4) of a flat tensor, and for each (N, ...) the `rate` of its
        number of updates; neighbours of one rate are joined."""
        all_rows, all_rates = [np.empty((0, 4), dtype=np.int64)], []
        for fragment in self.fragments[flat]:
            active = self.active_cells(fragment.name)
            if active is None:
                continue
            numbers: dict[Rates | float, int] = {}
            pattern = tuple(
                numbers.setdefault(rate(n), len(numbers)) if on else None
                for n, on in zip(self.counts[fragment.name].tolist(), active.tolist(), strict=True)
            )
            rows, which = self._rows(fragment, pattern)
            all_rows.append(rows)
            all_rates += [np.array(list(numbers))[which]]
        return np.concatenate(all_rows), np.concatenate(all_rates or [np.empty(0)])

    # -- state ------------------------------------------------------------------------------

    def counts_state(self) -> tuple[dict[str, Tensor], int]:
        """The cells' update counts, and the number of steps; the same on all ranks."""
        counts = {name: torch.from_numpy(count.copy()) for name, count in self.counts.items()}
        return counts, max(state["step"] for state in self.state.values())

    def whole(self, key: str) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's name and elementwise state `key`, put together in its shape on the
        device from the ranks that hold its parts; on all ranks. Collective: run it to its end."""
        held = {
            fragment.name: (fragment, self.state[flat][key])
            for flat, fragments in self.fragments.items()
            for fragment in fragments
        }
        for name, parameter in self._named:
            full = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
            if name in held:
                f, state = held[name]
                part = state.view(-1)[f.flat_start : f.flat_start + f.numel]
                full[f.param_start : f.param_start + f.numel] = part
            if dist.is_initialized():
                dist.all_reduce(full)
            yield name, full.view(parameter.shape)

    def forget(self) -> None:
        """Moments and counts as at the start."""
        for flat in self._names:
            self.state[flat]["step"] = 0
            self.state[flat]["exp_avg"].zero_()
            self.state[flat]["exp_avg_sq"].zero_()
        for count in self.counts.values():
            count[:] = 0

    def load_counts(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Raises ValueError when the counts are of another space."""
        for flat in self._names:
            self.state[flat]["step"] = updates
        for name, count in self.counts.items():
            if name not in state or len(state[name]) != len(count):
                raise ValueError(f"update counts of {name} do not fit this search space")
            count[:] = state[name].numpy()


@lru_cache(maxsize=4096)  # lr is another in every step: room for one step's numbers of updates
def _bias_corrections(n: int, lr: float, betas: tuple[float, float]) -> tuple[float, float]:
    """(step size, sqrt of the second correction) as float32 holds them: both stop changing after
    a few thousand updates, and cells of equal rates are updated together."""
    step_size = lr / (1 - betas[0] ** n)
    return float(np.float32(step_size)), float(np.float32(math.sqrt(1 - betas[1] ** n)))
