"""Random detections on which ties, exact thresholds and every outcome abound, and VOC by loops."""

import numpy as np
import torch

from tract_transfer.evaluation.voc import (
    FALSE_POSITIVE,
    IGNORED,
    TRUE_POSITIVE,
    Detections,
    GroundTruth,
    box_areas,
)

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


def loop_ap(made, label, protocol, threshold):
    """VOC's definition, one box at a time: (AP or None, npos, outcomes best score first)."""
    ranked, npos, taken, outcomes = [], 0, set(), []
    for found, truth in made:
        npos += sum(
            int(c) == label and not d
            for c, d in zip(truth["labels"], truth["difficult"], strict=True)
        )
        for i, score in enumerate(found["scores"].tolist()):
            if found["labels"][i] == label:
                ranked.append((-score, truth["image_id"], i, found["boxes"][i].tolist(), truth))
    for _, image_id, _, box, truth in sorted(ranked, key=lambda r: r[:3]):
        best, owner = -1.0, -1
        for j, other in enumerate(truth["boxes"].tolist()):
            iou = loop_iou(box, other, protocol.pixel_offset)
            if truth["labels"][j] == label and iou > best:
                best, owner = iou, j
        enough = best > threshold if protocol.iou_strict else best >= threshold
        if owner >= 0 and enough and truth["difficult"][owner]:
            outcomes.append(IGNORED)
        elif owner >= 0 and enough and (image_id, owner) not in taken:
            taken.add((image_id, owner))
            outcomes.append(TRUE_POSITIVE)
        else:
            outcomes.append(FALSE_POSITIVE)
    if npos == 0:
        return None, 0, outcomes
    points, tp, fp = [], 0, 0
    for outcome in outcomes:
        tp, fp = tp + (outcome == TRUE_POSITIVE), fp + (outcome == FALSE_POSITIVE)
        if outcome != IGNORED:
            points.append((tp, tp / (tp + fp)))  # recall in objects
    if protocol.method == "11point":
        best_at = [max([p for n, p in points if 10 * n >= t * npos], default=0) for t in range(11)]
        return sum(best_at) / 11, npos, outcomes
    best_at = [max([p for n, p in points if n >= t], default=0) for t in range(1, npos + 1)]
    return sum(best_at) / npos, npos, outcomes


def loop_iou(a, b, offset):
    def area(x1, y1, x2, y2):
        return max(x2 - x1 + offset, 0) * max(y2 - y1 + offset, 0)

    common = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return common / (area(*a) + area(*b) - common)
