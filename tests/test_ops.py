"""The compiled operators against their Python references, in every dtype they take."""

from __future__ import annotations

import copy
import ctypes
import os
import subprocess
import sys
from pathlib import Path

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
    torch.library.opcheck(ops._gelu.default, (y,))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_accepts_the_gates(dtype):
    x, weight, bias, mass = rand(6, 8, dtype=dtype), rand(8), rand(8), rand(8).abs().float() + 0.1
    norm = (x, mass, weight.to(dtype), bias.to(dtype), 1e-6)
    torch.library.opcheck(ops._gated_norm.default, norm)
    stats = ops._gated_norm(*norm)[1]
    torch.library.opcheck(ops._gated_norm_backward.default, (x, x, mass, *norm[2:4], stats))
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


def gradients(function, inputs: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
    """Result and gradients of `function` of the inputs, all in float32."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    return [t.detach().float() for t in (y, *torch.autograd.grad(y, leaves, dy.to(y.dtype)))]


def mlp_of_slices(x, w1, b1, w2, b2):
    h = F.gelu(F.linear(x, w1[0, :150, :70], b1[0, :150]), approximate="tanh")
    return F.linear(h, w2[0, :70, :150], b2[0, :70])


def mlp_arguments() -> list[torch.Tensor]:
    shapes = ((2, 111, 70), (1, 160, 90), (1, 160), (1, 90, 160), (1, 90))
    return [rand(*s) * (0.1 if len(s) == 3 and s[0] == 1 else 1.0) for s in shapes]


@needs_extension
def test_mlp_has_exact_gradients_and_keeps_the_preactivations_alone():
    x, w1, _, w2, _ = arguments = mlp_arguments()
    shapes = ((2, 2, 5), (1, 6, 6), (1, 6), (1, 4, 7), (1, 4))
    small = [rand(*shape).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(lambda *a: ops.sliced_mlp(*a, 5, 3), small)
    dy = rand(2, 111, 70)
    ours = gradients(lambda *a: ops.sliced_mlp(*a, 150, 70), arguments, dy)
    for mine, reference in zip(ours, gradients(mlp_of_slices, arguments, dy), strict=True):
        assert_close(mine, reference)
    kept: list[int] = []
    leaves = [t.clone().requires_grad_() for t in arguments]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        ops.sliced_mlp(*leaves, 150, 70)
    assert sorted(kept) == sorted([x.numel(), w1.numel(), w2.numel(), 2 * 111 * 150])


@needs_extension
def test_bfloat16_is_as_exact_as_pytorchs_own():
    """Against float32 on the same values, errors stay within twice those of PyTorch's own bf16."""
    mass = rand(70).abs().float() + 0.2
    norm = [rand(70).bfloat16(), rand(70).bfloat16()]
    cases = {
        "linear": (
            lambda x, w, b: ops.sliced_linear(x, w, b, 80)[0],
            lambda x, w, b: F.linear(x, w[0, :80, :70], b[0, :80]),
            [rand(2, 111, 70), rand(1, 90, 75), rand(1, 90)],
        ),
        "linear, GELU": (
            lambda x, w, b: ops.sliced_linear(x, w, b, 80, True)[0],
            lambda x, w, b: F.gelu(F.linear(x, w[0, :80, :70], b[0, :80]), approximate="tanh"),
            [rand(2, 111, 70), rand(1, 90, 75), rand(1, 90)],
        ),
        "mlp": (lambda *a: ops.sliced_mlp(*a, 150, 70), mlp_of_slices, mlp_arguments()),
        "gated_gelu": (
            lambda x: ops.gated_gelu(x, mass),
            lambda x: F.gelu(x, approximate="tanh") * mass.to(x.dtype),
            [rand(2, 111, 70) * 3],
        ),
        "head_gate": (
            lambda x: ops.head_gate(x, mass[:7].clone()),
            lambda x: x * mass[:7].repeat_interleave(10).to(x.dtype),
            [rand(2, 111, 70) * 3],
        ),
        "gated_norm": (
            lambda x: ops.gated_norm(x, mass, *norm, 1e-6),
            lambda x: weighted_norm_in(x, mass, *norm),
            [rand(2, 111, 70) + 1],
        ),
    }
    for name, (ours, theirs, inputs) in cases.items():
        low = [t.bfloat16() for t in inputs]
        dy = torch.randn(ours(*low).shape, generator=torch.Generator().manual_seed(2)).bfloat16()
        exact = gradients(theirs, [t.float() for t in low], dy)
        pairs = zip(gradients(ours, low, dy), gradients(theirs, low, dy), exact, strict=True)
        for k, (mine, other, truth) in enumerate(pairs):
            error, allowed = ((t - truth).square().mean().sqrt() for t in (mine, other))
            assert 0 < error <= 2 * allowed, (name, k, error, allowed)


def weighted_norm_in(x, mass, weight, bias):
    """The gated norm computed throughout in x's dtype, as PyTorch's operators do it."""
    share, mass = (mass / mass.sum()).to(x.dtype), mass.to(x.dtype)
    centred = x - (x * share).sum(-1, keepdim=True)
    rstd = torch.rsqrt((centred.square() * share).sum(-1, keepdim=True) + 1e-6)
    return (centred * rstd * weight.to(x.dtype) + bias.to(x.dtype)) * mass


@needs_extension
def test_results_do_not_depend_on_layout_and_passes_not_on_threads():
    x, w1, b1, w2, b2 = (t.float() for t in mlp_arguments())
    strided = torch.empty(111, 2, 140).transpose(0, 1)[..., ::2].copy_(x)
    dy = rand(2, 111, 70).float()
    mass = rand(70).abs().float()
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                ops._gated_gelu_backward(dy.expand(9, -1, -1, -1), x.expand(9, -1, -1, -1), mass)
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))

    def function(*arguments):
        return ops.sliced_mlp(*arguments, 150, 70)

    flat = gradients(function, [x, w1, b1, w2, b2], dy)
    for mine, reference in zip(
        gradients(function, [strided, w1, b1, w2, b2], dy), flat, strict=True
    ):
        assert torch.equal(mine, reference)


@needs_extension
@pytest.mark.parametrize("rows", [1, 127, 128, 391])
def test_shared_products_equal_whole_ones_on_both_sides_of_their_threshold(rows):
    """q, k, v and their gradients in float32: threads share the rows from 64 a thread on."""
    x, weight, bias = rand(rows, 70).float(), rand(3, 90, 75).float(), rand(3, 90).float()
    dys = [rand(rows, 80).float() * k for k in (1, 2, 3)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        y = ops.sliced_linear(*leaves, 80)
        ours = [*y, *torch.autograd.grad(y, leaves, dys)]
    finally:
        torch.set_num_threads(threads)
    z = [
        F.linear(x.double(), weight[g, :80, :70].double(), bias[g, :80].double()) for g in range(3)
    ]
    exact = [*z, *torch.autograd.grad(z, leaves, [d.double() for d in dys])]
    for mine, truth in zip(ours, exact, strict=True):
        assert_close(mine, truth.float(), rtol=1e-5, atol=2e-4)
    assert ours[4][:, 80:].abs().sum() == 0
    assert ours[4][:, :, 70:].abs().sum() == 0


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc only")
def test_a_cpu_process_keeps_the_memory_that_it_frees():
    code = (
        "import resource, torch\n"
        "from vimnas_ds.processes import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(8):\n"
        "    before = faults(); x = [torch.ones(2**18) for _ in range(48)]; del x\n"
        "faulted = faults() - before; y = torch.ones(2**22)\n"
        "print(faulted, open('/proc/self/smaps').read().count(' hg'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    faulted, huge = map(int, done.stdout.split())
    assert faulted < 200  # of 12,288 pages, as many as glibc's defaults give back each time
    assert huge > 0  # memory advised to be of huge pages


@needs_extension
def test_gradients_of_gradients_are_refused():
    x, weight, bias = linear_arguments(torch.float32)
    mass = torch.ones(7, requires_grad=True)
    one = [weight[:1], bias[:1]]
    for y in (
        ops.sliced_linear(x, weight, bias, 6)[0],
        ops.sliced_mlp(x, *one, weight[:1], bias[:1], 8, 8),
        ops.gated_gelu(x, mass),
        ops.head_gate(x, mass),
        ops.gated_norm(x, mass, bias[0, :7].detach(), bias[0, :7].detach(), 1e-6),
    ):
        with pytest.raises(NotImplementedError, match="no double backward"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_of_extreme_values(dtype):
    inf = float("inf")
    x = torch.tensor(
        [[-inf, -1e30, -1e12, -25.0, -4.0, 0.0, 4.0, 25.0, 1e12, 1e30, inf, float("nan")]]
    )
    x, mass = x.to(dtype), torch.ones(12)
    y = ops._gelu(x)
    dx, dmass = ops._gated_gelu_backward(torch.ones_like(x), x, mass)
    exact = x.double().clamp(-30, 30).requires_grad_()
    z = F.gelu(exact, approximate="tanh")
    slope = torch.autograd.grad(z.sum(), exact)[0].to(dtype)
    inner = slice(1, 10)
    assert_close(
        y[:, 3:8],
        z[:, 3:8].detach().to(dtype),
        atol=1e-6,
        rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-6,
    )
    assert torch.equal(y[:, 8:11], x[:, 8:11])
    assert y[:, :3].abs().max() < 1e-30
    assert_close(
        dx[:, inner], slope[:, inner], atol=1e-6, rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-5
    )
    for nan in (y, dx, dmass[None]):
        assert nan[:, 11].isnan().all()


@needs_extension
def test_mass_gradients_are_summed_in_float32_under_bfloat16():
    x, dy = (rand(1, 2000, 8).bfloat16() * k for k in (1, 3))
    mass = rand(8).abs().float() + 0.1
    exact = (dy.double() * F.gelu(x.double(), approximate="tanh")).sum((0, 1))
    assert_close(ops._gated_gelu_backward(dy, x, mass)[1].double(), exact, rtol=1e-5, atol=1e-4)
    exact = (dy.double() * x.double()).sum((0, 1)).view(4, 2).sum(1)
    assert_close(
        ops._head_gate_backward(dy, x, mass[:4].clone())[1].double(), exact, rtol=1e-5, atol=1e-4
    )


@needs_extension
def test_mlp_gives_gradients_to_whatever_asks_for_them():
    arguments = [t.float() for t in mlp_arguments()]
    dy = rand(2, 111, 70).float()
    whole = gradients(lambda *a: ops.sliced_mlp(*a, 150, 70), arguments, dy)[1:]
    for wanted in ([0], [1], [2], [3], [4], [0, 3], [1, 4], [2, 3]):
        leaves = [t.clone().requires_grad_(k in wanted) for k, t in enumerate(arguments)]
        y = ops.sliced_mlp(*leaves, 150, 70)
        found = torch.autograd.grad(y, [leaves[k] for k in wanted], dy)
        for k, mine in zip(wanted, found, strict=True):
            assert torch.equal(mine, whole[k]), (wanted, k)


def test_torch_and_the_extension_share_one_openmp():
    code = (
        "import torch, vimnas_ds.ops._extension as e; e.available()\n"
        "torch.randn(400, 400) @ torch.randn(400, 400)\n"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 1, done.stdout


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="built with OpenMP on Linux alone")
def test_the_extension_is_built_with_openmp():
    """Without it `at::parallel_for` is a plain loop, and nothing but the time tells."""
    from vimnas_ds import _C

    assert b"GOMP_parallel" in Path(_C.__file__).read_bytes()


@needs_extension
def test_the_fused_adamw_equals_the_reference_and_touches_nothing_else():
    generator = torch.Generator().manual_seed(1)
    w, g, m = (torch.randn(140_000, generator=generator) for _ in range(3))
    v = torch.rand(140_000, generator=generator)
    rows = np.array([[5, 300, 213, 220], [71_000, 170, 300, 400], [139_000, 1, 999, 999]])
    rates = np.array([[1e-3, 0.03], [2e-3, 0.3], [1e-4, 0.9]])
    settings = (1e-3, 0.05, (0.9, 0.999), 1e-8)
    ours, theirs = copy.deepcopy((w, g, m, v)), copy.deepcopy((w, g, m, v))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):  # cut inside rows: the largest piece of work is 16,384 elements
            torch.set_num_threads(count)
            again = copy.deepcopy((w, g, m, v))
            sliced_adamw_(again, rows, rates, *settings)
            ours = again if count == 1 else ours
            assert all(map(torch.equal, again, ours))
    finally:
        torch.set_num_threads(threads)
    sliced_adamw_ref_(theirs, rows, rates, *settings)
    touched = torch.zeros(140_000, dtype=torch.bool)
    for offset, height, width, stride in rows.tolist():
        touched.as_strided((height, width), (stride, 1), offset).fill_(True)
    assert touched.sum() == 300 * 213 + 170 * 300 + 999
    for mine, reference, before in zip(ours, theirs, (w, g, m, v), strict=True):
        assert_close(mine, reference, rtol=1e-6, atol=1e-7)
        assert torch.equal(mine[~touched], before[~touched])
    assert (theirs[0] - w)[touched].abs().median() > 1e-5  # ten times the tolerance


@needs_extension
def test_wrong_inputs_are_refused_with_shapes_and_values():
    x, weight, bias = (t.detach() for t in linear_arguments(torch.float32))
    with pytest.raises(ValueError, match=r"block \(9, 7\) does not fit a weight of \(8, 9\)"):
        ops.sliced_linear(x, weight, bias, 9)
    with pytest.raises(ValueError, match=r"weight \[0, 8, 9\] has no group"):
        ops.sliced_linear(x, weight[:0], bias[:0], 8)
    norm = [bias[0, :7].contiguous()] * 2
    with pytest.raises(ValueError, match=r"statistics .* do not fit 10 rows"):
        ops._gated_norm_backward(x, x, torch.ones(7), *norm, torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"weights must be \(1, O, I\), got \[3, 8, 9\]"):
        ops.sliced_mlp(x, weight, bias, weight, bias, 8, 8)
    with pytest.raises(ValueError, match=r"block \(9, 7\) does not fit a weight of \(8, 9\)"):
        ops.sliced_mlp(x, weight[:1], bias[:1], weight[:1], bias[:1], 9, 8)
    with pytest.raises(ValueError, match=r"gradient .* does not fit x"):
        ops._head_gate_backward(x[:1], x, torch.ones(7))
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
