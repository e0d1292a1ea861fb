"""Speed-ups: epochs until a target, their ratio and its interval."""

import math

import pytest

from tract_transfer.report.curves import epochs_to_reach, speed_up

SLOW = ([1.0, 2.0, 4.0], [0.2, 0.4, 0.8])


def faster(factor):
    """Return the same curve in fewer epochs."""
    return [epoch / factor for epoch in SLOW[0]], SLOW[1]


@pytest.mark.parametrize(("target", "epoch"), [(0.4, 2), (0.6, 3), (0.81, math.inf), (0.2, None)])
def test_target_is_reached_between_evaluations(target, epoch):
    """If the first evaluation has reached it, the epoch is unknown."""
    assert epochs_to_reach(SLOW, target) == epoch
    assert epochs_to_reach(([1, 2, 3, 4], [0.1, 0.5, 0.3, 0.6]), 0.4) == 1.75, "the first time"


@pytest.mark.parametrize(
    ("treated", "baseline", "target", "ratio", "remark"),
    [
        (2 * [faster(2)], 2 * [SLOW], 0.6, 2, "the same for every seed: no interval"),
        ([faster(2)], [SLOW], 0.6, 2, "one seed: no interval"),
        ([faster(2), ([1, 2], [0.1, 0.2])], 2 * [SLOW], 0.6, None,
         "the method never reached it with seed 1"),
        ([faster(2)], [([1, 2], [0.1, 0.2])], 0.6, None,
         "the baseline never reached it with seed 0"),
        (2 * [SLOW], [SLOW, faster(2)], 0.15, None,
         "the method exceeded it at the first evaluation with seeds 0, 1"),
    ],
)  # fmt: skip
def test_speed_up_without_interval_states_why(treated, baseline, target, ratio, remark):
    result = speed_up(dict(enumerate(treated)), dict(enumerate(baseline)), target)
    assert result.ratio == (ratio and pytest.approx(ratio))
    assert (result.low, result.high, result.remark) == (None, None, remark)


def test_interval_of_logarithms_inverts_with_the_ratio():
    treated, base = {0: faster(2), 1: faster(3), 2: faster(1.5)}, dict.fromkeys(range(3), SLOW)
    result, inverse = speed_up(treated, base, 0.6), speed_up(base, treated, 0.6)
    assert result.ratio == pytest.approx((2 * 3 * 1.5) ** (1 / 3))
    assert result.low < result.ratio < result.high
    assert [inverse.ratio, inverse.low, inverse.high] == pytest.approx(
        [1 / result.ratio, 1 / result.high, 1 / result.low]
    )
