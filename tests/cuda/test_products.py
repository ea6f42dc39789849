"""The cuBLASLt descriptors of the sliced linear layer, against torch."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.host import (
    HostError,
    Library,
    random,
    unwritten,
)
from tests.cuda.product_checks import BLOCKS, Block, check_forward, check_gradients


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
