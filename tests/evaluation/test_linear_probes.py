"""Probes are torch's and scikit-learn's fits of what was selected, on the rows that count."""

import math

import numpy as np
import pytest
import torch
from probe_rows import TEST, TRAIN, clusters, marks_of
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from tract_transfer.evaluation.linear_probes import (
    accuracy_by_c,
    check_shots,
    draws,
    few_shot_fit,
    linear_probe,
    linear_svm,
    logistic_regression,
    one_hot_marks,
    train_linear,
)
from tract_transfer.evaluation.probes import Rows, Selection, hold_out_selection, knn_predict

SELECTION = hold_out_selection(TRAIN, 0.25, seed=0)
X, Y = torch.from_numpy(TRAIN.x), torch.from_numpy(TRAIN.y)


def top1(result):
    return (result.scores.argmax(1) == TEST.y).mean()


def standardized(x):
    scaler = StandardScaler().fit(TRAIN.x.astype(float))
    return torch.from_numpy(scaler.transform(x).astype(np.float32))


# -------------------------------------------------------------------------------------- SGD

POINTS = [(0.1, 0.0), (0.01, 0.0), (0.1, 0.05)]  # learning rate, weight decay
OPTIONS = {"max_epochs": 3, "batch_size": 32, "momentum": 0.9, "seed": 5, "num_classes": 4}


def probe(test_x=TEST.x, selection=SELECTION, lrs=(0.01, 0.1), weight_decays=(0.0,), **changed):
    options = {"lrs": lrs, "weight_decays": weight_decays, **OPTIONS, **changed}
    return linear_probe(TRAIN, test_x, selection=selection, **options)


@pytest.mark.parametrize("i", range(3))
def test_a_setting_of_a_grid_is_torchs_sgd(i):
    weights, biases = train_linear(X, Y, POINTS, **OPTIONS)
    lr, weight_decay = POINTS[i]
    layer = torch.nn.Linear(6, 4)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    groups = [
        {"params": [layer.weight], "weight_decay": weight_decay},
        {"params": [layer.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    total = 3 * math.ceil(200 / 32)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / total))
    )
    for epoch in range(3):
        order = np.random.default_rng([5, epoch]).permutation(200)
        for rows in np.split(order, range(32, 200, 32)):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(X[rows]), Y[rows]).backward()
            optimizer.step()
            cosine.step()
    torch.testing.assert_close(weights[i].T, layer.weight.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(biases[i], layer.bias.detach(), atol=1e-5, rtol=1e-4)


def test_the_best_setting_of_the_selection_is_trained_on_all_of_train():
    result = probe()
    val_top1 = result.details["val_top1"]
    assert list(val_top1) == ["lr 0.01, weight decay 0", "lr 0.1, weight decay 0"]
    lr = result.chosen["lr"]
    assert val_top1[f"lr {lr:g}, weight decay 0"] == max(val_top1.values())
    weight, bias = train_linear(standardized(TRAIN.x), Y, [(lr, 0.0)], **OPTIONS)
    expected = standardized(TEST.x) @ weight[0] + bias[0]
    np.testing.assert_allclose(result.scores, expected, atol=1e-5)
    assert top1(result) > 0.8


def test_of_equal_settings_the_smallest_is_chosen_and_a_diverged_one_never():
    easy = Rows(SELECTION.val.x[:1], SELECTION.val.y[:1])
    chosen = probe(selection=SELECTION._replace(val=easy), lrs=[0.2, 0.1]).chosen
    assert chosen == {"lr": 0.1, "weight_decay": 0.0}
    wild = probe(lrs=[0.1, 1e5], weight_decays=[1.0], max_epochs=30)
    assert wild.details["val_top1"]["lr 100000, weight decay 1"] is None


# ---------------------------------------------------------------------- logistic regression


def logistic(train=TRAIN, test_x=TEST.x, cs=(0.01, 0.1, 1.0), selection=None, **changed):
    selection = selection or hold_out_selection(train, 0.25, seed=0)
    options = {"max_iters": 500, "num_classes": 4, **changed}
    return logistic_regression(train, test_x, selection=selection, cs=cs, **options)


def fitted_pipeline(c, rows=TRAIN):
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=500))
    return model.fit(rows.x.astype(float), rows.y)


def test_it_is_scikit_learns_on_all_of_train_with_the_selected_c():
    result = logistic()
    best = result.chosen["c"]
    expected = fitted_pipeline(best).predict_log_proba(TEST.x.astype(float))
    np.testing.assert_allclose(result.scores, expected, atol=1e-6)
    val_top1 = result.details["val_top1"]
    assert list(val_top1) == ["0.01", "0.1", "1"]
    assert val_top1[f"{best:g}"] == max(val_top1.values())
    assert result.details["converged"]
    assert top1(result) > 0.8


def test_c_is_selected_on_the_selection_alone():
    selection, cs = Selection(clusters(60, seed=3), clusters(60, seed=4)), (1e-6, 1e-2, 1.0, 1e4)
    accuracies = accuracy_by_c([selection], cs, 500)
    for c, value in accuracies.items():
        expected = fitted_pipeline(c, selection.fit).score(*selection.val)
        assert value == pytest.approx(expected, abs=0.02)
    chosen = logistic(cs=cs, selection=selection).chosen["c"]
    assert chosen == next(c for c in cs if accuracies[c] == max(accuracies.values()))


@pytest.mark.parametrize("probe", [probe, logistic])
def test_test_images_do_not_influence_the_selection(probe):
    result, other = probe(), probe(test_x=TEST.x[:1] * 100)
    assert (other.chosen, other.details) == (result.chosen, result.details)


@pytest.mark.parametrize("present", [(1, 3), (0, 2, 5)])
def test_absent_classes_have_a_column_that_never_wins(present):
    y = np.array(present)[np.arange(len(TRAIN.x)) % len(present)]
    scores = logistic(Rows(TRAIN.x, y), num_classes=7).scores
    assert scores.shape == (80, 7)
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(np.exp(scores).sum(1), 1)
    absent = [k for k in range(7) if k not in present]
    assert (scores[:, absent].max(1) < scores[:, list(present)].min(1)).all()


def test_a_class_with_one_row_is_fitted_and_unfinished_fits_are_reported():
    y = np.where(np.arange(200) == 0, 4, TRAIN.y)
    result = logistic(Rows(TRAIN.x, y), max_iters=1, num_classes=5)
    assert result.scores.shape == (80, 5)
    assert not result.details["converged"]


# -------------------------------------------------------------------------------------- SVM

MARKS = marks_of(120)


def svm(train=MARKS, test_x=MARKS.x, cs=(0.01, 1.0, 100.0), max_iters=2000):
    return linear_svm(train, test_x, cs=cs, folds=3, max_iters=max_iters, seed=0)


def svc(c):
    return LinearSVC(C=c, class_weight={1: 2, -1: 1}, max_iter=50000, tol=1e-8)


def cross_validated_precision(c, x, y):
    values = []
    for fit, val in StratifiedKFold(3, shuffle=True, random_state=0).split(x, y):
        scores = svc(c).fit(x[fit], y[fit]).decision_function(x[val])
        values.append(average_precision_score(y[val] == 1, scores))
    return np.mean(values)


def test_each_class_is_scikit_learns_on_the_rows_that_count_with_the_selected_c():
    result = svm()
    unit = MARKS.x / np.linalg.norm(MARKS.x, axis=1, keepdims=True)
    for k, c in enumerate(result.chosen["c"]):
        used = MARKS.y[:, k] != 0
        x, y = unit[used], MARKS.y[used, k]
        assert len(y) < 120
        scores = svc(c).fit(x, y).decision_function(unit)
        np.testing.assert_allclose(result.scores[:, k], scores, atol=0.02)
        by_c = {c: cross_validated_precision(c, x, y) for c in (0.01, 1.0, 100.0)}
        assert by_c[c] >= max(by_c.values()) - 1e-3
    assert result.details == {"fits_at_max_iters": 0}


def test_rows_that_do_not_count_lengths_and_other_test_images_change_nothing():
    scores = svm().scores
    moved = MARKS.x.copy()
    moved[MARKS.y[:, 1] == 0] *= -1
    np.testing.assert_array_equal(scores[:, 1], svm(Rows(moved, MARKS.y)).scores[:, 1])
    np.testing.assert_allclose(svm(Rows(MARKS.x * 3, MARKS.y)).scores, scores, atol=1e-3)
    np.testing.assert_allclose(svm(test_x=MARKS.x[:1]).scores, scores[:1])
    assert svm(max_iters=1).details["fits_at_max_iters"] == 3  # unfinished fits are counted


def test_a_class_without_positives_ranks_last_and_one_with_a_single_row_has_c_1():
    marks = one_hot_marks(TRAIN.y, 6)
    marks[7, 5] = 1
    result = svm(Rows(TRAIN.x, marks), TEST.x, cs=(0.1, 1.0))
    assert result.chosen["c"][4] is None
    assert result.chosen["c"][5] == 1.0
    assert (result.scores[:, 4] < result.scores[:, [0, 1, 2, 3, 5]].min(1)).all()
    assert top1(result) > 0.8


# --------------------------------------------------------------------------------- few shots

MANY_MARKS = marks_of(400, ignored=0.02)
FEW_SHOT = {"cs": (0.1, 1.0, 10.0), "folds": 3, "temperature": 0.07, "seed": 2}


def few_shot(name, drawn, k, num_classes=4, **changed):
    options = {**FEW_SHOT, **changed}
    return few_shot_fit(name, drawn, TEST.x, k, num_classes=num_classes, **options)


@pytest.mark.parametrize("k", [1, 2, 50])
def test_a_draw_has_k_rows_of_each_class(k):
    for drawn in draws(TRAIN, k, 3, seed=0):
        np.testing.assert_array_equal(np.bincount(drawn.y), [k] * 4)
        assert len({tuple(row) for row in drawn.x}) == 4 * k
        assert {tuple(row) for row in drawn.x} <= {tuple(row) for row in TRAIN.x}


def test_a_draw_depends_on_seed_and_sampling_and_skips_a_class_without_rows():
    xs = [[drawn.x for drawn in draws(TRAIN, 2, 3, seed)] for seed in (0, 1)]
    np.testing.assert_array_equal(xs[0], [drawn.x for drawn in draws(TRAIN, 2, 5, seed=0)][:3])
    assert (xs[0][0] != xs[0][1]).any()
    assert (xs[0][0] != xs[1][0]).any()
    y = TRAIN.y + (TRAIN.y >= 2)
    check_shots(y, [1, 50], "abcde")
    (drawn,) = draws(Rows(TRAIN.x, y), 3, 1, seed=0)
    np.testing.assert_array_equal(np.bincount(drawn.y), [3, 3, 0, 3, 3])


@pytest.mark.parametrize("k", [1, 4, 16])
def test_a_draw_of_marks_keeps_k_positives_and_their_share_of_negatives(k):
    for drawn in draws(MANY_MARKS, k, 2, seed=0):
        assert ((drawn.y == MANY_MARKS.y) | (drawn.y == 0)).all()
        np.testing.assert_array_equal((drawn.y == 1).sum(0), [k] * 3)
        np.testing.assert_array_equal((drawn.y == -1).sum(0), [2 * k] * 3)
    few = Rows(MANY_MARKS.x, np.where(np.arange(400)[:, None] < 395, 1, -1) + 0 * MANY_MARKS.y)
    (drawn,) = draws(few, 8, 1, seed=0)
    np.testing.assert_array_equal((drawn.y == -1).sum(0), [5] * 3)  # all negatives there are


def test_one_shot_logistic_regression_uses_c_1_and_more_shots_select_on_the_drawn_rows():
    (one,) = draws(TRAIN, 1, 1, seed=0)
    result = few_shot("logistic", one, 1)
    assert result.chosen == {"c": 1.0}
    expected = fitted_pipeline(1.0, one).predict_log_proba(TEST.x.astype(float))
    np.testing.assert_allclose(result.scores, expected, atol=1e-6)
    (more,) = draws(TRAIN, 20, 1, seed=0)
    result = few_shot("logistic", more, 20, cs=(1e-9, 1.0))
    assert result.chosen == {"c": 1.0}
    assert top1(result) > 0.6
    assert few_shot("logistic", more, 20, cs=(5.0,)).chosen == {"c": 5.0}


@pytest.mark.filterwarnings("error")
def test_as_many_classes_as_rows_do_not_warn():
    many = Rows(TRAIN.x[:40], np.arange(40))
    assert few_shot("logistic", many, 1, num_classes=40).scores.shape == (80, 40)


def test_few_shot_svm_and_knn_are_the_probes_on_the_drawn_rows():
    (drawn,) = draws(TRAIN, 4, 1, seed=0)
    marks = Rows(drawn.x, one_hot_marks(drawn.y, 4))
    expected = linear_svm(marks, TEST.x, cs=(0.1, 1.0, 10.0), folds=3, max_iters=2000, seed=2)
    for rows in (drawn, marks):
        np.testing.assert_array_equal(few_shot("svm", rows, 4).scores, expected.scores)
    votes = knn_predict(drawn, TEST.x, ks=[4], temperature=0.07, num_classes=4)
    np.testing.assert_array_equal(few_shot("knn", drawn, 4).scores, votes[4])
