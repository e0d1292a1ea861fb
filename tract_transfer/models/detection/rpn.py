"""The region proposal network (Ren et al., NeurIPS 2015)."""

# B images, A anchors or other candidates, G objects, L feature maps

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import batched_nms, box_area, box_iou, clip_boxes_to_image, remove_small_boxes

POSITIVE, NEGATIVE, NEITHER = 1, 0, -1
IGNORED_SHARE = 0.5
SMALLEST_PX = 1e-3  # the log size of a proposal without area is not finite

STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Sizes = Sequence[tuple[int, int]]  # (height, width) of each image


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RpnOptions:
    """The region proposal network: its anchors, training samples and proposals.

    Attributes:
        anchor_scales: anchor sides in units of the feature map's stride.
        anchor_ratios: height over width.
        anchor_offset: their center in a cell: 0.0 is its corner, 0.5 its middle (py-faster-rcnn).
        drop_cross_boundary: train without anchors that leave the image (py-faster-rcnn).
        fg_iou: an anchor is positive from this IoU with an object, or if it is the object's best.
        bg_iou: an anchor is negative below this IoU.
        samples_per_image, positive_fraction: anchors in the loss; largest share of positives.
        smooth_l1_beta: where the box loss turns from quadratic to linear; 0 is the L1 loss.
        pre_nms_train, pre_nms_test: best anchors of each feature map that enter the NMS.
        post_nms_train, post_nms_test: proposals per image that remain after it.
        nms_iou: of two proposals that overlap more than this, the better one remains.
        min_size_px: minimum side of a proposal, in pixels of the image before resizing.
    """

    anchor_scales: Annotated[Sequence[Positive], Field(min_length=1)] = (8.0,)
    anchor_ratios: Annotated[Sequence[Positive], Field(min_length=1)] = (0.5, 1.0, 2.0)
    anchor_offset: Annotated[float, Field(ge=0, lt=1)] = 0.0
    drop_cross_boundary: bool = False
    fg_iou: Share = 0.7
    bg_iou: Share = 0.3
    samples_per_image: Count = 256
    positive_fraction: Share = 0.5
    smooth_l1_beta: NotNegative = 1 / 9
    pre_nms_train: Count = 2000
    pre_nms_test: Count = 1000
    post_nms_train: Count = 1000
    post_nms_test: Count = 1000
    nms_iou: Share = 0.7
    min_size_px: NotNegative = 0.0

    def __post_init__(self) -> None:
        if self.bg_iou > self.fg_iou:
            raise ValueError(f"bg_iou {self.bg_iou} must not exceed fg_iou {self.fg_iou}")


class Objects(NamedTuple):
    """The objects of a training image.

    `boxes` (G, 4) float32 xyxy pixels, `labels` (G,) in 0..K-1, and `ignored` (M, 4), boxes that
    are neither object nor background.
    """

    boxes: Tensor
    labels: Tensor
    ignored: Tensor


class RegionProposals(nn.Module):
    """Proposes boxes from feature maps of the given strides, with one head for all.

    Boxes are computed in float32, even under autocast.
    """

    def __init__(self, channels: int, strides: Sequence[int], options: RpnOptions) -> None:
        super().__init__()
        self.strides = list(strides)
        self.options = options
        self.head = RPNHead(channels, len(options.anchor_scales) * len(options.anchor_ratios))
        self.box_coder = BoxCoder((1.0, 1.0, 1.0, 1.0))

    def forward(
        self,
        maps: Sequence[Tensor],
        image_sizes: Sizes,
        scales: Sequence[float],
        objects: Sequence[Objects] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return proposals of each image, (P, 4) xyxy, best first; with objects also losses.

        Args:
            maps: L of (B, C, H / stride, W / stride), of the padded batch.
            scales: the factor by which each image was resized.
            objects: of each image, for the losses.
        """
        logits, offsets = self.head(list(maps))
        anchors = [
            anchor_grid(features.shape[-2:], stride, self.options, features.device)
            for features, stride in zip(maps, self.strides, strict=True)
        ]
        scores = [level.float().permute(0, 2, 3, 1).flatten(1) for level in logits]
        codes = [level.float().permute(0, 2, 3, 1).reshape(len(level), -1, 4) for level in offsets]
        levels = zip(anchors, scores, codes, strict=True)
        proposals = self._propose(levels, image_sizes, scales)
        if objects is None:
            return proposals, {}
        joined = torch.cat(anchors), torch.cat(scores, 1), torch.cat(codes, 1)
        return proposals, self._losses(*joined, image_sizes, objects)

    @torch.no_grad()
    def _propose(
        self, levels: Iterable[tuple[Tensor, Tensor, Tensor]], sizes: Sizes, scales: Sequence[float]
    ) -> list[Tensor]:
        options = self.options
        before, after = options.pre_nms_test, options.post_nms_test
        if self.training:
            before, after = options.pre_nms_train, options.post_nms_train
        best_of_level = []
        for level, (grid, score, code) in enumerate(levels):
            best, index = score.topk(min(before, score.shape[1]), dim=1)
            chosen = code.gather(1, index[..., None].expand(-1, -1, 4)).flatten(0, 1)
            boxes = self.box_coder.decode_single(chosen, grid[index].flatten(0, 1))
            boxes = boxes.view(*index.shape, 4)
            best_of_level.append((boxes, best, torch.full_like(index, level)))
        proposals = []
        joined = [torch.cat(tensors, 1) for tensors in zip(*best_of_level, strict=True)]
        for boxes, score, level_of, size, scale in zip(*joined, sizes, scales, strict=True):
            boxes = clip_boxes_to_image(boxes, size)
            large = remove_small_boxes(boxes, max(SMALLEST_PX, options.min_size_px * scale))
            boxes = boxes[large]
            kept = batched_nms(boxes, score[large], level_of[large], options.nms_iou)
            proposals.append(boxes[kept[:after]])
        return proposals

    def _losses(
        self,
        anchors: Tensor,
        scores: Tensor,
        codes: Tensor,
        sizes: Sizes,
        objects: Sequence[Objects],
    ) -> dict[str, Tensor]:
        """Return both losses as means over the sampled anchors of the batch."""
        options = self.options
        loss_cls, loss_box, count = scores.new_zeros(()), scores.new_zeros(()), 0
        for score, code, size, truth in zip(scores, codes, sizes, objects, strict=True):
            # Before matching, so that each object has a best anchor among the remaining ones.
            used = torch.ones(len(anchors), dtype=torch.bool, device=anchors.device)
            if options.drop_cross_boundary:
                used = (clip_boxes_to_image(anchors, size) == anchors).all(1)
            inside = torch.where(used)[0]
            ious = options.fg_iou, (0.0, options.bg_iou)
            status, matched = assign(anchors[inside], truth, *ious, best_is_positive=True)
            sampled = sample(status, options.samples_per_image, options.positive_fraction)
            positive, index = sampled[0], inside[torch.cat(sampled)]
            is_object = torch.zeros(len(index), device=scores.device)
            is_object[: len(positive)] = 1
            bce = F.binary_cross_entropy_with_logits(score[index], is_object, reduction="sum")
            boxes, at_objects = truth.boxes[matched[positive]], index[: len(positive)]
            target = self.box_coder.encode_single(boxes, anchors[at_objects])
            distance = F.smooth_l1_loss(
                code[at_objects], target, beta=options.smooth_l1_beta, reduction="sum"
            )
            loss_cls, loss_box, count = loss_cls + bce, loss_box + distance, count + len(index)
        return {"loss_rpn_cls": loss_cls / max(count, 1), "loss_rpn_box": loss_box / max(count, 1)}


def anchor_grid(
    size: Sequence[int], stride: int, options: RpnOptions, device: torch.device | None = None
) -> Tensor:
    """Return the anchors of a feature map of `size` (H, W), (H W A, 4) float32 xyxy."""
    height, width = size
    floats: dict[str, Any] = {"dtype": torch.float32, "device": device}
    sides = torch.tensor(options.anchor_scales, **floats) * stride
    roots = torch.tensor(options.anchor_ratios, **floats).sqrt()
    halves = torch.stack([sides / roots[:, None], sides * roots[:, None]], -1).view(-1, 2) / 2
    x, y = ((torch.arange(n, **floats) + options.anchor_offset) * stride for n in (width, height))
    centers = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).view(-1, 1, 2)
    return torch.cat([centers - halves, centers + halves], -1).view(-1, 4)


def assign(
    candidates: Tensor,
    objects: Objects,
    fg_iou: float,
    bg_iou: tuple[float, float],
    *,
    best_is_positive: bool = False,
) -> tuple[Tensor, Tensor]:
    """Match each candidate with the object that it overlaps most.

    Args:
        candidates: (A, 4) xyxy.
        fg_iou: a candidate is positive from this IoU.
        bg_iou: [low, high): it is negative if its IoU is in this range, and less than half of it
            is in an ignored box.
        best_is_positive: the candidates that overlap an object most are positive at any IoU > 0.

    Returns:
        status (A,): POSITIVE, NEGATIVE or NEITHER; matched (A,): indices of objects, or 0.
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
            positive |= ((iou == most) & (most > 0)).any(0)
    low, high = bg_iou
    negative = (best >= low) & (best < high) & ~within(candidates, objects.ignored)
    status = torch.full_like(matched, NEITHER)
    status[negative] = NEGATIVE
    status[positive] = POSITIVE
    return status, matched


def within(boxes: Tensor, regions: Tensor) -> Tensor:
    """Return (A,) bool: whether at least half of a box is in one of the (M, 4) regions."""
    if not len(regions) or not len(boxes):
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    corner = torch.maximum(boxes[:, None, :2], regions[None, :, :2])
    opposite = torch.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    shared = (opposite - corner).clamp(min=0).prod(-1)
    within_one: Tensor = shared.amax(1) >= IGNORED_SHARE * box_area(boxes).clamp(min=1e-6)
    return within_one


def sample(status: Tensor, count: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Draw indices of positives, up to their fraction of `count`, and of negatives for the rest."""

    def draw(kind: int, limit: int) -> Tensor:
        indices = torch.where(status == kind)[0]
        return indices[torch.randperm(len(indices), device=indices.device)[:limit]]

    positive = draw(POSITIVE, int(count * positive_fraction))
    return positive, draw(NEGATIVE, count - len(positive))
