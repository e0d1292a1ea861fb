"""What evaluators and probes refuse: the error names the problem, its location and a fix."""

import numpy as np
import pytest
import torch
from probe_rows import TEST, TRAIN, batches, marks_of
from random_detections import NAMES, images

from tract_transfer.evaluation import EVALUATORS, ClassificationEvaluator, check_metric
from tract_transfer.evaluation.classification import multilabel_metrics
from tract_transfer.evaluation.linear_probes import check_shots, linear_probe, linear_svm
from tract_transfer.evaluation.probes import (
    Rows,
    extract_features,
    hold_out_selection,
    knn_predict,
)

MARKS = marks_of(60)
NAN, ZEROS = float("nan"), torch.zeros(4, 7)


def classify(logits=None, labels=(0, 1, 2, 3)):
    evaluator = ClassificationEvaluator([f"c{i}" for i in range(7)])
    if logits is not None:
        evaluator.update(logits, torch.tensor(labels))
    return evaluator.compute()


def features(pooled, count=6):
    return extract_features(pooled, batches(torch.zeros(count, 3, 2, 2), 4), "cpu")


def train_linear(**changed):
    selection = hold_out_selection(TRAIN, 0.25, seed=0)
    sizes = {"max_epochs": 30, "batch_size": 32, "momentum": 0.9, "seed": 5, "num_classes": 4}
    return linear_probe(TRAIN, TEST.x, selection=selection, **sizes, **changed)


def svm(marks):
    return linear_svm(Rows(MARKS.x, marks), MARKS.x, cs=(1.0,), folds=3, max_iters=9, seed=0)


def detect(change=lambda *pair: [[part] for part in pair], names=NAMES, made=None, protocol="coco"):
    """Evaluate random images, whose detections and targets `change` spoils."""
    evaluator = EVALUATORS.get(protocol)(names)
    for detections, target in images() if made is None else made:
        evaluator.update(*change(dict(detections), dict(target)))
    return evaluator.compute()


def spoil(side, key, value, **options):
    def change(*pair):
        pair[side][key] = value(pair[side][key])
        return [[part] for part in pair]

    return detect(change, **options)


# What is wrong -> how to cause it, and the message.
TABLE = {
    "an evaluation without images": (classify, "No image"),
    "labels beyond the classes (evaluation)": (
        lambda: classify(ZEROS, (0, 1, 2, 7)), r"0\.\.6, got 0\.\.7",
    ),
    "logits of another number of classes": (lambda: classify(ZEROS[:, 1:]), r"logits \(B, 7\)"),
    "logits that are not finite": (
        lambda: classify(torch.tensor([[NAN, torch.inf, *[0.0] * 5]] * 2), (0, 1)), "4 of 14",
    ),
    "top5 of too few classes": (
        lambda: check_metric("logistic_top5", 5),
        "more than 5 classes, and there are 5. Use logistic_top1",
    ),
    "test images without a positive": (
        lambda: multilabel_metrics(MARKS.y.astype(float), MARKS.y * 0 - 1, ["a", "b", "c"]),
        r"No class has a positive.*data\.test",
    ),
    "no batch to extract features from": (lambda: features(None, count=0), "No batch"),
    "features that are not finite": (
        lambda: features(lambda x: x.flatten(1).float() / 0),
        r"6 of 6 rows .*\(images 100, 101, 102, 103, 104, \.\.\.\)",
    ),
    "too few training images to select on": (
        lambda: hold_out_selection(Rows(TRAIN.x[:3], TRAIN.y[:3]), 0.9, seed=0),
        r"2 classes to fit .* or set data\.val",
    ),
    "more neighbours than training images": (
        lambda: knn_predict(TRAIN, TEST.x, ks=[10, 201], temperature=0.07, num_classes=4),
        r"evaluation\.knn\.ks must be in 1\.\.200",
    ),
    "a linear probe that always diverges": (
        lambda: train_linear(lrs=[1e5], weight_decays=[1e3]), r"Lower evaluation\.linear\.lrs",
    ),
    "marks without negatives": (lambda: svm(abs(MARKS.y)), "No class has both"),
    "more shots than a class has images": (
        lambda: check_shots(np.array([0, 0, 0, 2, 2]), [1, 3], ["a", "b", "c"]),
        r"few_shot\.ks: class 'c' has 2 .* fewer than k = 3",
    ),
    "more shots than a class has positives": (
        lambda: check_shots(np.array([[1, 1], [1, -1], [0, 0]]), [2], ["x", "y"]),
        "class 'y' has 1 training images",
    ),
    "training images that show no class": (
        lambda: check_shots(np.array([[0, -1]]), [1], ["x", "y"]), "No training image shows a",
    ),
    "a detection evaluation without images": (lambda: detect(made=[]), "No image"),
    "scores that are not finite": (
        lambda: spoil(0, "scores", lambda scores: scores * NAN), r"rows of image_id \d+",
    ),
    "boxes that are not finite": (
        lambda: spoil(0, "boxes", lambda boxes: boxes / 0), r"rows of image_id \d+",
    ),
    "more labels than boxes": (
        lambda: spoil(1, "labels", lambda labels: labels.repeat(2)),
        r"image_id \d+: each object needs 4 box coordinates",
    ),
    "more predictions than targets": (
        lambda: detect(lambda detections, target: ([detections] * 2, [target])),
        "2 predictions for 1",
    ),
    "an image evaluated twice": (
        lambda: detect(made=images()[:2] * 2), "once: 2 were repeated, first image_id",
    ),
    "labels that count the background as a class": (
        lambda: detect(names=NAMES[:2]), r"0\.\.1, got 0\.\.2.*background",
    ),
    "an evaluated split whose objects are all difficult": (
        lambda: spoil(1, "difficult", torch.ones_like, protocol="area"), "not difficult",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_it_is_refused(refused, name):
    cause, message = TABLE[name]
    with refused(name, ValueError, match=message):
        cause()
