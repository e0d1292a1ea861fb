"""Random detections on which ties, exact thresholds and every outcome abound."""

import numpy as np
import torch

from tract_transfer.evaluation.matching import Detections, GroundTruth, box_areas

NAMES = ["cat", "dog", "cow", "emu"]  # emu is absent


def images(n=25, seed=0, num_classes=3):
    """Small integer boxes and coarse scores: equal IoUs, exact thresholds and ties abound."""
    rng = np.random.default_rng(seed)

    def boxes(count):
        corner = rng.integers(0, 12, (count, 2))
        return np.concatenate([corner, corner + rng.integers(1, 9, (count, 2))], 1)

    made = []
    for image_id in rng.permutation(n) * 7:
        objects, found = rng.integers(0, 5), rng.integers(0, 14)
        truth, truth_labels = boxes(objects), rng.integers(0, num_classes, objects)
        guess, labels = boxes(found), rng.integers(0, num_classes, found)
        if objects:
            of = rng.integers(0, objects, found)
            near = rng.random(found) < 0.7
            shift = rng.integers(-1, 2, (found, 4)) * (rng.random((found, 1)) < 0.6)
            guess = np.where(near[:, None], truth[of] + shift, guess)
            labels = np.where(near, truth_labels[of], labels)
            guess[:, 2:] = np.maximum(guess[:, 2:], guess[:, :2] + 1)
        made.append(
            (
                {
                    "boxes": torch.tensor(guess).float(),
                    "scores": torch.tensor(rng.integers(0, 8, found) / 8).float(),
                    "labels": torch.tensor(labels),
                },
                {
                    "boxes": torch.tensor(truth).float(),
                    "labels": torch.tensor(truth_labels),
                    "difficult": torch.tensor(rng.random(objects) < 0.25),
                    "image_id": int(image_id),
                },
            )
        )
    return made


def rows(made):
    def column(side, key):
        return np.concatenate([pair[side][key].numpy() for pair in made])

    def ids(side):
        return np.concatenate([np.full(len(p[side]["boxes"]), p[1]["image_id"]) for p in made])

    boxes = column(1, "boxes")
    truth = GroundTruth(
        ids(1), column(1, "labels"), boxes, column(1, "difficult"), box_areas(boxes)
    )
    return (
        Detections(ids(0), column(0, "labels"), column(0, "boxes"), column(0, "scores")),
        truth,
    )
