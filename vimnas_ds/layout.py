"""What a sub-network activates of each shared parameter, as data (no torch).

Every parameter is seen as a block of up to three axes, and each axis is cut where a choice of the
space can end. A sub-network activates the leading `extents` of the block; a *cell*, a rectangle
between consecutive cuts, is therefore active as a whole or not at all, and all its elements share
one update history. Optimiser, exporter and checkpoint all read these layouts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vimnas_ds.space import Arch, SearchSpace

#: "all": never sliced; "embed": embed_dim; "heads": num_heads * head_dim; "qkv": three times that;
#: "hidden": MLP width
AxisKind = Literal["all", "embed", "heads", "qkv", "hidden"]
_PER_HEAD = {"heads": 1, "qkv": 3}
Extents = tuple[int, ...]


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter: what decides its width, and its full size."""

    kind: AxisKind
    size: int


@dataclass(frozen=True)
class ParamLayout:
    """One shared parameter. `layer` is its block (None outside the blocks), `dataset` the head's
    dataset, `video_only` true for tubes that images skip, `decay` whether weight decay applies."""

    axes: tuple[Axis, ...]
    layer: int | None = None
    dataset: str | None = None
    video_only: bool = False
    decay: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The block's full shape: a view of the parameter."""
        return tuple(axis.size for axis in self.axes)

    def extents(self, arch: Arch, head_dim: int) -> Extents | None:
        """Leading widths that `arch` uses, whatever the dataset; None if its layer is not there."""
        if self.layer is not None and self.layer >= arch.depth:
            return None
        return tuple(self._width(axis, arch, head_dim) for axis in self.axes)

    def _width(self, axis: Axis, arch: Arch, head_dim: int) -> int:
        if axis.kind == "all":
            return axis.size
        if axis.kind == "embed":
            return arch.embed_dim
        assert self.layer is not None
        if axis.kind in _PER_HEAD:
            return _PER_HEAD[axis.kind] * arch.num_heads[self.layer] * head_dim
        return arch.hidden_dim(self.layer)

    def cuts(self, space: SearchSpace) -> tuple[tuple[int, ...], ...]:
        """Per axis the positions at which a choice can end, ascending, the full size last."""
        return tuple(self._axis_cuts(axis, space) for axis in self.axes)

    def _axis_cuts(self, axis: Axis, space: SearchSpace) -> tuple[int, ...]:
        if axis.kind == "all":
            return (axis.size,)
        if axis.kind == "embed":
            return space.embed_dim
        assert self.layer is not None
        if axis.kind in _PER_HEAD:
            width = _PER_HEAD[axis.kind] * space.head_dim
            return tuple(h * width for h in space.num_heads[self.layer])
        return space.hidden_dims(self.layer)


@dataclass(frozen=True)
class Activation:
    """What one optimiser step touches: sub-networks (several under the sandwich rule) and a
    dataset. A parameter's active part is the union over `archs`."""

    archs: tuple[Arch, ...]
    dataset: str
    is_image: bool

    def extents(self, layout: ParamLayout, head_dim: int) -> tuple[Extents, ...]:
        """Leading widths per architecture that touches the parameter; empty when frozen."""
        if layout.dataset not in (None, self.dataset) or (layout.video_only and self.is_image):
            return ()
        found = (layout.extents(arch, head_dim) for arch in self.archs)
        return tuple(dict.fromkeys(e for e in found if e is not None))


class CellGrid:
    """The cells of one parameter: cell i spans `lows[i]` to `highs[i]` (one entry per axis)."""

    def __init__(self, layout: ParamLayout, space: SearchSpace):
        self.layout = layout
        self.head_dim = space.head_dim
        self.cuts = layout.cuts(space)
        bands = [list(zip((0, *c[:-1]), c, strict=True)) for c in self.cuts]
        self.counts_per_axis = tuple(len(b) for b in bands)
        cells = list(itertools.product(*bands))
        self.lows = [tuple(low for low, _ in cell) for cell in cells]
        self.highs = [tuple(high for _, high in cell) for cell in cells]

    def __len__(self) -> int:
        return len(self.lows)

    def corner(self, bands: tuple[int, ...]) -> tuple[int, ...]:
        """Element index at which a band starts, per axis (one past the last band: the end)."""
        return tuple((0, *cuts)[band] for band, cuts in zip(bands, self.cuts, strict=True))

    def inside(self, extents: tuple[Extents, ...]) -> list[bool]:
        """For every cell, whether one of the leading blocks `extents` contains it."""
        return [
            any(all(h <= e for h, e in zip(high, ext, strict=True)) for ext in extents)
            for high in self.highs
        ]


class ParamGrids:
    """The cell grids of all parameters of a supernet, by parameter name."""

    def __init__(self, layouts: Mapping[str, ParamLayout], space: SearchSpace):
        self.grids = {name: CellGrid(layout, space) for name, layout in layouts.items()}
        self.space = space
