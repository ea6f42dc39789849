"""The kernels' own source, run on the CPU in several warp orders, against torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.cuda.host import (
    Library,
    assert_near,
    guarded,
    masses,
    random,
    unwritten,
)
from tests.cuda.kernel_checks import (
    BOXES,
    CASES,
    MATRIX_CHECKS,
    Case,
    check_adamw,
    check_zero_outside,
)
from vimnas_ds.ops.gates import weighted_layer_norm


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
