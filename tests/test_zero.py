"""The sampled-only update under ZeRO-2, through the real launcher on 2 ranks (one launch)."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch

from tests.launch import launch
from vimnas_ds.ops._extension import available
from vimnas_ds.ops.boxes import boxes_in_range, merge_cells

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    output = launch("tests/launched/zero_cases.py")
    lines = [line.split(" ", 2) for line in output.splitlines() if "RESULT " in line]
    return {name: json.loads(values) for _, name, values in lines}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_unsampled_weights_moments_and_counts_keep_their_bits(results, dtype):
    found = results[f"sampled_only_{dtype}"]
    assert found["frozen"] > 500_000
    assert found["frozen_changed"] == 0
    assert found["frozen_counts_changed"] == 0
    assert found["idle_parameters"] >= 8 * 2  # the other dataset's head, on every step


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sampled_blocks_equal_torch_adamw_bit_for_bit(results, dtype):
    found = results[f"sampled_only_{dtype}"]
    assert found["sampled"] > 100_000
    assert found["sampled_moved"] > 0.99 * found["sampled"]
    assert found["differ_w"] == found["differ_m"] == found["count_wrong"] == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_compiled_update_keeps_frozen_bits_and_equals_adamw_to_rounding(results, dtype):
    if not available():
        pytest.skip("the compiled operators are not there")
    found = results[f"sampled_only_{dtype}_fused"]
    assert found["frozen"] > 500_000
    assert found["frozen_changed"] == found["frozen_counts_changed"] == 0
    assert found["sampled_moved"] > 0.99 * found["sampled"]
    assert found["differ_w"] == found["differ_m"] == found["count_wrong"] == 0


def test_a_stock_adamw_moves_what_was_not_sampled(results):
    assert results["stock_adamw"]["frozen_changed"] > 10_000


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_alpha_step_moves_alphas_and_no_weight(results, dtype):
    found = results[f"alpha_{dtype}"]
    assert found["weights_moved"] == 0
    assert found["alphas_moved"] == found["alphas"]
    assert found["same_on_ranks"]
    assert not found["alpha_in_weight_optimizer"]
    assert found["alpha_dtype"] == "torch.float32"
    assert found["next_gradient_differs"] == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_nan_on_one_rank_skips_the_step_on_all(results, dtype):
    found = results[f"alpha_{dtype}"]
    assert not found["nan_applied"]
    assert found["nan_moved"] == 0


def test_clipping_scales_the_active_gradient_to_the_norm(results):
    found = results["clipped"]
    assert found["norm"] > 0.3  # three times what is allowed
    assert found["norm"] == pytest.approx(found["active_norm"], rel=1e-5)
    assert found["wrong"] == found["frozen_moved"] == 0


@pytest.mark.parametrize("targets", ["distilled", "labels"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 0.03)])
def test_a_sandwich_has_the_gradient_of_its_summed_loss(results, dtype, tolerance, targets):
    found = results[f"sandwich_{dtype}_{targets}"]
    assert found["archs"] == 4
    assert found["error"] < tolerance
    assert found["error_of_largest_alone"] > 0.3
    assert found["untouched_moved"] == 0


@pytest.mark.parametrize("targets", ["distilled", "labels"])
def test_a_sandwich_reports_its_largest(results, targets):
    found = results[f"sandwich_fp32_{targets}"]
    assert found["loss_differs"] < 1e-6
    assert found["correct"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_average_moves_where_the_step_does_and_nowhere_else(results, dtype):
    found = results[f"ema_{dtype}"]
    assert found["start_differs"] == found["frozen_changed"] == found["wrong"] == 0
    assert found["moved"] > 50_000
    assert found["moved_by_nan"] == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_evaluating_with_the_average_leaves_every_weight_as_it_was(results, dtype):
    found = results[f"ema_{dtype}"]
    assert found["evaluated_with_it"]
    assert found["own_changed"] == found["masters_changed"] == found["kept_by_others"] == 0


def test_ranks_that_disagree_are_named(results):
    assert "step 3: ranks [1] differ from rank 0" in results["agreement"]["caught"]


def test_boxes_cover_exactly_the_rectangle_within_the_range():
    rng = random.Random(0)
    for _ in range(1500):
        shape = [rng.randint(1, 6) for _ in range(rng.randint(1, 3))]
        low = [rng.randint(0, s) for s in shape]
        high = [rng.randint(lo, s) for lo, s in zip(low, shape, strict=True)]
        total = torch.Size(shape).numel()
        start = rng.randint(0, total)
        stop = rng.randint(start, total)
        hits = torch.zeros(total, dtype=torch.int64)
        for offset, sizes, strides in boxes_in_range(shape, low, high, start, stop):
            hits.as_strided(sizes, strides, offset).add_(1)
        expected = torch.zeros(shape, dtype=torch.int64)
        expected[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = 1
        expected = expected.flatten()
        expected[:start] = 0
        expected[stop:] = 0
        assert torch.equal(hits, expected)


def test_merged_cells_keep_every_value_and_join_equal_ones():
    rng = random.Random(0)
    for _ in range(200):
        counts = [rng.randint(1, 4) for _ in range(rng.randint(1, 3))]
        cells = list(itertools.product(*(range(c) for c in counts)))
        values = [rng.choice([None, 1, 2]) for _ in cells]
        found = dict.fromkeys(cells)
        for low, high, value in merge_cells(values, counts):
            for cell in itertools.product(*(range(a, b) for a, b in zip(low, high, strict=True))):
                assert found[cell] is None
                found[cell] = value
        assert list(found.values()) == values
    assert merge_cells([5] * 24, [2, 3, 4]) == (((0, 0, 0), (2, 3, 4), 5),)
