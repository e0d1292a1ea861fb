import math

import pytest

from tract_transfer.report.curves import end_of_slowest, epochs_to_reach, speed_up

SLOW = ([1.0, 2.0, 4.0], [0.2, 0.4, 0.8])


def faster(factor):
    """The same curve in fewer epochs."""
    return [epoch / factor for epoch in SLOW[0]], SLOW[1]


def test_a_value_is_reached_between_evaluations():
    assert epochs_to_reach(SLOW, 0.4) == 2
    assert epochs_to_reach(SLOW, 0.6) == 3
    assert epochs_to_reach(SLOW, 0.81) == math.inf
    assert epochs_to_reach(SLOW, 0.2) is None, "before the first evaluation it is not known"
    assert epochs_to_reach(([1, 2, 3, 4], [0.1, 0.5, 0.3, 0.6]), 0.4) == 1.75, "the first time"


def test_a_curve_of_half_the_epochs_is_a_speed_up_of_two():
    found = speed_up({0: faster(2), 1: faster(2)}, {0: SLOW, 1: SLOW}, 0.6)
    assert found.ratio == pytest.approx(2)
    assert (found.low, found.high) == (None, None)
    assert "every seed shows the same" in found.remark


def test_the_interval_is_of_the_logarithms_and_turns_with_the_ratio():
    treated, base = {0: faster(2), 1: faster(3), 2: faster(1.5)}, dict.fromkeys(range(3), SLOW)
    found, back = speed_up(treated, base, 0.6), speed_up(base, treated, 0.6)
    assert found.ratio == pytest.approx((2 * 3 * 1.5) ** (1 / 3))
    assert found.low < found.ratio < found.high
    assert back.ratio == pytest.approx(1 / found.ratio)
    assert (back.low, back.high) == (pytest.approx(1 / found.high), pytest.approx(1 / found.low))


def test_a_seed_that_never_reaches_it_is_not_left_out():
    found = speed_up({0: faster(2), 1: ([1, 2], [0.1, 0.2])}, {0: SLOW, 1: SLOW}, 0.6)
    assert found.ratio is None
    assert found.remark == "the method never reached it with seed 1"
    assert found.treated == {0: 1.5, 1: math.inf}


def test_what_is_reached_before_the_first_evaluation_has_no_ratio():
    found = speed_up({0: SLOW, 1: SLOW}, {0: SLOW, 1: faster(2)}, 0.15)
    assert found.ratio is None
    assert found.remark == "the method was past it at the first evaluation of seeds 0, 1"


def test_one_seed_has_a_ratio_without_an_interval():
    found = speed_up({4: faster(2)}, {4: SLOW}, 0.6)
    assert (found.ratio, found.low, found.remark) == (
        pytest.approx(2),
        None,
        "one seed: no interval",
    )


def test_every_seed_of_the_baseline_reaches_where_the_slowest_ends():
    curves = {0: SLOW, 1: ([1.0, 2.0], [0.9, 0.5])}
    assert end_of_slowest(curves) == 0.5
    assert all(epochs_to_reach(c, 0.5) != math.inf for c in curves.values())


def test_other_seeds_cannot_be_paired():
    with pytest.raises(ValueError, match=r"treated has \[0\], baseline has \[1\]"):
        speed_up({0: SLOW}, {1: SLOW}, 0.5)
