"""Random detections with many ties, exact thresholds and all outcomes, and VOC's AP by loops."""

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
    """Small integer boxes and coarse scores: many equal IoUs, exact thresholds and ties."""
    rng = np.random.default_rng(seed)

    def boxes(count):
        corner = rng.integers(0, 12, (count, 2))
        return np.concatenate([corner, corner + rng.integers(1, 9, (count, 2))], 1)

    made = []
    for image_id in rng.permutation(n) * 7:
        objects, count = rng.integers(0, 5), rng.integers(0, 14)
        truth, truth_labels = boxes(objects), rng.integers(0, num_classes, objects)
        guess, labels = boxes(count), rng.integers(0, num_classes, count)
        if objects:
            of = rng.integers(0, objects, count)
            near = rng.random(count) < 0.7
            shift = rng.integers(-1, 2, (count, 4)) * (rng.random((count, 1)) < 0.6)
            guess = np.where(near[:, None], truth[of] + shift, guess)
            labels = np.where(near, truth_labels[of], labels)
            guess[:, 2:] = np.maximum(guess[:, 2:], guess[:, :2] + 1)
        detections = {
            "boxes": torch.tensor(guess).float(),
            "scores": torch.tensor(rng.integers(0, 8, count) / 8).float(),
            "labels": torch.tensor(labels),
        }
        target = {
            "boxes": torch.tensor(truth).float(),
            "labels": torch.tensor(truth_labels),
            "difficult": torch.tensor(rng.random(objects) < 0.25),
            "image_id": int(image_id),
        }
        made.append((detections, target))
    return made


def rows(made):
    """All images as the arrays that metrics take."""

    def columns(side, *keys):
        ids = [np.full(len(pair[side]["boxes"]), pair[1]["image_id"]) for pair in made]
        return [
            np.concatenate(parts)
            for parts in (ids, *([pair[side][key].numpy() for pair in made] for key in keys))
        ]

    truth = columns(1, "labels", "boxes", "difficult")
    return (
        Detections(*columns(0, "labels", "boxes", "scores")),
        GroundTruth(*truth, box_areas(truth[2])),
    )


def loop_ap(made, label, protocol, threshold):
    """VOC's definition, one box at a time: (AP or None, npos, outcomes best score first)."""
    ranked, npos, taken, outcomes = [], 0, set(), []
    for detections, truth in made:
        npos += int(((truth["labels"] == label) & ~truth["difficult"]).sum())
        for i in torch.nonzero(detections["labels"] == label).flatten().tolist():
            score, box = detections["scores"][i].item(), detections["boxes"][i].tolist()
            ranked.append((-score, truth["image_id"], i, box, truth))
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
