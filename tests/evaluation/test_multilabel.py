import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from tract_transfer.evaluation.classification import class_average_precision, multilabel_metrics

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(60, 3))
MARKS = RNG.choice([1, -1, 0], size=(60, 3), p=[0.3, 0.6, 0.1])


def brute_force(scores, marks, recalls):
    """Interpolated average precision, from the definition."""
    kept = [(s, m) for s, m in zip(scores, marks, strict=True) if m != 0]
    kept.sort(key=lambda pair: -pair[0])
    total = sum(m == 1 for _, m in kept)
    points, hits = [], 0
    for rank, (_, mark) in enumerate(kept, start=1):
        hits += mark == 1
        points.append((hits / total, hits / rank))
    steps = recalls or sorted({recall for recall, _ in points if recall > 0})
    return np.mean([max((p for r, p in points if r >= at), default=0.0) for at in steps])


@pytest.mark.parametrize(
    ("method", "recalls"), [("11point", [i / 10 for i in range(11)]), ("area", None)]
)
def test_it_is_the_definition(method, recalls):
    found = class_average_precision(SCORES, MARKS, method)
    for k in range(3):
        assert found[k] == pytest.approx(brute_force(SCORES[:, k], MARKS[:, k], recalls))


def test_the_area_bounds_scikit_learns_which_does_not_interpolate():
    for k in range(3):
        used = MARKS[:, k] != 0
        plain = average_precision_score(MARKS[used, k] == 1, SCORES[used, k])
        ours = class_average_precision(SCORES, MARKS, "area")[k]
        assert plain <= ours <= plain + 0.1


def test_a_perfect_ranking_is_1_and_what_does_not_count_changes_nothing():
    assert (class_average_precision(MARKS.astype(float), MARKS, "11point") == 1).all()
    moved = np.where(MARKS == 0, 1e6, SCORES)
    for method in ("11point", "area"):
        np.testing.assert_array_equal(
            class_average_precision(moved, MARKS, method),
            class_average_precision(SCORES, MARKS, method),
        )


def test_the_mean_is_over_classes_with_positives():
    marks = MARKS.copy()
    marks[:, 1] = -1
    metrics, details = multilabel_metrics(SCORES, marks, ["a", "b", "c"])
    for method in ("11point", "area"):
        by_class = details[f"ap_{method}"]
        assert by_class["b"] is None
        assert metrics[f"map_{method}"] == pytest.approx((by_class["a"] + by_class["c"]) / 2)
    assert details["num_images"] == 60


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match="Need scores and marks"):
        class_average_precision(SCORES[:, :2], MARKS, "area")
    with pytest.raises(ValueError, match="finite"):
        class_average_precision(SCORES * np.nan, MARKS, "area")
    with pytest.raises(ValueError, match=r"No class has a positive.*data\.test"):
        multilabel_metrics(SCORES, MARKS * 0 - 1, ["a", "b", "c"])
