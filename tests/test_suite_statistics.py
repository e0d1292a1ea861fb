import math

import numpy as np
import pytest
from scipy import stats

from tract_transfer.suite.statistics import (
    paired_difference,
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
        diff = paired_difference(*pair(5, seed))
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


def test_what_cannot_be_paired_is_an_error():
    with pytest.raises(ValueError, match=r"treated has \[2\], only baseline has \[0, 1\]"):
        paired_difference({2: 0.5, 3: 0.5}, {0: 0.5, 1: 0.5, 3: 0.5})
    with pytest.raises(ValueError, match="finite"):
        paired_difference({0: math.nan}, {0: 0.5})
    with pytest.raises(ValueError, match="at least one"):
        paired_difference({}, {})
    with pytest.raises(ValueError, match="level"):
        paired_difference({0: 0.5}, {0: 0.5}, level=95)
