"""The compiled operators against their Python references, in every dtype they take."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from vimnas_ds.ops._extension import available
from vimnas_ds.ops.adamw import sliced_adamw_, sliced_adamw_ref_
from vimnas_ds.ops.gates import weighted_layer_norm

ops = torch.ops.vimnas_ds
needs_extension = pytest.mark.skipif(not available(), reason="the extension is not built")


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def linear_arguments(dtype: torch.dtype, grad: bool = True) -> list[torch.Tensor]:
    shapes = ((2, 5, 7), (3, 8, 9), (3, 8))
    return [rand(*s, dtype=dtype).requires_grad_(grad) for s in shapes]


@needs_extension
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_accepts_the_linear_operators(dtype, gelu):
    x, weight, bias = linear_arguments(dtype, grad=False)
    y, pre = ops._sliced_linear(x, weight, bias, 6, gelu)
    torch.library.opcheck(ops._sliced_linear.default, (x, weight, bias, 6, gelu))
    arguments = (list(y.unbind(0)), x, weight, pre, True, True, True)
    torch.library.opcheck(ops._sliced_linear_backward.default, arguments)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_accepts_the_gates(dtype):
    x, weight, bias, mass = rand(6, 8, dtype=dtype), rand(8), rand(8), rand(8).abs().float() + 0.1
    norm = (x, mass, weight.to(dtype), bias.to(dtype), 1e-6)
    torch.library.opcheck(ops._gated_norm.default, norm)
    torch.library.opcheck(ops._gated_gelu.default, (x, mass))
    torch.library.opcheck(ops._head_gate.default, (x, mass[:4].clone()))
    torch.library.opcheck(ops._gated_gelu_backward.default, (x, x, mass))
    torch.library.opcheck(ops._head_gate_backward.default, (x, x, mass[:4].clone()))


@needs_extension
def test_gates_have_exact_gradients_and_equal_their_references():
    x, mass = rand(3, 4, 6).requires_grad_(), (rand(6).abs() + 0.2).requires_grad_()
    weight, bias = rand(6), rand(6) * 2
    heads = mass.detach()[:3].clone().requires_grad_()
    cases = (
        (lambda x, m: ops.gated_norm(x, m, weight, bias, 1e-3), mass),
        (ops.gated_gelu, mass),
        (ops.head_gate, heads),
    )
    for function, m in cases:
        assert torch.autograd.gradcheck(function, (x, m))
    wide = [t.detach().float() for t in (x, mass, weight, bias)]
    assert_close(ops.gated_norm(*wide, 1e-3), weighted_layer_norm(*wide, 1e-3))
    assert_close(ops.gated_gelu(x, mass), F.gelu(x, approximate="tanh") * mass)
    assert_close(ops.head_gate(x, heads), (x.view(3, 4, 3, 2) * heads[:, None]).flatten(-2))


@needs_extension
def test_bfloat16_is_as_exact_as_pytorchs_own():
    x, weight, bias = (t.detach() for t in linear_arguments(torch.float32))
    low = [t.bfloat16() for t in (x, weight, bias)]
    exact = [
        F.linear(low[0].float(), w[:6, :7].float(), b[:6].float())
        for w, b in zip(low[1], low[2], strict=True)
    ]
    theirs = [F.linear(low[0], w[:6, :7], b[:6]) for w, b in zip(low[1], low[2], strict=True)]
    ours = ops.sliced_linear(*low, 6)
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        error = (mine.float() - truth).abs().max()
        assert error <= 2 * (other.float() - truth).abs().max() + 1e-6


@needs_extension
def test_the_fused_adamw_equals_the_reference_and_touches_nothing_else():
    generator = torch.Generator().manual_seed(1)
    w, g, m = (torch.randn(40_000, generator=generator) for _ in range(3))
    v = torch.rand(40_000, generator=generator)
    rows = np.array([[5, 30, 313, 320], [21_000, 17, 300, 400], [39_000, 1, 999, 999]])
    rates = np.array([[1e-3, 0.03], [2e-3, 0.3], [1e-4, 0.9]])
    settings = (1e-3, 0.05, (0.9, 0.999), 1e-8)
    ours, theirs = copy.deepcopy((w, g, m, v)), copy.deepcopy((w, g, m, v))
    sliced_adamw_(ours, rows, rates, *settings)
    sliced_adamw_ref_(theirs, rows, rates, *settings)
    touched = torch.zeros(40_000, dtype=torch.bool)
    for offset, height, width, stride in rows.tolist():
        touched.as_strided((height, width), (stride, 1), offset).fill_(True)
    assert touched.sum() == 30 * 313 + 17 * 300 + 999
    for mine, reference, before in zip(ours, theirs, (w, g, m, v), strict=True):
        assert_close(mine, reference, rtol=1e-6, atol=1e-7)
        assert torch.equal(mine[~touched], before[~touched])
    assert (theirs[0] - w)[touched].abs().median() > 1e-5  # ten times the tolerance


@needs_extension
def test_wrong_inputs_are_refused_with_shapes_and_values():
    x, weight, bias = (t.detach() for t in linear_arguments(torch.float32))
    with pytest.raises(ValueError, match=r"block \(9, 7\) does not fit a weight of \(8, 9\)"):
        ops.sliced_linear(x, weight, bias, 9)
    with pytest.raises(ValueError, match="4 heads do not divide x"):
        ops.head_gate(x, torch.ones(4))
    with pytest.raises(ValueError, match="mass of 5 channels"):
        ops.gated_gelu(x, torch.ones(5))
    flat, rate = torch.zeros(10), torch.ones(1, 2, dtype=torch.float64)
    box = torch.tensor([[4, 2, 3, 5]])
    with pytest.raises(ValueError, match=r"box 0 .* is outside 10 elements"):
        ops.sliced_adamw_(flat, flat, flat, flat, box, rate, 1.0, 0.9, 0.999, 1e-8)


def test_without_the_extension_the_references_work_and_say_so_once():
    code = (
        "import logging, torch; logging.basicConfig(level='INFO')\n"
        "from vimnas_ds.ops.sliced_linear import sliced_linear\n"
        "x, w, b = torch.ones(2, 3), torch.ones(1, 4, 5), torch.zeros(1, 4)\n"
        "for _ in range(2): print(sliced_linear(x, w, b, 2)[0].sum().item())\n"
    )
    environment = {**os.environ, "VIMNAS_REFERENCE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["12.0", "12.0"]
    assert done.stderr.count("Python references") == 1
