from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tract_transfer.evaluation import probes
from tract_transfer.evaluation.probes import (
    extract_features,
    knn_predict,
    logistic_regression,
    stratified_part,
)


def clusters(n, num_classes=4, dim=6, seed=0, spread=1.5):
    centres = np.random.default_rng(99).normal(size=(num_classes, dim)) * 2
    rng = np.random.default_rng(seed)
    y = np.arange(n) % num_classes
    x = centres[y] + rng.normal(size=(n, dim)) * spread
    return x.astype(np.float32), y


TRAIN_X, TRAIN_Y = clusters(200)
TEST_X, TEST_Y = clusters(80, seed=1)
OPTIONS = {"cs": (0.01, 0.1, 1.0), "val_fraction": 0.25, "seed": 0, "max_iters": 500}


def brute_force_knn(k, temperature):
    scores = np.zeros((len(TEST_X), 4))
    for i, x in enumerate(TEST_X.astype(float)):
        near = [(t @ x / np.linalg.norm(t) / np.linalg.norm(x)) for t in TRAIN_X.astype(float)]
        for j in sorted(range(len(near)), key=lambda j: -near[j])[:k]:
            scores[i, TRAIN_Y[j]] += np.exp(near[j] / temperature)
    return scores / scores.sum(1, keepdims=True)


@pytest.mark.parametrize("block", [1, 700, 2**24])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (10, 0.07), (200, 1.0)])
def test_knn_is_the_definition_for_any_block(monkeypatch, k, temperature, block):
    monkeypatch.setattr(probes, "_MAX_SIMILARITIES", block)
    scores = knn_predict(TRAIN_X, TRAIN_Y, TEST_X, k, temperature, 4)
    np.testing.assert_allclose(scores, brute_force_knn(k, temperature), atol=1e-4)


def test_knn_ignores_length_order_and_survives_extreme_temperatures():
    scores = knn_predict(TRAIN_X, TRAIN_Y, TEST_X, 10, 0.07, 5)
    order = np.random.default_rng(0).permutation(len(TRAIN_X))
    moved = knn_predict(TRAIN_X[order] * 3, TRAIN_Y[order], TEST_X * 7, 10, 0.07, 5)
    np.testing.assert_allclose(moved, scores, atol=1e-4)
    assert (scores[:, 4] == 0).all()  # a class without training rows
    nearest = knn_predict(TRAIN_X, TRAIN_Y, TEST_X, 10, 1e-9, 5).argmax(1)
    np.testing.assert_array_equal(nearest, knn_predict(TRAIN_X, TRAIN_Y, TEST_X, 1, 1, 5).argmax(1))
    assert np.isfinite(knn_predict(TRAIN_X, TRAIN_Y, TEST_X * 0, 10, 0.07, 5)).all()


def test_knn_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"evaluation\.knn\.k must be in 1\.\.200"):
        knn_predict(TRAIN_X, TRAIN_Y, TEST_X, 201, 0.07, 4)
    with pytest.raises(ValueError, match=r"0\.\.2"):
        knn_predict(TRAIN_X, TRAIN_Y, TEST_X, 5, 0.07, 3)
    broken = TEST_X.copy()
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 80 test rows"):
        knn_predict(TRAIN_X, TRAIN_Y, broken, 5, 0.07, 4)


def test_logistic_refits_on_all_of_train_with_the_chosen_c():
    result = logistic_regression(TRAIN_X, TRAIN_Y, TEST_X, **OPTIONS)
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=result.best_c, max_iter=500))
    oracle.fit(TRAIN_X.astype(float), TRAIN_Y)
    np.testing.assert_allclose(
        result.scores, oracle.predict_log_proba(TEST_X.astype(float)), atol=1e-6
    )
    assert list(result.val_accuracies) == sorted(OPTIONS["cs"])
    assert result.val_accuracies[result.best_c] == max(result.val_accuracies.values())
    assert result.converged
    assert (result.scores.argmax(1) == TEST_Y).mean() > 0.8


def test_logistic_chooses_c_without_the_test_images():
    a = logistic_regression(TRAIN_X, TRAIN_Y, TEST_X, **OPTIONS)
    b = logistic_regression(TRAIN_X, TRAIN_Y, TEST_X[:1] * 100, **OPTIONS)
    assert (a.best_c, a.val_accuracies) == (b.best_c, b.val_accuracies)


def test_logistic_standardises_so_units_do_not_matter():
    scale = np.float32(2.0) ** np.arange(6)
    a = logistic_regression(TRAIN_X, TRAIN_Y, TEST_X, **OPTIONS)
    b = logistic_regression(TRAIN_X * scale + 1, TRAIN_Y, TEST_X * scale + 1, **OPTIONS)
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-3)


@pytest.mark.parametrize("present", [(1, 3), (0, 2, 5)])
def test_logistic_gives_absent_classes_a_column_that_never_wins(present):
    y = np.array(present)[np.arange(len(TRAIN_X)) % len(present)]
    result = logistic_regression(TRAIN_X, y, TEST_X, **OPTIONS, num_classes=7)
    assert result.scores.shape == (80, 7)
    assert np.isfinite(result.scores).all()
    assert set(result.scores.argmax(1)) <= set(present)
    np.testing.assert_allclose(np.exp(result.scores).sum(1), 1)
    absent = [k for k in range(7) if k not in present]
    assert result.scores[:, absent].max() < result.scores[:, list(present)].min()


def test_logistic_serves_a_class_of_one_row_and_reports_unfinished_fits():
    y = TRAIN_Y.copy()
    y[0] = 4
    result = logistic_regression(TRAIN_X, y, TEST_X, **(OPTIONS | {"max_iters": 1}))
    assert result.scores.shape == (80, 5)
    assert not result.converged


def test_logistic_names_what_is_wrong():
    with pytest.raises(ValueError, match="2 classes"):
        logistic_regression(TRAIN_X, TRAIN_Y * 0, TEST_X, **OPTIONS)
    with pytest.raises(ValueError, match="values of C"):
        logistic_regression(TRAIN_X, TRAIN_Y, TEST_X, **(OPTIONS | {"cs": ()}))
    with pytest.raises(ValueError, match=r"in \(0, 1\)"):
        logistic_regression(TRAIN_X, TRAIN_Y, TEST_X, **(OPTIONS | {"val_fraction": 1.0}))


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_stratified_part_takes_the_share_of_every_class(fraction):
    labels = np.random.default_rng(0).choice(6, 500, p=[0.4, 0.3, 0.2, 0.07, 0.02, 0.01])
    part = stratified_part(labels, fraction, seed=0)
    sizes, taken = np.bincount(labels), np.bincount(labels[part], minlength=6)
    assert (np.abs(taken - sizes * fraction) < 1).all()
    assert abs(part.sum() - 500 * fraction) < 1
    np.testing.assert_array_equal(part, stratified_part(labels, fraction, seed=0))
    assert (part != stratified_part(labels, fraction, seed=1)).any()


def batches(images, size):
    for start in range(0, len(images), size):
        part = images[start : start + size]
        yield SimpleNamespace(
            images=part,
            targets=torch.arange(start, start + len(part)) % 3,
            indices=torch.arange(start, start + len(part)) + 100,
        )


def test_features_come_out_in_order_as_float32_without_a_graph():
    images = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8)
    weight = torch.nn.Parameter(torch.randn(48, 5))

    def pooled(x):
        assert torch.is_inference_mode_enabled()
        return (x.flatten(1).float() @ weight).to(torch.bfloat16)

    x, y, indices = extract_features(pooled, batches(images, 4), "cpu")
    expected = (images.flatten(1).float() @ weight).to(torch.bfloat16).float()
    np.testing.assert_array_equal(x, expected.detach().numpy())
    assert x.dtype == np.float32
    np.testing.assert_array_equal(y, np.arange(10) % 3)
    np.testing.assert_array_equal(indices, np.arange(10) + 100)


def test_features_must_exist_and_be_finite():
    with pytest.raises(ValueError, match="No batch"):
        extract_features(lambda x: x, [], "cpu")
    with pytest.raises(ValueError, match="4 of 4 extracted"):
        extract_features(
            lambda x: x.flatten(1).float() / 0, batches(torch.zeros(4, 3, 2, 2), 4), "cpu"
        )
