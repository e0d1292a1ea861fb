import numpy as np
import pytest
from probe_rows import TEST, TRAIN, marks_of
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tract_transfer.evaluation.linear_probes import (
    check_shots,
    classifier,
    draws,
    linear_svm,
    one_hot_marks,
)
from tract_transfer.evaluation.probes import Rows, knn_predict

MARKS = marks_of(400, ignored=0.02)


def make(name, cs=(0.1, 1.0, 10.0)):
    return classifier(name, cs=cs, folds=3, temperature=0.07, seed=2, num_classes=4)


@pytest.mark.parametrize("k", [1, 2, 50])
def test_a_draw_has_k_rows_of_each_class(k):
    for drawn in draws(TRAIN, k, 3, seed=0):
        np.testing.assert_array_equal(np.bincount(drawn.y), [k] * 4)
        assert len({tuple(row) for row in drawn.x}) == 4 * k
        assert {tuple(row) for row in drawn.x} <= {tuple(row) for row in TRAIN.x}


def test_a_draw_depends_on_seed_sampling_and_k_alone():
    def xs(seed, samplings=3, k=2):
        return [drawn.x for drawn in draws(TRAIN, k, samplings, seed)]

    np.testing.assert_array_equal(xs(0), xs(0, samplings=5)[:3])
    assert (xs(0)[0] != xs(0)[1]).any()
    assert (xs(0)[0] != xs(1)[0]).any()


def test_a_class_without_rows_is_left_out():
    y = TRAIN.y + (TRAIN.y >= 2)
    (drawn,) = draws(Rows(TRAIN.x, y), 3, 1, seed=0)
    np.testing.assert_array_equal(np.bincount(drawn.y), [3, 3, 0, 3, 3])


@pytest.mark.parametrize("k", [1, 4, 16])
def test_of_marks_a_draw_keeps_k_positives_and_their_share_of_negatives(k):
    for drawn in draws(MARKS, k, 2, seed=0):
        assert ((drawn.y == MARKS.y) | (drawn.y == 0)).all()
        np.testing.assert_array_equal((drawn.y == 1).sum(0), [k] * 3)
        np.testing.assert_array_equal((drawn.y == -1).sum(0), [2 * k] * 3)


def test_negatives_are_all_there_are_where_these_are_fewer():
    few = Rows(MARKS.x, np.where(np.arange(400)[:, None] < 395, 1, -1) + 0 * MARKS.y)
    (drawn,) = draws(few, 8, 1, seed=0)
    np.testing.assert_array_equal((drawn.y == -1).sum(0), [5] * 3)


def test_too_large_a_k_names_the_class_and_its_count():
    y = np.array([0, 0, 0, 2, 2])
    check_shots(y, [1, 2], ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"few_shot\.ks: class 'c' has 2 .* fewer than k = 3"):
        check_shots(y, [1, 3], ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"class 'y' has 1 training images"):
        check_shots(np.array([[1, 1], [1, -1], [0, 0]]), [2], ["x", "y"])
    with pytest.raises(ValueError, match="No training image shows a class"):
        check_shots(np.array([[0, -1]]), [1], ["x", "y"])


def test_one_shot_logistic_has_c_1_and_more_choose_on_the_drawn_rows():
    (one,) = draws(TRAIN, 1, 1, seed=0)
    result = make("logistic")(one, TEST.x, 1, 0)
    assert result.chosen == {"c": 1.0}
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=2000))
    oracle.fit(one.x.astype(float), one.y)
    np.testing.assert_allclose(
        result.scores, oracle.predict_log_proba(TEST.x.astype(float)), atol=1e-6
    )
    (more,) = draws(TRAIN, 20, 1, seed=0)
    chosen = make("logistic", cs=(1e-9, 1.0))(more, TEST.x, 20, 0).chosen["c"]
    assert chosen in (1e-9, 1.0)
    assert make("logistic", cs=(5.0,))(more, TEST.x, 20, 0).chosen == {"c": 5.0}


@pytest.mark.parametrize("name", ["logistic", "svm", "knn"])
def test_the_draw_decides_all(name):
    (drawn,) = draws(TRAIN, 8, 1, seed=0)
    scores = make(name)(drawn, TEST.x, 8, 0).scores
    np.testing.assert_array_equal(scores, make(name)(drawn, TEST.x, 8, 0).scores)
    assert (scores.argmax(1) == TEST.y).mean() > 0.6


@pytest.mark.filterwarnings("error")
def test_as_many_classes_as_rows_are_no_reason_to_warn():
    many = Rows(TRAIN.x[:40], np.arange(40))
    fit = classifier("logistic", cs=(1.0,), folds=3, temperature=0.07, seed=0, num_classes=40)
    assert fit(many, TEST.x, 1, 0).scores.shape == (80, 40)


def test_the_classifiers_are_the_probes_on_the_drawn_rows():
    (drawn,) = draws(TRAIN, 4, 1, seed=0)
    marks = Rows(drawn.x, one_hot_marks(drawn.y, 4))
    svm = linear_svm(marks, TEST.x, cs=(0.1, 1.0, 10.0), folds=3, max_iters=2000, seed=3)
    np.testing.assert_array_equal(make("svm")(drawn, TEST.x, 4, 1).scores, svm.scores)
    knn = knn_predict(drawn, TEST.x, ks=[4], temperature=0.07, num_classes=4)
    np.testing.assert_array_equal(make("knn")(drawn, TEST.x, 4, 1).scores, knn[4])


def test_svm_takes_marks():
    (drawn,) = draws(MARKS, 8, 1, seed=0)
    assert make("svm")(drawn, MARKS.x, 8, 0).scores.shape == (400, 3)
