"""What each kernel has to satisfy, on a library built from its own source."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.cuda.host import (
    Library,
    assert_guards_hold,
    assert_near,
    assert_sums_near,
    leaf,
    masses,
    random,
    unwritten,
)


@dataclass(frozen=True)
class Case:
    """A matrix; `shift` moves it off 16-byte alignment, `pad` lengthens the rows of dy."""

    rows: int
    cols: int
    shift: int = 0
    pad: int = 0


CASES = (
    Case(5, 24),
    Case(70, 264, pad=8),  # more than one block along rows and columns
    Case(9, 40, pad=3),  # vectors would fit the columns, but not the row distance
    Case(7, 40, shift=1),
    Case(3, 37),
    Case(2, 4),
    Case(1, 1),
)


def check_gelu(lib: Library, case: Case, dtype: torch.dtype) -> None:
    x = random(case.rows, case.cols, dtype=dtype, shift=case.shift)
    y = unwritten(case.rows, case.cols, dtype=dtype)
    lib.call("host_gelu", int(dtype is torch.bfloat16), x, y, x.numel())
    assert_near(y, F.gelu(x.double(), approximate="tanh"), dtype)
    assert_guards_hold(y)


def check_gelu_backward(lib: Library, case: Case, dtype: torch.dtype) -> None:
    """dy between longer rows -> dpre and db, which is zero beyond the block's columns."""
    rows, cols, wide = case.rows, case.cols, int(dtype is torch.bfloat16)
    total = cols + 5
    whole = random(rows, cols + case.pad, dtype=dtype, shift=case.shift)
    pre = random(rows, cols, dtype=dtype, seed=1)
    dpre = unwritten(rows, cols, dtype=dtype)
    blocks = lib.number("host_column_blocks", rows, cols)
    partial = unwritten(blocks, cols, dtype=torch.float32)
    db = unwritten(1, total, dtype=dtype)
    ld = cols + case.pad
    lib.call("host_gelu_backward", wide, whole, ld, pre, dpre, partial, rows, cols)
    lib.call("host_finish_bias", wide, partial, blocks, 1, cols, db, total)
    reference = leaf(pre)
    F.gelu(reference, approximate="tanh").backward(whole[:, :cols].double())
    assert_near(dpre, reference.grad, dtype)
    assert_near(db[0, :cols], reference.grad.sum(0), dtype)
    assert torch.equal(db[0, cols:], torch.zeros(5, dtype=dtype))
    assert_guards_hold(dpre, partial, db)


def check_bias_gradient(lib: Library, case: Case, dtype: torch.dtype) -> None:
    """Three groups whose sums are finished together."""
    rows, cols, wide = case.rows, case.cols, int(dtype is torch.bfloat16)
    total = cols + 3
    groups = [
        random(rows, cols + case.pad, dtype=dtype, shift=case.shift, seed=g) for g in range(3)
    ]
    blocks = lib.number("host_column_blocks", rows, cols)
    partial = unwritten(3, blocks, cols, dtype=torch.float32)
    db = unwritten(3, total, dtype=dtype)
    for dy, sums in zip(groups, partial, strict=True):
        lib.call("host_bias_gradient", wide, dy, cols + case.pad, sums, rows, cols)
    lib.call("host_finish_bias", wide, partial, blocks, 3, cols, db, total)
    expected = torch.stack([dy[:, :cols].double().sum(0) for dy in groups])
    assert_near(db[:, :cols], expected, dtype)
    assert not db[:, cols:].any()
    assert_guards_hold(partial, db)


def check_gate(
    lib: Library, case: Case, dtype: torch.dtype, name: str, heads: int | None = None
) -> None:
    """gated_gelu, or head_gate when there are heads, forward and backward."""
    rows, cols, wide = case.rows, case.cols, int(dtype is torch.bfloat16)
    x = random(rows, cols, dtype=dtype, shift=case.shift)
    dy = random(rows, cols, dtype=dtype, seed=1)
    mass = masses(heads or cols)
    y, dx = (unwritten(rows, cols, dtype=dtype) for _ in range(2))
    dmass = unwritten(mass.numel(), dtype=torch.float32)
    partial = unwritten(lib.number("host_column_blocks", rows, cols), cols, dtype=torch.float32)
    size = (rows, heads, cols // heads) if heads else (rows, cols)
    lib.call(f"host_{name}", wide, x, mass, y, *size)
    lib.call(f"host_{name}_backward", wide, dy, x, mass, dx, partial, dmass, *size)
    reference_x, reference_mass = leaf(x), leaf(mass)
    if heads:
        expected = reference_x * reference_mass.repeat_interleave(cols // heads)
    else:
        expected = F.gelu(reference_x, approximate="tanh") * reference_mass
    expected.backward(dy.double())
    assert_near(y, expected.detach(), dtype)
    assert_near(dx, reference_x.grad, dtype)
    assert_sums_near(dmass, reference_mass.grad)
    assert_guards_hold(y, dx, partial, dmass)


def check_gated_gelu(lib: Library, case: Case, dtype: torch.dtype) -> None:
    check_gate(lib, case, dtype, "gated_gelu")


def check_head_gate(lib: Library, case: Case, dtype: torch.dtype) -> None:
    heads = max(h for h in (1, 3, 4, 37) if case.cols % h == 0 and h < max(case.cols, 2))
    check_gate(lib, case, dtype, "head_gate", heads)


def check_gated_norm(lib: Library, case: Case, dtype: torch.dtype) -> None:
    """Against the definition in float64; the mass's gradient goes through the statistics too."""
    rows, cols, wide = case.rows, case.cols, int(dtype is torch.bfloat16)
    x = random(rows, cols, dtype=dtype, shift=case.shift)
    x.add_(3)  # a mean far from zero
    dy = random(rows, cols, dtype=dtype, seed=1)
    weight, bias = (random(cols, dtype=dtype, seed=s) for s in (2, 3))
    mass = masses(cols)
    y, dx = (unwritten(rows, cols, dtype=dtype) for _ in range(2))
    stats = unwritten(rows, 2, dtype=torch.float32)
    dmass = unwritten(cols, dtype=torch.float32)
    blocks = lib.number("host_norm_blocks", rows)
    partial = unwritten(blocks, cols, dtype=torch.float32)
    lib.call("host_gated_norm", wide, x, mass, weight, bias, y, stats, rows, cols, 1e-2)
    lib.call(
        "host_gated_norm_backward",
        *(wide, dy, x, mass, weight, bias, stats, dx, partial, dmass, rows, cols),
    )
    reference_x, reference_mass = leaf(x), leaf(mass)
    expected = norm_in_double(reference_x, reference_mass, weight, bias, 1e-2)
    expected.backward(dy.double())
    assert_near(y, expected.detach(), dtype)
    assert_near(dx, reference_x.grad, dtype)
    assert_sums_near(dmass, reference_mass.grad)
    assert_guards_hold(y, dx, stats, partial, dmass)


def norm_in_double(x: Tensor, mass: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    share = mass / mass.sum()
    mean = (x * share).sum(-1, keepdim=True)
    var = ((x - mean).square() * share).sum(-1, keepdim=True)
    return mass * ((x - mean) * torch.rsqrt(var + eps) * weight.double() + bias.double())


#: offset, rows, cols, row stride
BOXES = {
    "vectors": [(8, 9, 40, 64), (1000, 1, 4096, 4096), (5200, 3, 4, 12), (5300, 2, 400, 500)],
    "row distance of 61": [(0, 5, 32, 61), (400, 2, 4, 61)],
    "odd": [(3, 4, 37, 50), (300, 1, 1, 1), (301, 1, 1500, 1500)],
    "an empty box": [(0, 0, 8, 8), (8, 2, 8, 12), (40, 3, 0, 8), (64, 2, 4, 4)],
}


def check_adamw(lib: Library, boxes: str, shift: int = 0) -> None:
    """Every box at its own rates; nothing outside the boxes changes by a bit."""
    layout = BOXES[boxes]
    size = 6500
    w, g, m, v = (random(size, seed=s, shift=shift if s == 2 else 0) for s in range(4))
    v.abs_()
    before = [t.clone() for t in (w, g, m, v)]
    steps = range(1, len(layout) + 1)
    rates = torch.tensor(
        [[1e-2 / (1 - 0.9**n), math.sqrt(1 - 0.999**n)] for n in steps], dtype=torch.float64
    )
    lib.call(
        "host_adamw",
        *(w, g, m, v, torch.tensor(layout), rates, len(layout)),
        *(1 - 1e-2 * 0.05, 0.9, 0.999, 1e-8),
    )
    expected = [t.double() for t in before]
    touched = torch.zeros(size, dtype=torch.bool)
    for (offset, rows, cols, stride), (step_size, correction) in zip(layout, rates, strict=True):
        box = [t.as_strided((rows, cols), (stride, 1), offset) for t in (*expected, touched)]
        box[2].mul_(0.9).add_(0.1 * box[1])
        box[3].mul_(0.999).add_(0.001 * box[1].square())
        box[0].mul_(1 - 1e-2 * 0.05)
        box[0].sub_(step_size * box[2] / (box[3].sqrt() / correction + 1e-8))
        box[4].fill_(True)
    for new, old, want in zip((w, g, m, v), before, expected, strict=True):
        torch.testing.assert_close(new.double(), want, rtol=2e-5, atol=2e-6)
        assert torch.equal(new[~touched], old[~touched])
    assert_guards_hold(w, m, v)


def check_zero_outside(lib: Library, out: int, in_: int, dtype: torch.dtype) -> None:
    """Everything but the block becomes zero; the block keeps what the product wrote."""
    dw = random(3, 9, 11, dtype=dtype)
    expected = torch.zeros_like(dw)
    expected[:, :out, :in_] = dw[:, :out, :in_]
    lib.call("host_zero_outside", dw, 3, 9, 11, out, in_, dw.element_size())
    assert torch.equal(dw, expected)
    assert_guards_hold(dw)


MATRIX_CHECKS = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_gelu,
        check_gelu_backward,
        check_bias_gradient,
        check_gated_gelu,
        check_head_gate,
        check_gated_norm,
    )
}
