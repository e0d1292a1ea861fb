"""Metrics of one label per image are scikit-learn's; of several labels, VOC's definition."""

import json

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from tract_transfer.evaluation import ClassificationEvaluator
from tract_transfer.evaluation.classification import (
    class_average_precision,
    confusion_matrix,
    cross_entropy,
    label_ranks,
    multilabel_metrics,
    per_class_accuracy,
)

NAMES = [f"c{i}" for i in range(7)]
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 7, 300)
LOGITS = RNG.normal(size=(300, 7)) + np.eye(7)[LABELS]


def evaluate(logits=LOGITS, labels=LABELS, batch=64):
    evaluator = ClassificationEvaluator(NAMES)
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        evaluator.update(torch.as_tensor(logits[part]), torch.as_tensor(labels[part]))
    return evaluator.compute(), evaluator.details()


def test_top_k_confusion_matrix_and_per_class_accuracy_are_scikit_learns():
    for k in (1, 2, 5):
        expected = sk.top_k_accuracy_score(LABELS, LOGITS, k=k, labels=range(7))
        assert (label_ranks(LOGITS, LABELS) < k).mean() == pytest.approx(expected, abs=1e-15)
    predicted = LOGITS.argmax(1)
    confusion = confusion_matrix(predicted, LABELS, 7)
    np.testing.assert_array_equal(confusion, sk.confusion_matrix(LABELS, predicted))
    expected = sk.recall_score(LABELS, predicted, average=None)
    np.testing.assert_allclose(per_class_accuracy(confusion), expected)


@pytest.mark.parametrize("scale", [1, 1e4])
def test_cross_entropy_is_torchs(scale):
    logits = LOGITS * scale
    inputs = torch.as_tensor(logits), torch.as_tensor(LABELS)
    expected = torch.nn.functional.cross_entropy(*inputs, reduction="none")
    np.testing.assert_allclose(cross_entropy(logits, LABELS), expected, atol=1e-10)


def test_a_model_with_constant_output_scores_one_class():
    metrics, _ = evaluate(np.zeros((70, 7)), np.arange(70) % 7)
    assert (metrics["top1"], metrics["top5"]) == pytest.approx((1 / 7, 5 / 7))


@pytest.mark.parametrize("batch", [1, 7, 300])
def test_evaluator_equals_the_functions_for_any_batch_size(batch):
    metrics, details = evaluate(batch=batch)
    confusion, ranks = confusion_matrix(LOGITS.argmax(1), LABELS, 7), label_ranks(LOGITS, LABELS)
    assert metrics["top1"] == (ranks < 1).mean() == np.trace(confusion) / 300
    assert metrics["top5"] == (ranks < 5).mean()
    assert metrics["mean_per_class"] == per_class_accuracy(confusion).mean()
    assert metrics["loss"] == pytest.approx(cross_entropy(LOGITS, LABELS).mean(), rel=1e-13)
    assert details["confusion_matrix"] == confusion.tolist()
    assert json.loads(json.dumps(details, allow_nan=False)) == details


def test_absent_classes_are_none_and_excluded_from_the_mean():
    metrics, details = evaluate(np.eye(7)[[0, 0, 2]], np.array([0, 2, 2]))
    assert list(details["per_class"].values()) == [1.0, None, 0.5, None, None, None, None]
    assert metrics["mean_per_class"] == 0.75


def test_top5_needs_more_than_five_classes_and_bfloat16_is_accepted():
    evaluator = ClassificationEvaluator(NAMES[:5])
    evaluator.update(torch.eye(5, dtype=torch.bfloat16), torch.arange(5))
    metrics = evaluator.compute()
    assert set(metrics) == {"top1", "mean_per_class", "loss"}
    assert metrics["top1"] == 1


# ---------------------------------------------------------------- several labels per image

SCORES = RNG.normal(size=(60, 3))
MARKS = RNG.choice([1, -1, 0], size=(60, 3), p=[0.3, 0.6, 0.1])
METHODS = ["11point", "area"]


def average_precision_by_definition(scores, marks, method):
    kept = sorted(
        (pair for pair in zip(-scores, marks, strict=True) if pair[1]), key=lambda p: p[0]
    )
    total, hits, points = sum(mark == 1 for _, mark in kept), 0, []
    for rank, (_, mark) in enumerate(kept, start=1):
        hits += mark == 1
        points.append((hits / total, hits / rank))
    recalls = sorted({recall for recall, _ in points if recall > 0})
    if method == "11point":
        recalls = [i / 10 for i in range(11)]
    return np.mean([max((p for r, p in points if r >= at), default=0.0) for at in recalls])


@pytest.mark.parametrize("method", METHODS)
def test_average_precision_is_the_definition(method):
    ours = class_average_precision(SCORES, MARKS, method)
    for k in range(3):
        expected = average_precision_by_definition(SCORES[:, k], MARKS[:, k], method)
        assert ours[k] == pytest.approx(expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_perfect_ranking_scores_1_and_excluded_images_change_nothing(method):
    assert (class_average_precision(MARKS.astype(float), MARKS, method) == 1).all()
    moved = class_average_precision(np.where(MARKS == 0, 1e6, SCORES), MARKS, method)
    np.testing.assert_array_equal(moved, class_average_precision(SCORES, MARKS, method))


def test_the_mean_is_over_classes_with_positives():
    marks = MARKS.copy()
    marks[:, 1] = -1
    metrics, details = multilabel_metrics(SCORES, marks, ["a", "b", "c"])
    for method in METHODS:
        by_class = details[f"ap_{method}"]
        assert by_class["b"] is None
        assert metrics[f"map_{method}"] == pytest.approx((by_class["a"] + by_class["c"]) / 2)
    assert details["num_images"] == 60
