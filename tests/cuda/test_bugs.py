"""The test of the tests: each bug, put into a copy of the CUDA sources, has to be noticed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.cuda.host import (
    SOURCES,
    STAND_IN,
    HostError,
    Library,
    compile_kernels,
    compile_shared,
)
from tests.cuda.kernel_checks import BOXES, CASES, MATRIX_CHECKS, check_adamw, check_zero_outside
from tests.cuda.product_checks import BLOCKS, check_forward, check_gradients, cublaslt_flags


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
