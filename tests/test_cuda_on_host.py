"""The CUDA sources, compiled by g++ and run on the CPU, against torch.

`csrc/cuda/cuda_on_host.h` runs every CUDA thread as a fiber, warps in a chosen order, with shared
memory full of NaN; `tests/cuda/lt_on_host.cpp` stands in for cuBLASLt. Matrices lie between guards
of NaN, so that an access out of bounds shows. At the end, the test of the tests: each of a list of
bugs, put into a copy of the sources, has to be noticed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vimnas_ds.ops.gates import weighted_layer_norm

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
KERNELS = ROOT / "tests" / "cuda" / "kernels_on_host.cpp"
STAND_IN = ROOT / "tests" / "cuda" / "lt_on_host.cpp"
GUARD = 2048  # elements on either side of a guarded tensor

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


class HostError(Exception):
    """A kernel on the host broke a rule: a barrier, a mask, an alignment."""


# ------------------------------------------------------------------------------ building, calling
def compile_shared(source: Path, target: Path, *flags: str) -> None:
    command = ["g++", "-std=c++20", "-fPIC", "-shared", *flags, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def compile_kernels(sources: Path, target: Path, *flags: str) -> None:
    compile_shared(KERNELS, target, f"-I{sources}", "-Wno-unknown-pragmas", *flags)


def as_argument(value: Tensor | int | float | None) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(None) if value is None else ctypes.c_int64(value)


class Library:
    """Functions of a shared object; a non-zero result raises HostError with its message."""

    def __init__(self, path: Path, error: str):
        self._library = ctypes.CDLL(str(path))
        self._error = getattr(self._library, error)
        self._error.restype = ctypes.c_char_p

    def number(self, name: str, *values: Tensor | int | None) -> int:
        return getattr(self._library, name)(*map(as_argument, values))

    def call(self, name: str, *values: Tensor | int | float | None) -> None:
        if self.number(name, *values):
            raise HostError(self._error().decode())


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Library:
    target = tmp_path_factory.mktemp("kernels") / "kernels.so"
    compile_kernels(SOURCES, target, "-O1", "-fsanitize=undefined", "-fno-sanitize=vptr")
    return Library(target, "host_error")


# ----------------------------------------------------------------------------------- test tensors
def guarded(tensor: Tensor, shift: int = 0) -> Tensor:
    """A copy between guards of NaN, 16-byte aligned unless shifted by some elements."""
    memory = torch.full((tensor.numel() + 2 * GUARD + 16,), math.nan, dtype=tensor.dtype)
    start = GUARD
    while (memory.data_ptr() + start * memory.element_size()) % 16:
        start += 1
    start += shift
    inside = memory[start : start + tensor.numel()].view(tensor.shape)
    inside.copy_(tensor)
    return inside


def unwritten(*shape: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
    return guarded(torch.full(shape, math.nan, dtype=dtype), shift)


def assert_guards_hold(*tensors: Tensor) -> None:
    for tensor in tensors:
        before, after = tensor.storage_offset(), tensor.storage_offset() + tensor.numel()
        memory = tensor.new_empty(0).set_(tensor.untyped_storage())
        assert memory[:before].isnan().all(), "something wrote below the tensor"
        assert memory[after:].isnan().all(), "something wrote beyond the tensor"


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    rtol, atol = (2e-5, 2e-5) if dtype is torch.float32 else (1e-2, 1e-2)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


def assert_sums_near(actual: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().clamp(min=1).item()
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-5 * scale)


def random(
    *shape: int, dtype: torch.dtype = torch.float32, shift: int = 0, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return guarded(torch.randn(shape, generator=generator).to(dtype), shift)


def masses(count: int) -> Tensor:
    """Falling masses as a superposed width has them, with zeros at the end."""
    return guarded(torch.linspace(1.0, -0.1, count).clamp(min=0.0))


def leaf(tensor: Tensor) -> Tensor:
    return tensor.double().detach().clone().requires_grad_()


# ---------------------------------------------------------------- what each kernel has to satisfy
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


# ---------------------------------------------------------------------------------------- kernels
@pytest.fixture(params=["fwd", "rev", "7"])
def warp_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which warp runs first; kernels have to give the same in every order."""
    monkeypatch.setenv("CUHOST_ORDER", request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", MATRIX_CHECKS)
def test_kernel_agrees_with_torch(
    kernels: Library, warp_order: str, name: str, case: Case, dtype: torch.dtype
) -> None:
    MATRIX_CHECKS[name](kernels, case, dtype)


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("boxes", BOXES)
def test_adamw_updates_its_boxes_and_nothing_else(
    kernels: Library, warp_order: str, boxes: str, shift: int
) -> None:
    check_adamw(kernels, boxes, shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("out", "in_"), [(4, 5), (9, 5), (4, 11), (9, 11)])
def test_everything_outside_the_block_is_zeroed(
    kernels: Library, out: int, in_: int, dtype: torch.dtype
) -> None:
    check_zero_outside(kernels, out, in_, dtype)


def test_the_norm_of_the_reference_is_the_one_of_the_kernel(kernels: Library) -> None:
    x, weight, bias, mass = random(4, 48), random(48, seed=1), random(48, seed=2), masses(48)
    y, stats = unwritten(4, 48, dtype=torch.float32), unwritten(4, 2, dtype=torch.float32)
    kernels.call("host_gated_norm", 0, x, mass, weight, bias, y, stats, 4, 48, 1e-6)
    assert_near(y, weighted_layer_norm(x, mass, weight, bias, 1e-6), torch.float32)


def test_gelu_of_extreme_values(kernels: Library) -> None:
    x = guarded(torch.tensor([-1e4, -50.0, -10.0, 0.0, 10.0, 50.0, 1e4, -0.0]))
    dy = guarded(torch.ones(1, 8))
    y, dx = unwritten(8, dtype=torch.float32), unwritten(8, dtype=torch.float32)
    partial = unwritten(1, 8, dtype=torch.float32)
    kernels.call("host_gelu", 0, x, y, 8)
    kernels.call("host_gelu_backward", 0, dy, 8, x, dx, partial, 1, 8)
    assert_near(y, F.gelu(x.double(), approximate="tanh"), torch.float32)
    assert_near(dx, torch.tensor([0, 0, 0, 0.5, 1, 1, 1, 0.5]), torch.float32)


def test_no_rows_give_zero_sums(kernels: Library) -> None:
    partial, db = unwritten(1, 8, dtype=torch.float32), unwritten(1, 8, dtype=torch.float32)
    kernels.call("host_bias_gradient", 0, random(1, 8), 8, partial, 0, 8)
    kernels.call("host_finish_bias", 0, partial, 1, 1, 8, db, 8)
    assert not db.any()


# --------------------------------------------------------------------------------------- cuBLASLt
def cublaslt_flags() -> list[str]:
    """Include flags for cublasLt.h and the toolkit's headers; skips where either is missing."""
    spec = importlib.util.find_spec("nvidia")
    locations = (spec and spec.submodule_search_locations) or []
    packaged = [h.parent for base in locations for h in Path(base).glob("*/include/cublasLt.h")]
    nvcc = shutil.which("nvcc")
    toolkits = [Path("/usr/local/cuda"), *([Path(nvcc).resolve().parents[1]] if nvcc else [])]
    installed = [t / "include" for t in toolkits if (t / "include" / "crt").is_dir()]
    found = [*installed[:1], *packaged[:1]]
    if not any((directory / "cublasLt.h").exists() for directory in found):
        pytest.skip("cublasLt.h is not installed")
    if not any((directory / "crt").is_dir() for directory in found):
        pytest.skip("the CUDA toolkit's headers are not installed")
    return [f"-isystem{directory}" for directory in found]


@pytest.fixture(scope="session")
def cublaslt(tmp_path_factory: pytest.TempPathFactory) -> Library:
    target = tmp_path_factory.mktemp("lt") / "lt.so"
    compile_shared(STAND_IN, target, "-O1", f"-I{SOURCES}", *cublaslt_flags())
    return Library(target, "lt_error")


@dataclass(frozen=True)
class Block:
    rows: int
    out: int
    in_: int
    groups: int
    total_out: int
    total_in: int

    def tensor(self) -> Tensor:
        fields = (self.rows, self.out, self.in_, self.groups, self.total_out, self.total_in)
        return torch.tensor(fields)


BLOCKS = (Block(6, 5, 7, 1, 9, 11), Block(3, 16, 8, 3, 16, 8), Block(4, 8, 10, 3, 24, 18))


def check_forward(lib: Library, block: Block, dtype: torch.dtype, gelu: bool) -> None:
    x = random(block.rows, block.in_ + 2, dtype=dtype)
    weight = random(block.groups, block.total_out, block.total_in, dtype=dtype)
    bias = random(block.groups, block.total_out, dtype=dtype)
    y, pre = (unwritten(block.groups, block.rows, block.out, dtype=dtype) for _ in range(2))
    wide, ldx = int(dtype is torch.bfloat16), block.in_ + 2
    kept = pre if gelu else None
    lib.call("lt_forward", block.tensor(), wide, x, ldx, weight, bias, y, kept, 0)
    narrow = [t.double() for t in (x[:, : block.in_], weight[:, : block.out, : block.in_])]
    expected = torch.einsum("ri,goi->gro", *narrow) + bias[:, None, : block.out].double()
    if gelu:
        assert_near(pre, expected, dtype)
        expected = F.gelu(expected, approximate="tanh")
    assert_near(y, expected, dtype)
    assert_guards_hold(y, pre)


def check_gradients(lib: Library, block: Block, dtype: torch.dtype, batched: bool) -> None:
    """dx summed over groups, dW written into its blocks, in one call or one per group."""
    shape, wide = block.tensor(), int(dtype is torch.bfloat16)
    ld = block.out + 3
    dy = random(block.groups, block.rows, ld, dtype=dtype)
    x = random(block.rows, block.in_, dtype=dtype, seed=1)
    weight = random(block.groups, block.total_out, block.total_in, dtype=dtype, seed=2)
    dx = unwritten(block.rows, block.in_, dtype=dtype)
    dw = unwritten(block.groups, block.total_out, block.total_in, dtype=dtype)
    for g in range(block.groups):
        lib.call("lt_grad_input", shape, wide, dy[g], ld, weight, g, dx)
    if batched:
        stride = block.rows * ld
        lib.call("lt_grad_weight", shape, wide, dy, ld, stride, x, block.in_, dw, 0, block.groups)
    else:
        for g in range(block.groups):
            lib.call("lt_grad_weight", shape, wide, dy[g], ld, 0, x, block.in_, dw, g, 1)
    upstream = dy[..., : block.out].double()
    narrow = weight[:, : block.out, : block.in_].double()
    expected = torch.einsum("gro,goi->ri", upstream, narrow)
    loose = {"rtol": 2e-2, "atol": 5e-2} if wide else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(dx.double(), expected, **loose)
    written = dw[:, : block.out, : block.in_]
    assert_near(written, torch.einsum("gro,ri->goi", upstream, x.double()), dtype)
    outside = torch.ones(dw.shape, dtype=torch.bool)
    outside[:, : block.out, : block.in_] = False
    assert dw[outside].isnan().all(), "the product wrote outside its block"
    assert_guards_hold(dx, dw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
class TestMatrixProducts:
    def test_forward(self, cublaslt: Library, block: Block, dtype: torch.dtype) -> None:
        check_forward(cublaslt, block, dtype, gelu=False)

    def test_forward_with_gelu(self, cublaslt: Library, block: Block, dtype: torch.dtype) -> None:
        if block.out % 8:
            with pytest.raises(HostError):
                check_forward(cublaslt, block, dtype, gelu=True)
        else:
            check_forward(cublaslt, block, dtype, gelu=True)

    @pytest.mark.parametrize("batched", [True, False], ids=["one call", "a call per group"])
    def test_gradients(
        self, cublaslt: Library, block: Block, dtype: torch.dtype, batched: bool
    ) -> None:
        check_gradients(cublaslt, block, dtype, batched)


def test_the_gelu_epilogue_is_taken_only_where_it_is_allowed(cublaslt: Library) -> None:
    pre = unwritten(64, dtype=torch.float32)
    fits = Block(3, 16, 8, 1, 16, 8).tensor()
    odd = Block(3, 12, 8, 1, 16, 8).tensor()
    assert cublaslt.number("lt_gelu_fits", fits, pre)
    assert not cublaslt.number("lt_gelu_fits", odd, pre)
    assert not cublaslt.number("lt_gelu_fits", fits, pre[1:])


def test_algorithms_are_remembered_for_each_device(cublaslt: Library) -> None:
    block = Block(13, 8, 8, 1, 8, 8)
    x, weight, bias, y = random(13, 8), random(1, 8, 8), random(1, 8), random(13, 8)
    asked = [cublaslt.number("lt_heuristics")]
    for device in (0, 0, 1):
        cublaslt.call("lt_forward", block.tensor(), 0, x, 8, weight, bias, y, None, device)
        asked.append(cublaslt.number("lt_heuristics"))
    assert [later - asked[0] for later in asked[1:]] == [1, 1, 2]


# --------------------------------------------------------------------------- the test of the tests
@dataclass(frozen=True)
class Bug:
    """Replaces `right` by `wrong` after the first `after`; `check` is one that has to notice."""

    right: str
    wrong: str
    check: str
    after: str = ""
    file: str = "kernels.cuh"


BUGS = {
    "no barrier before column sums are read": Bug(
        "  __syncthreads();\n", "", "gelu_backward", after=" column_kernel("
    ),
    "no barrier before partial sums are added": Bug(
        "  __syncthreads();\n", "", "bias_gradient", after=" add_partials_kernel("
    ),
    "no barrier in the sum over a block": Bug(
        "  __syncthreads();\n", "", "gated_norm", after="block_sum("
    ),
    "no barrier before head sums are added": Bug(
        "  __syncthreads();\n", "", "head_gate", after=" add_heads_kernel("
    ),
    "half a warp in the mask": Bug("0xffffffffu, x", "0x0000ffffu, x", "gated_norm"),
    "half a warp in the sum": Bug("int distance = 16", "int distance = 8", "gated_norm"),
    "vectors at misaligned pointers": Bug(
        " % 16 == 0) && ...)", " % 2 == 0) && ...)", "gated_gelu"
    ),
    "vectors at an odd row distance": Bug("ld % kWide<T> == 0 && ", "", "gelu_backward"),
    "vectors over boxes with an odd stride": Bug(
        "(box.stride % 4 == 0 || box.rows == 1)", "true", "adamw"
    ),
    "dy read at the distance of dense rows": Bug(
        "row * ld + column", "row * cols + column", "bias_gradient"
    ),
    "rows of a box at the wrong stride": Bug("row * box.stride", "row * box.cols", "adamw"),
    "first blocks of boxes not counted": Bug("block - box.first_block", "block", "adamw"),
    "the next row of a box is lost": Bug("row += column / per_row;", "row += 1;", "adamw"),
    "a store where sums are added": Bug("sum[j] += term;", "sum[j] = term;", "gated_gelu"),
    "partial sums of all groups at one place": Bug(
        "partial + static_cast<long long>(blockIdx.y) * lines * cols", "partial", "bias_gradient"
    ),
    "partial sums in one line": Bug(
        "static_cast<long long>(blockIdx.y) * cols + left", "0 * cols + left", "gelu_backward"
    ),
    "db not zero beyond the block": Bug("column < total", "column < cols", "gelu_backward"),
    "halves of a bfloat16 pair swapped": Bug(
        "__floats2bfloat162_rn(first, second)", "__floats2bfloat162_rn(second, first)", "gelu"
    ),
    "the end of a flat array left out": Bug("c < count; ++c", "c < at; ++c", "gelu"),
    "one mass for a vector of heads": Bug(
        "(column + j) / head_dim", "column / head_dim", "head_gate"
    ),
    "the mass's way through the statistics forgotten": Bug(
        " - scale * (s.a * h + half_b * (h * h - square))", "", "gated_norm"
    ),
    "column sums of the norm not cleared": Bug("dmass[c + j] = 0.f;", "", "gated_norm"),
    "columns right of the block not zeroed": Bug(
        "in < total_in && g", "false && g", "zero_outside"
    ),
    "rows below the block not zeroed": Bug("out < total_out", "false", "zero_outside"),
    "groups not added to dx": Bug("group == 0 ? 0.f : 1.f", "0.f", "products", file="lt_gemm.h"),
    "dx added to what was there": Bug(
        "group == 0 ? 0.f : 1.f", "1.f", "products", file="lt_gemm.h"
    ),
    "dW at the distance of the block": Bug(
        "ldd = s.total_in", "ldd = s.in", "products", file="lt_gemm.h"
    ),
    "weight at the distance of the block": Bug(
        "g.ldb = s.total_in, g.transpose_b",
        "g.ldb = s.in, g.transpose_b",
        "products",
        file="lt_gemm.h",
    ),
    "one bias for all groups": Bug(
        "g.bias_stride = s.total_out", "g.bias_stride = 0", "products", file="lt_gemm.h"
    ),
    "a dropped transpose": Bug("lddy, g.transpose_a = true", "lddy", "products", file="lt_gemm.h"),
}

FEW = (CASES[1], CASES[2], CASES[3])


def all_products(lib: Library) -> None:
    for block in BLOCKS[1:]:
        check_forward(lib, block, torch.float32, gelu=True)
        check_gradients(lib, block, torch.float32, batched=True)


def all_of_check(name: str) -> Callable[[Library], None]:
    """A small run of one check over both dtypes."""

    def run(lib: Library) -> None:
        if name == "adamw":
            for boxes in BOXES:
                check_adamw(lib, boxes)
        elif name == "zero_outside":
            check_zero_outside(lib, 4, 5, torch.float32)
        else:
            for dtype in (torch.float32, torch.bfloat16):
                for case in (*FEW, CASES[4]):
                    MATRIX_CHECKS[name](lib, case, dtype)

    return all_products if name == "products" else run


def test_sources_without_a_bug_pass_the_same_run(kernels: Library, cublaslt: Library) -> None:
    for name in {bug.check for bug in BUGS.values()}:
        all_of_check(name)(cublaslt if name == "products" else kernels)


def compile_with(bug: Bug, directory: Path) -> Path:
    """The library built from a copy of the sources with the bug in it."""
    sources = directory / "sources"
    shutil.copytree(SOURCES, sources)
    path = sources / bug.file
    text = path.read_text()
    start = text.index(bug.right, text.index(bug.after))
    path.write_text(text[:start] + bug.wrong + text[start + len(bug.right) :])
    target = directory / "bug.so"
    if bug.check == "products":
        compile_shared(STAND_IN, target, "-O0", f"-I{sources}", *cublaslt_flags())
    else:
        compile_kernels(sources, target, "-O0")
    return target


@pytest.fixture(scope="session")
def buggy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Compiles two bugs at a time, ahead of the tests that ask for them."""
    with ThreadPoolExecutor(2) as pool:
        jobs = {
            name: pool.submit(compile_with, bug, tmp_path_factory.mktemp("bug"))
            for name, bug in BUGS.items()
        }
        yield lambda name: jobs[name].result()


@pytest.mark.parametrize("name", BUGS)
def test_bug_is_noticed(
    name: str, buggy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = all_of_check(BUGS[name].check)
    products = BUGS[name].check == "products"
    lib = Library(buggy(name), "lt_error" if products else "host_error")
    for order in ("fwd", "rev"):
        monkeypatch.setenv("CUHOST_ORDER", order)
        try:
            check(lib)
        except (AssertionError, HostError):
            return
    pytest.fail("no check noticed")
