import numpy as np
import pytest
from probe_rows import TEST, TRAIN, marks_of
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from tract_transfer.evaluation.linear_probes import linear_svm, one_hot_marks
from tract_transfer.evaluation.probes import Rows

CS = (0.01, 1.0, 100.0)
MARKS = marks_of(120)
ONE_HOT = Rows(TRAIN.x, one_hot_marks(TRAIN.y, 4))


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def svc(c):
    return LinearSVC(C=c, class_weight={1: 2, -1: 1}, max_iter=50000, tol=1e-8)


def fit(train=MARKS, test_x=MARKS.x, cs=CS, folds=3, max_iters=2000, seed=0):
    return linear_svm(train, test_x, cs=cs, folds=folds, max_iters=max_iters, seed=seed)


def selected(x, y):
    """C by the definition: the best mean average precision over the folds."""
    found = {}
    for c in CS:
        values = []
        for own, other in StratifiedKFold(3, shuffle=True, random_state=0).split(x, y):
            scores = svc(c).fit(x[own], y[own]).decision_function(x[other])
            values.append(average_precision_score(y[other] == 1, scores))
        found[c] = np.mean(values)
    return found


def test_each_class_is_scikit_learns_on_the_rows_that_count():
    result = fit()
    for k, c in enumerate(result.chosen["c"]):
        used = MARKS.y[:, k] != 0
        x, y = unit(MARKS.x)[used], MARKS.y[used, k]
        assert len(y) < 120
        scores = svc(c).fit(x, y).decision_function(unit(MARKS.x))
        np.testing.assert_allclose(result.scores[:, k], scores, atol=0.02)
        by_c = selected(x, y)
        assert by_c[c] >= max(by_c.values()) - 1e-3
    assert result.details == {"fits_at_max_iters": 0}


def test_rows_that_do_not_count_change_nothing():
    moved = MARKS.x.copy()
    moved[MARKS.y[:, 1] == 0] *= -1
    np.testing.assert_array_equal(fit().scores[:, 1], fit(Rows(moved, MARKS.y)).scores[:, 1])


def test_it_ignores_the_length_of_features_and_the_other_test_images():
    longer = Rows(MARKS.x * 3, MARKS.y)
    np.testing.assert_allclose(fit(longer).scores, fit().scores, atol=1e-3)
    np.testing.assert_allclose(fit(test_x=MARKS.x[:1]).scores, fit().scores[:1])


def test_it_classifies():
    result = fit(ONE_HOT, TEST.x)
    assert (result.scores.argmax(1) == TEST.y).mean() > 0.8
    assert fit(ONE_HOT, TEST.x, seed=1).scores.shape == (80, 4)


def test_a_class_without_positives_ranks_last_and_one_of_a_single_row_has_c_1():
    marks = one_hot_marks(TRAIN.y, 6)
    marks[7, 5] = 1
    result = fit(Rows(TRAIN.x, marks), TEST.x)
    assert result.chosen["c"][4] is None
    assert result.chosen["c"][5] == 1.0
    assert (result.scores[:, 4] < result.scores[:, [0, 1, 2, 3, 5]].min(1)).all()


def test_unfinished_fits_are_counted():
    assert fit(max_iters=1).details["fits_at_max_iters"] == 3


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"cs": ()}, "values of C"),
        ({"cs": (0.0,)}, "values of C"),
        ({"train": Rows(MARKS.x, MARKS.y[:, 0])}, r"marks \(N, K\)"),
        ({"train": Rows(MARKS.x, MARKS.y * 2)}, "must be 1, -1 or 0"),
        ({"train": Rows(MARKS.x, abs(MARKS.y))}, "No class has both"),
        ({"train": Rows(MARKS.x * np.float32("nan"), MARKS.y)}, "120 of 120 training rows"),
        ({"test_x": MARKS.x[:, :2]}, "of one D"),
    ],
)
def test_what_is_wrong_is_named(changed, says):
    with pytest.raises(ValueError, match=says):
        fit(**changed)
