import json

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from tract_transfer.evaluation import ClassificationEvaluator
from tract_transfer.evaluation.classification import (
    confusion_matrix,
    cross_entropy,
    label_ranks,
    mean_per_class_accuracy,
    per_class_accuracy,
)

NAMES = [f"c{i}" for i in range(7)]


def sample(n=300, num_classes=7, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, n)
    logits = rng.normal(size=(n, num_classes))
    logits[np.arange(n), labels] += 1
    return logits, labels


def top_k(logits, labels, k):
    return (label_ranks(logits, labels) < k).mean()


def evaluate(logits, labels, batch=64, names=NAMES):
    evaluator = ClassificationEvaluator(names)
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        evaluator.update(torch.as_tensor(logits[part]), torch.as_tensor(labels[part]))
    return evaluator.compute(), evaluator.details()


@pytest.mark.parametrize("k", [1, 2, 5, 7, 9])
def test_top_k_is_scikit_learns(k):
    logits, labels = sample()
    expected = sk.top_k_accuracy_score(labels, logits, k=k, labels=range(7)) if k < 7 else 1.0
    assert top_k(logits, labels, k) == pytest.approx(expected, abs=1e-15)


def test_confusion_and_per_class_are_scikit_learns():
    logits, labels = sample()
    predicted = logits.argmax(1)
    confusion = confusion_matrix(predicted, labels, 7)
    np.testing.assert_array_equal(confusion, sk.confusion_matrix(labels, predicted))
    expected = sk.recall_score(labels, predicted, average=None)
    np.testing.assert_allclose(per_class_accuracy(confusion), expected)
    assert mean_per_class_accuracy(confusion) == pytest.approx(
        sk.balanced_accuracy_score(labels, predicted)
    )


def test_cross_entropy_is_torchs_also_for_huge_logits():
    logits, labels = sample()
    for scale in (1, 1e4):
        expected = torch.nn.functional.cross_entropy(
            torch.as_tensor(logits * scale), torch.as_tensor(labels), reduction="none"
        )
        np.testing.assert_allclose(cross_entropy(logits * scale, labels), expected, atol=1e-10)


def test_ties_rank_as_a_stable_sort_and_a_constant_model_scores_one_class():
    logits = np.random.default_rng(0).integers(0, 3, (200, 7)).astype(float)
    labels = np.random.default_rng(1).integers(0, 7, 200)
    ranked = np.argsort(-logits, axis=1, kind="stable")
    np.testing.assert_array_equal(
        label_ranks(logits, labels), (ranked == labels[:, None]).argmax(1)
    )
    constant, _ = evaluate(np.zeros((70, 7)), np.arange(70) % 7)
    assert constant["top1"] == pytest.approx(1 / 7)
    assert constant["top5"] == pytest.approx(5 / 7)


@pytest.mark.parametrize("batch", [1, 7, 300])
def test_evaluator_is_the_functions_for_any_batch_size(batch):
    logits, labels = sample()
    metrics, details = evaluate(logits, labels, batch)
    confusion = confusion_matrix(logits.argmax(1), labels, 7)
    assert metrics["top1"] == top_k(logits, labels, 1) == np.trace(confusion) / 300
    assert metrics["top5"] == top_k(logits, labels, 5)
    assert metrics["mean_per_class"] == mean_per_class_accuracy(confusion)
    assert metrics["loss"] == pytest.approx(cross_entropy(logits, labels).mean(), rel=1e-13)
    assert details["confusion_matrix"] == confusion.tolist()
    assert json.loads(json.dumps(details, allow_nan=False)) == details


def test_relabelling_the_classes_permutes_the_confusion_matrix_only():
    logits, labels = sample()
    to = np.random.default_rng(3).permutation(7)
    metrics, details = evaluate(logits, labels)
    moved, moved_details = evaluate(logits[:, np.argsort(to)], to[labels])
    assert moved == pytest.approx(metrics)
    confusion = np.array(moved_details["confusion_matrix"])
    np.testing.assert_array_equal(confusion[np.ix_(to, to)], details["confusion_matrix"])


def test_absent_classes_are_named_none_and_left_out_of_the_mean():
    logits, labels = np.eye(7)[[0, 0, 2]], np.array([0, 2, 2])
    metrics, details = evaluate(logits, labels)
    assert list(details["per_class"].values()) == [1.0, None, 0.5, None, None, None, None]
    assert metrics["mean_per_class"] == 0.75


def test_top5_needs_more_than_five_classes_and_bfloat16_is_welcome():
    evaluator = ClassificationEvaluator(NAMES[:5])
    evaluator.update(torch.eye(5, dtype=torch.bfloat16), torch.arange(5))
    metrics = evaluator.compute()
    assert set(metrics) == {"top1", "mean_per_class", "loss"}
    assert metrics["top1"] == 1


def test_what_cannot_be_scored_is_an_error():
    evaluator = ClassificationEvaluator(NAMES)
    with pytest.raises(RuntimeError, match="compute"):
        evaluator.details()
    with pytest.raises(ValueError, match="No image"):
        evaluator.compute()
    logits = torch.zeros(4, 7)
    with pytest.raises(ValueError, match=r"0\.\.6, got 0\.\.7"):
        evaluator.update(logits, torch.tensor([0, 1, 2, 7]))
    with pytest.raises(ValueError, match="one a class"):
        evaluator.update(torch.zeros(4, 6), torch.zeros(4, dtype=torch.long))
    logits[0, :2] = torch.tensor([float("nan"), float("inf")])
    with pytest.raises(ValueError, match="2 of 28"):
        evaluator.update(logits, torch.zeros(4, dtype=torch.long))
