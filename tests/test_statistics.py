"""Statistics against values worked out by hand and published ones."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vimnas_ds.search.statistics import (
    bootstrap_interval,
    kendall_tau_b,
    percentile,
    spearman,
    standard_error,
)


@pytest.mark.parametrize(
    ("x", "y", "tau"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 4 / 6),  # 5 pairs agree, 1 does not
        ([1, 1, 2, 3], [1, 2, 2, 3], 4 / 5),  # C 4, D 0, one pair tied in each alone: 4/sqrt(5 5)
        ([1, 1, 2], [1, 2, 3], 2 / math.sqrt(2 * 3)),
        # scipy.stats.kendalltau's documented example
        ([12, 2, 1, 12, 2], [1, 4, 7, 1, 0], -0.47140452079103173),
        ([1, 2, 2, 4, 0], [2, 2, 3, 1, 5], -6 / 9),  # C 1, D 7, one pair tied in each alone
    ],
)
def test_kendalls_tau_b_counts_ties(x, y, tau):
    assert kendall_tau_b(x, y) == pytest.approx(tau, abs=1e-12)
    assert kendall_tau_b(y, x) == pytest.approx(tau, abs=1e-12)


def test_spearman_is_the_correlation_of_average_ranks():
    # scipy.stats.spearmanr's documented example
    assert spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826816681233)
    assert spearman([1, 2, 3], [1, 8, 27]) == pytest.approx(1.0)
    # without ties: 1 - 6 sum(d^2) / (n (n^2 - 1))
    assert spearman([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(1 - 6 * 4 / 60)


@pytest.mark.parametrize("correlation", [kendall_tau_b, spearman])
def test_a_constant_vector_has_no_order_and_nan_is_refused(correlation):
    assert math.isnan(correlation([1, 1, 1], [1, 2, 3]))
    assert math.isnan(correlation([1], [2]))
    with pytest.raises(ValueError, match="nan"):
        correlation([1, math.nan], [1, 2])
    with pytest.raises(ValueError, match="one length"):
        correlation([1, 2, 3], [1, 2])


def test_the_bootstrap_interval_of_a_mean_is_the_known_one():
    rng = np.random.default_rng(3)
    sample = rng.normal(5, 2, 400)
    low, high = bootstrap_interval(lambda i: float(sample[i].mean()), [400], seed=1)
    half = 1.96 * standard_error(sample)
    assert low == pytest.approx(sample.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(sample.mean() + half, abs=0.15 * half)
    again = bootstrap_interval(lambda i: float(sample[i].mean()), [400], seed=1)
    assert again == (low, high)
    narrow = bootstrap_interval(lambda i: float(sample[i].mean()), [400], seed=1, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_groups_are_resampled_apart():
    small, large = np.arange(3.0), np.arange(50.0)
    seen: list[tuple[int, int]] = []

    def statistic(i, j):
        seen.append((len(small[i]), len(large[j])))
        return float(small[i].mean() - large[j].mean())

    low, high = bootstrap_interval(statistic, [3, 50], seed=0, resamples=50)
    assert set(seen) == {(3, 50)}
    assert low < 1 - 24.5 < high


def test_resamples_without_a_value_are_left_out():
    values = iter([math.nan, 1.0, math.nan, 3.0])
    low, high = bootstrap_interval(lambda i: next(values), [2], seed=0, resamples=4, level=0.5)
    assert (low, high) == (1.5, 2.5)
    nothing = bootstrap_interval(lambda i: math.nan, [2], seed=0, resamples=4)
    assert all(map(math.isnan, nothing))


def test_error_of_a_mean_and_percentile_of_a_pick():
    assert standard_error([1, 3, 5]) == pytest.approx(2 / math.sqrt(3))
    assert math.isnan(standard_error([1]))
    assert percentile(3, [1, 2, 3, 4]) == 62.5
    assert percentile(9, [1, 2]) == 100
    assert percentile(0, [1, 2]) == 0
    assert math.isnan(percentile(1, []))
