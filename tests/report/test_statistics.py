import math

import numpy as np
import pytest
from scipy import stats

from tract_transfer.report.statistics import (
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


def test_summary_is_the_sample_standard_deviation():
    summary = summarize([0.1, 0.2, 0.6])
    assert (summary.mean, summary.n) == (pytest.approx(0.3), 3)
    assert summary.std == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 2))
    assert summarize([0.5]).std is None
    for values in ([], [0.1, math.nan]):
        with pytest.raises(ValueError, match="finite"):
            summarize(values)


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_paired_difference_is_scipys(n, level):
    treated, baseline = pair(n)
    ours = paired_difference(treated, baseline, level)
    test = stats.ttest_rel(list(treated.values()), list(baseline.values()))
    interval = test.confidence_interval(level)
    assert ours.p_value == pytest.approx(test.pvalue, rel=1e-9)
    assert (ours.low, ours.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert ours.mean == pytest.approx((ours.low + ours.high) / 2)


def test_pairs_are_found_by_seed_and_swapping_turns_the_sign():
    treated, baseline = pair(4)
    ours = paired_difference(treated, baseline)
    assert paired_difference(dict(reversed(treated.items())), baseline) == ours
    back = paired_difference(baseline, treated)
    assert (back.mean, back.low, back.high) == (-ours.mean, -ours.high, -ours.low)
    assert back.p_value == ours.p_value


def test_the_interval_covers_the_truth_as_often_as_it_says():
    inside = 0
    for seed in range(2000):
        diff = paired_difference(*pair(5, seed), resample=False)
        inside += diff.low <= 0.02 <= diff.high
    assert 0.93 <= inside / 2000 <= 0.97


def test_zero_is_outside_the_interval_exactly_when_p_is_below_one_minus_level():
    for seed in range(100):
        diff = paired_difference(*pair(3, seed, gain=0.015))
        assert (diff.low > 0 or diff.high < 0) == (diff.p_value < 0.05)


def test_no_spread_gives_no_test_and_no_nan():
    one = paired_difference({0: 0.5}, {0: 0.4})
    assert (one.low, one.high, one.p_value, one.n) == (None, None, None, 1)
    # 0.3 - 0.1 and 0.6 - 0.4 differ in the last bit.
    same = paired_difference({0: 0.3, 1: 0.6, 2: 0.2}, {0: 0.1, 1: 0.4, 2: 0.0})
    assert same.low == same.high == same.mean == pytest.approx(0.2)
    assert same.p_value is None
    zero = paired_difference({0: 0.0, 1: 0.0}, {0: 0.0, 1: 0.0})
    assert (zero.mean, zero.low, zero.high, zero.p_value) == (0, 0, 0, None)


def test_differences_that_cancel_have_no_sign():
    """0.1 + 0.2 - 0.3 is 5.6e-17: not ahead."""
    found = paired_difference({0: 0.1, 1: 0.2, 2: 0.0}, {0: 0.0, 1: 0.0, 2: 0.3})
    assert found.mean == 0
    assert found.p_value == pytest.approx(1)
    assert found.low == -found.high
    assert paired_difference({0: 1e-6}, {0: 0.0}).mean == 1e-6


def test_what_cannot_be_paired_is_an_error():
    with pytest.raises(ValueError, match=r"treated has \[2\], only baseline has \[0, 1\]"):
        paired_difference({2: 0.5, 3: 0.5}, {0: 0.5, 1: 0.5, 3: 0.5})
    with pytest.raises(ValueError, match="finite"):
        paired_difference({0: math.nan}, {0: 0.5})
    with pytest.raises(ValueError, match="at least one"):
        paired_difference({}, {})
    with pytest.raises(ValueError, match="level"):
        paired_difference({0: 0.5}, {0: 0.5}, level=95)


def test_holm_is_the_step_down_of_bonferroni():
    # Holm's own procedure: reject in order while p <= alpha / (number left).
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


@pytest.mark.parametrize("n", [6, 9, 13])
def test_flipping_signs_is_scipys_permutation_test(n):
    differences = np.random.default_rng(n).normal(0.5, 1, n)
    theirs = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=2**14
    )
    assert sign_flip_test(differences) == pytest.approx(theirs.pvalue)


def test_flipping_signs_of_many_is_near_the_exact_p_value():
    differences = np.random.default_rng(0).normal(0.4, 1, 16)
    theirs = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=2**16
    )
    assert sign_flip_test(differences) == pytest.approx(theirs.pvalue, abs=0.01)
    assert sign_flip_test(differences) == sign_flip_test(differences)


def test_flipping_signs_counts_equal_means_as_no_smaller():
    assert sign_flip_test(np.full(6, 0.1)) == 2 / 64
    assert sign_flip_test(np.zeros(6)) == 1


def test_the_effect_size_is_unbiased():
    rng = np.random.default_rng(0)
    for n, bias in ((3, 0.25), (6, 0.06)):
        drawn = rng.normal(0.8, 1, (40_000, n))
        raw = drawn.mean(axis=1) / drawn.std(axis=1, ddof=1)
        assert abs(raw.mean() - 0.8) > bias, "the correction has something to correct"
        factor = effect_size(drawn[0]) / raw[0]
        assert factor * raw.mean() == pytest.approx(0.8, abs=0.025)


@pytest.mark.parametrize(("n", "least"), [(5, 0.92), (10, 0.9)])
def test_the_bootstrap_covers_skewed_differences_better_than_t(n, least):
    rng = np.random.default_rng(0)
    inside, inside_t = 0, 0
    for _ in range(400):
        drawn = rng.exponential(1, n)
        low, high = studentised_bootstrap(drawn, resamples=999)
        inside += low <= 1 <= high
        error = stats.t.ppf(0.975, n - 1) * drawn.std(ddof=1) / math.sqrt(n)
        inside_t += abs(drawn.mean() - 1) <= error
    assert inside / 400 >= least
    assert inside > inside_t


def test_the_bootstrap_has_no_interval_where_most_differences_are_equal():
    assert studentised_bootstrap(np.array([0.1, 0.1, 0.1, 0.1, 0.2])) is None


def test_what_few_pairs_cannot_say_is_said():
    remarks = {n: paired_difference(*pair(n)).remark for n in (1, 2, 3, 5, 6)}
    assert remarks[1].startswith("One pair: no interval and no test")
    assert "12.7 standard errors" in remarks[2]
    assert stats.t.ppf(0.975, 1) == pytest.approx(12.7, abs=0.01)
    assert "could not get below p = 0.25" in remarks[3]
    assert "could not get below p = 0.062" in remarks[5]
    assert remarks[6] == ""
    same = paired_difference({0: 0.3, 1: 0.6}, {0: 0.1, 1: 0.4})
    assert "same difference" in same.remark


def test_resampling_begins_where_it_holds():
    found = {n: paired_difference(*pair(n)) for n in (2, 3, 4, 5, 6)}
    assert [n for n, d in found.items() if d.bootstrap] == [5, 6]
    assert [n for n, d in found.items() if d.permutation_p] == [6]
    assert [n for n, d in found.items() if d.effect_size] == [3, 4, 5, 6]
    assert paired_difference(*pair(6), resample=False).bootstrap is None
