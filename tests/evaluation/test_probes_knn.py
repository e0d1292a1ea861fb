import numpy as np
import pytest
from probe_rows import TEST, TRAIN
from sklearn.neighbors import KNeighborsClassifier

from tract_transfer.evaluation import probes as probes_knn
from tract_transfer.evaluation.probes import Rows, knn_predict

KS = (1, 10, 200)


def predict(train=TRAIN, test_x=TEST.x, ks=KS, temperature=0.07, num_classes=4):
    return knn_predict(train, test_x, ks=ks, temperature=temperature, num_classes=num_classes)


def brute_force_knn(k, temperature):
    scores = np.zeros((len(TEST.x), 4))
    for i, x in enumerate(TEST.x.astype(float)):
        near = [(t @ x / np.linalg.norm(t) / np.linalg.norm(x)) for t in TRAIN.x.astype(float)]
        for j in sorted(range(len(near)), key=lambda j: -near[j])[:k]:
            scores[i, TRAIN.y[j]] += np.exp(near[j] / temperature)
    return scores / scores.sum(1, keepdims=True)


@pytest.mark.parametrize("block", [1, 700, 2**24])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_knn_is_the_definition_for_any_block(monkeypatch, temperature, block):
    monkeypatch.setattr(probes_knn, "_MAX_SIMILARITIES", block)
    scores = predict(temperature=temperature)
    assert list(scores) == list(KS)
    for k, found in scores.items():
        np.testing.assert_allclose(found, brute_force_knn(k, temperature), atol=1e-4)


def test_one_k_is_the_same_alone_or_among_others():
    for k, found in predict().items():
        np.testing.assert_allclose(found, predict(ks=[k])[k], atol=1e-6)


@pytest.mark.parametrize("k", KS)
def test_knn_is_scikit_learns_with_these_weights(k):
    def votes(distance):
        return np.exp((1 - distance) / 0.07)

    oracle = KNeighborsClassifier(k, metric="cosine", weights=votes).fit(TRAIN.x, TRAIN.y)
    np.testing.assert_allclose(predict()[k], oracle.predict_proba(TEST.x), atol=1e-3)


def test_knn_ignores_length_and_order_and_survives_extreme_temperatures():
    scores = predict(num_classes=5)[10]
    order = np.random.default_rng(0).permutation(len(TRAIN.x))
    shuffled = Rows(TRAIN.x[order] * 3, TRAIN.y[order])
    np.testing.assert_allclose(predict(shuffled, TEST.x * 7, num_classes=5)[10], scores, atol=1e-4)
    assert (scores[:, 4] == 0).all()  # a class without training rows
    cold = predict(temperature=1e-9)
    np.testing.assert_array_equal(cold[10].argmax(1), cold[1].argmax(1))
    assert np.isfinite(predict(test_x=TEST.x * 0)[10]).all()


def test_knn_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"evaluation\.knn\.ks must be in 1\.\.200"):
        predict(ks=[10, 201])
    with pytest.raises(ValueError, match="temperature of kNN must be > 0"):
        predict(temperature=0.0)
