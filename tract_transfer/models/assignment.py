"""Which candidate boxes are objects, which are background, and which of them are trained on."""

# A candidates (anchors or proposals), G objects

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_area, box_iou

POSITIVE, NEGATIVE, NEITHER = 1, 0, -1
IGNORED_SHARE = 0.5


class Objects(NamedTuple):
    """The objects of a training image: `boxes` (G, 4) float32 xyxy pixels, `labels` (G,) in
    0..K-1, and `ignored` (M, 4), the boxes that are neither object nor background."""

    boxes: Tensor
    labels: Tensor
    ignored: Tensor


def assign(
    candidates: Tensor,
    objects: Objects,
    *,
    fg_iou: float,
    bg_iou: tuple[float, float],
    best_is_positive: bool = False,
) -> tuple[Tensor, Tensor]:
    """Match every candidate with the object it overlaps most.

    Args:
        candidates: (A, 4) xyxy.
        fg_iou: positive from this IoU on.
        bg_iou: negative where the IoU lies in [low, high), unless half the candidate or more lies
            within an ignored box.
        best_is_positive: the candidates that overlap an object most are positive, however little.

    Returns:
        status (A,): POSITIVE, NEGATIVE or NEITHER; matched (A,): indices of objects, 0 where there
        is none.
    """
    best = candidates.new_zeros(len(candidates))
    matched = torch.zeros(len(candidates), dtype=torch.int64, device=candidates.device)
    positive = torch.zeros_like(matched, dtype=torch.bool)
    if len(candidates) and len(objects.boxes):
        iou = box_iou(objects.boxes, candidates)  # (G, A)
        best, matched = iou.max(0)
        positive = best >= fg_iou
        if best_is_positive:
            most = iou.amax(1, keepdim=True)
            positive |= ((iou == most) & (most > 0)).any(0)  # an object that none overlaps has none
    low, high = bg_iou
    negative = (best >= low) & (best < high) & ~within(candidates, objects.ignored)
    status = torch.full_like(matched, NEITHER)
    status[negative] = NEGATIVE
    status[positive] = POSITIVE
    return status, matched


def within(boxes: Tensor, regions: Tensor) -> Tensor:
    """Return (A,) bool: whether half a box's own area or more lies in one of the (M, 4) regions."""
    if not len(regions) or not len(boxes):
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    corner = torch.maximum(boxes[:, None, :2], regions[None, :, :2])
    opposite = torch.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    shared = (opposite - corner).clamp(min=0).prod(-1)
    within_one: Tensor = shared.amax(1) >= IGNORED_SHARE * box_area(boxes).clamp(min=1e-6)
    return within_one


def sample(status: Tensor, count: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Draw at most `count` candidates: indices of positives, at most that share, and of negatives.

    Negatives fill up what positives leave.
    """
    positive = torch.where(status == POSITIVE)[0]
    negative = torch.where(status == NEGATIVE)[0]
    positive = _draw(positive, int(count * positive_fraction))
    return positive, _draw(negative, count - len(positive))


def _draw(indices: Tensor, count: int) -> Tensor:
    order = torch.randperm(len(indices), device=indices.device)
    return indices[order[:count]]
