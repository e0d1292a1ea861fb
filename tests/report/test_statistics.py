"""The statistics match scipy, Holm's procedure and simulations."""

import numpy as np
import pytest
from scipy import stats

from tract_transfer.report.statistics import (
    Summary,
    effect_size,
    holm,
    paired_difference,
    sign_flip_test,
    studentised_bootstrap,
    summarize,
)


def pair(n, seed=0, gain=0.02):
    rng = np.random.default_rng(seed)
    base = rng.normal(0.7, 0.05, n)
    treated = base + gain + rng.normal(0, 0.01, n)
    return dict(enumerate(treated.tolist())), dict(enumerate(base.tolist()))


def test_summary_has_the_sample_standard_deviation():
    values = [0.1, 0.2, 0.6]
    assert summarize(values) == Summary(pytest.approx(0.3), pytest.approx(stats.tstd(values)), 3)
    assert summarize([0.5]).std is None


@pytest.mark.parametrize("n", [2, 3, 10])
def test_paired_difference_is_scipys(n):
    treated, baseline = pair(n)
    difference = paired_difference(treated, baseline)
    test = stats.ttest_rel(list(treated.values()), list(baseline.values()))
    assert difference.p_value == pytest.approx(test.pvalue, rel=1e-9)
    assert (difference.low, difference.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert difference.mean == pytest.approx((difference.low + difference.high) / 2)


def test_pairs_are_matched_by_seed_and_swapping_inverts_the_sign():
    treated, baseline = pair(4)
    difference = paired_difference(treated, baseline)
    assert paired_difference(dict(reversed(treated.items())), baseline) == difference
    back = paired_difference(baseline, treated)
    assert (-back.mean, -back.high, -back.low) == (
        difference.mean, difference.low, difference.high,
    )  # fmt: skip
    assert back.p_value == difference.p_value


def test_interval_excludes_zero_exactly_if_the_test_rejects():
    for seed in range(100):
        difference = paired_difference(*pair(3, seed, gain=0.015))
        assert difference.excludes_zero == (difference.low > 0 or difference.high < 0)


def test_no_spread_gives_no_test_and_no_nan():
    one = paired_difference({0: 1e-6}, {0: 0.0})
    assert (one.mean, one.low, one.high, one.p_value, one.n) == (1e-6, None, None, None, 1)
    # 0.3 - 0.1 and 0.6 - 0.4 differ in the last bit.
    same = paired_difference({0: 0.3, 1: 0.6, 2: 0.2}, {0: 0.1, 1: 0.4, 2: 0.0})
    assert same.low == same.high == same.mean == pytest.approx(0.2)
    assert same.p_value is None
    zero = paired_difference({0: 0.0, 1: 0.0}, {0: 0.0, 1: 0.0})
    assert (zero.mean, zero.low, zero.high, zero.p_value) == (0, 0, 0, None)


def test_differences_that_cancel_have_no_sign():
    """0.1 + 0.2 - 0.3 is 5.6e-17: not ahead."""
    difference = paired_difference({0: 0.1, 1: 0.2, 2: 0.0}, {0: 0.0, 1: 0.0, 2: 0.3})
    assert (difference.mean, difference.low) == (0, -difference.high)
    assert difference.p_value == pytest.approx(1)


def test_holm_is_the_step_down_of_bonferroni():
    """Holm's procedure rejects in order while p <= alpha / (number left)."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        p_values = np.round(rng.random(rng.integers(1, 8)) ** 3, 2).tolist()
        corrected = holm(p_values)
        for alpha in (0.01, 0.05, 0.2):
            rejected, order = set(), sorted(range(len(p_values)), key=p_values.__getitem__)
            for rank, i in enumerate(order):
                if p_values[i] > alpha / (len(order) - rank):
                    break
                rejected.add(i)
            assert {i for i, p in enumerate(corrected) if p <= alpha + 1e-12} == rejected
    assert holm([]) == []
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def exact_sign_flip_p(differences):
    """Return the share of all sign flips whose mean is at least as far from zero."""
    n = len(differences)
    signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    sums = np.abs(signs @ differences)
    return np.mean(sums >= sums[0] - 1e-12 * np.abs(differences).sum())


@pytest.mark.parametrize("decimals", [1, 12])
def test_sign_flip_test_counts_all_flips(decimals):
    for seed in range(20):  # one decimal gives ties, and sums that cancel
        differences = np.random.default_rng(seed).normal(0.2, 0.3, 6 + seed % 5).round(decimals)
        assert sign_flip_test(differences) == pytest.approx(exact_sign_flip_p(differences))
    assert sign_flip_test(np.full(6, 0.1)) == 2 / 64
    assert sign_flip_test(np.zeros(6)) == 1


def test_sign_flip_test_of_many_samples_the_flips():
    differences = np.random.default_rng(0).normal(0.4, 1, 16)
    p_value = sign_flip_test(differences)
    assert p_value == sign_flip_test(differences)
    assert p_value == pytest.approx(exact_sign_flip_p(differences), abs=0.01)


def test_effect_size_is_unbiased():
    rng = np.random.default_rng(0)
    for n, bias in ((3, 0.25), (6, 0.06)):
        drawn = rng.normal(0.8, 1, (40_000, n))
        raw = drawn.mean(axis=1) / drawn.std(axis=1, ddof=1)
        assert abs(raw.mean() - 0.8) > bias, "the correction has something to correct"
        assert effect_size(drawn[0]) / raw[0] * raw.mean() == pytest.approx(0.8, abs=0.025)


@pytest.mark.parametrize(("n", "least"), [(5, 0.92), (10, 0.9)])
def test_bootstrap_covers_skewed_differences_better_than_t(n, least):
    drawn = np.random.default_rng(0).exponential(1, (400, n))
    intervals = np.array([studentised_bootstrap(row, resamples=999) for row in drawn])
    inside = np.mean((intervals[:, 0] <= 1) & (intervals[:, 1] >= 1))
    errors = stats.t.ppf(0.975, n - 1) * stats.sem(drawn, axis=1)
    assert inside >= least
    assert inside > np.mean(np.abs(drawn.mean(axis=1) - 1) <= errors)


def test_bootstrap_has_no_interval_if_most_differences_are_equal():
    assert studentised_bootstrap(np.array([0.1, 0.1, 0.1, 0.1, 0.2])) is None


def test_each_statistic_needs_its_number_of_pairs_and_remarks_state_what_few_cannot_show():
    differences = {n: paired_difference(*pair(n)) for n in (1, 2, 3, 4, 5, 6)}
    assert [n for n, d in differences.items() if d.bootstrap] == [5, 6]
    assert [n for n, d in differences.items() if d.permutation_p] == [6]
    assert [n for n, d in differences.items() if d.effect_size] == [3, 4, 5, 6]
    assert paired_difference(*pair(6), resample=False).bootstrap is None
    assert stats.t.ppf(0.975, 1) == pytest.approx(12.7, abs=0.01)
    for n, remark in (
        (1, "One pair: no interval and no test"), (2, "12.7 standard errors"),
        (3, "cannot get below p = 0.25"), (5, "cannot get below p = 0.062"),
    ):  # fmt: skip
        assert remark in differences[n].remark
    assert differences[6].remark == ""
    assert "same difference" in paired_difference({0: 0.3, 1: 0.6}, {0: 0.1, 1: 0.4}).remark
