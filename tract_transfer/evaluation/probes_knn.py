"""Weighted nearest neighbours on frozen features."""

# N images (train or test), D features, K classes

from collections.abc import Sequence

import numpy as np

from tract_transfer.evaluation.probes import Features, Rows, Scores, check_probe, unit_rows

# Similarities held at once; with the indices of the partition about 12 bytes each.
_MAX_SIMILARITIES = 2**24


def knn_predict(
    train: Rows,
    test_x: Features,
    *,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
) -> dict[int, Scores]:
    """Return k -> (N, K) the share of each class in the vote of the k nearest training images.

    A neighbour of cosine similarity s votes with weight exp(s / temperature) (Wu et al. 2018,
    as in DINO). Weights are taken relative to the nearest one, so no temperature overflows them.
    A zero feature vector has similarity 0 to everything. The similarities are computed once for
    all `ks`, a block of test images at a time.

    Raises:
        ValueError: no k or one not in 1..len(train.x), temperature <= 0, shapes or labels that do
            not fit, or features that are not finite.
    """
    check_probe(train, test_x, num_classes)
    check_ks(ks, len(train.x))
    if not temperature > 0:
        raise ValueError(f"The temperature of kNN must be > 0, got {temperature}.")
    train_unit, test_unit = unit_rows(train.x), unit_rows(test_x)
    scores = {k: np.empty((len(test_x), num_classes), np.float32) for k in ks}
    most, step = max(ks), max(1, _MAX_SIMILARITIES // len(train.x))
    for start in range(0, len(test_x), step):
        similarity = test_unit[start : start + step] @ train_unit.T
        nearest = np.argpartition(similarity, -most, axis=1)[:, -most:]
        near = np.take_along_axis(similarity, nearest, axis=1).astype(np.float64)
        order = np.argsort(-near, axis=1, kind="stable")
        nearest = np.take_along_axis(nearest, order, axis=1)
        near = np.take_along_axis(near, order, axis=1)
        weights = np.exp((near - near[:, :1]) / temperature)
        cells = np.arange(len(near))[:, None] * num_classes + train.y[nearest]
        for k, found in scores.items():
            votes = weights[:, :k] / weights[:, :k].sum(axis=1, keepdims=True)
            sums = np.bincount(
                cells[:, :k].ravel(), votes.ravel(), minlength=len(near) * num_classes
            )
            found[start : start + step] = sums.reshape(len(near), num_classes)
    return scores


def check_ks(ks: Sequence[int], num_train: int) -> None:
    """Raise ValueError where `ks` is empty or has one that is not in 1..num_train."""
    if len(ks) == 0 or not all(1 <= k <= num_train for k in ks):
        raise ValueError(
            f"evaluation.knn.ks must be in 1..{num_train}, the number of training images; got "
            f"{list(ks)}. Leave out what is larger, or give the probe more training images."
        )
