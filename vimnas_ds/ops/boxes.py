"""Rectangles of a shared parameter inside a flat piece of it, as strided views.

ZeRO flattens parameters and cuts the result among ranks, so a rank holds elements [a, b) of a
parameter of some shape, and a cell of the choice grid meets it in at most 2 ndim - 1 strided boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

#: (offset into the flattened parameter, shape, stride)
StridedBox = tuple[int, tuple[int, ...], tuple[int, ...]]
#: (low, high, value): a rectangle of cells or elements with one value
Rectangle = tuple[tuple[int, ...], tuple[int, ...], Any]


def boxes_in_range(
    shape: Sequence[int], low: Sequence[int], high: Sequence[int], start: int, stop: int
) -> Iterator[StridedBox]:
    """Boxes that cover the rectangle low..high of a contiguous `shape`, within flat [start, stop).

    The boxes are disjoint; together they are exactly the elements of both.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        first, last = max(start, low[0]), min(stop, high[0])
        if first < last:
            yield first, (last - first,), (1,)
        return
    inner = math.prod(shape[1:])
    first_row, last_row = -(-start // inner), stop // inner  # complete rows [first, last)
    if start % inner and low[0] <= (row := start // inner) < high[0]:
        end = min(inner, stop - row * inner)
        yield from _shifted(shape, low, high, start % inner, end, row * inner)
    begin, end = max(first_row, low[0]), min(last_row, high[0])
    if begin < end:
        yield _whole_rows(shape, low, high, begin, end)
    tail_in_new_row = stop % inner and last_row >= first_row
    if tail_in_new_row and low[0] <= last_row < high[0]:
        yield from _shifted(shape, low, high, 0, stop % inner, last_row * inner)


def _shifted(
    shape: Sequence[int], low: Sequence[int], high: Sequence[int], start: int, stop: int, base: int
) -> Iterator[StridedBox]:
    for offset, sizes, strides in boxes_in_range(shape[1:], low[1:], high[1:], start, stop):
        yield base + offset, sizes, strides


def _whole_rows(
    shape: Sequence[int], low: Sequence[int], high: Sequence[int], begin: int, end: int
) -> StridedBox:
    strides = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
    offset = begin * strides[0] + sum(lo * st for lo, st in zip(low[1:], strides[1:], strict=True))
    sizes = [end - begin, *(hi - lo for lo, hi in zip(low[1:], high[1:], strict=True))]
    while len(sizes) > 1 and sizes[-1] == strides[-2]:  # complete rows are one run
        sizes[-2:], strides = [sizes[-2] * sizes[-1]], [*strides[:-2], strides[-1]]
    return offset, tuple(sizes), tuple(strides)


def as_rows(box: StridedBox) -> Iterator[tuple[int, int, int, int]]:
    """A box of up to three axes as matrices: (offset, rows, columns, row stride)."""
    offset, sizes, strides = box
    if len(sizes) == 1:
        yield offset, 1, sizes[0], sizes[0]
    elif len(sizes) == 2:
        yield offset, sizes[0], sizes[1], strides[0]
    else:
        for k in range(sizes[0]):
            yield offset + k * strides[0], sizes[1], sizes[2], strides[1]


def merge_cells(values: Sequence[Any], counts: Sequence[int]) -> tuple[Rectangle, ...]:
    """Join neighbouring cells of equal value into rectangles of cell indices.

    `values` lists a grid of `counts` cells per axis, last axis fastest; None cells are left out.
    """
    if not counts:
        return () if values[0] is None else (((), (), values[0]),)
    size = len(values) // counts[0]
    bands = [merge_cells(values[i * size : (i + 1) * size], counts[1:]) for i in range(counts[0])]
    found: list[Rectangle] = []
    first = 0
    for band in range(1, counts[0] + 1):
        if band == counts[0] or bands[band] != bands[first]:
            found += [((first, *lo), (band, *hi), value) for lo, hi, value in bands[first]]
            first = band
    return tuple(found)
