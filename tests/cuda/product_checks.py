"""What the matrix products have to satisfy; `lt_on_host.cpp` stands in for cuBLASLt."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.cuda.host import (
    Library,
    assert_guards_hold,
    assert_near,
    random,
    unwritten,
)


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
