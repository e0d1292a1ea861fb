"""The second stage: proposals become detections (Girshick, ICCV 2015)."""

# R proposals of all images, C channels, S side of the pooled cells, D features, K classes

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import (
    batched_nms,
    box_area,
    clip_boxes_to_image,
    remove_small_boxes,
    roi_align,
    roi_pool,
)

from tract_transfer.models.backbone import Backbone
from tract_transfer.models.detection.rpn import (
    POSITIVE,
    STRICT,
    Count,
    NotNegative,
    Objects,
    Positive,
    Share,
    Sizes,
    assign,
    sample,
)

SMALLEST_PX = 1e-2
# A box of 224 px is pooled from stride 2^4, one of half the side from half the stride, and so on
# (Lin et al., CVPR 2017, equation 1).
CANONICAL_SIDE_PX, CANONICAL_LEVEL = 224, 4


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BoxOptions:
    """The box head: its inputs, training samples and detections.

    Attributes:
        pooler: `roi_align` interpolates between cells, `roi_pool` takes the maximum of whole cells.
        pool_size: side of the pooled features, in cells.
        sampling_ratio: RoIAlign's samples per side of a pooled cell; 0 is one per map cell.
        fg_iou: a proposal is positive from this IoU with an object.
        bg_iou: [low, high): a proposal is background if its largest IoU is in this range.
        rois_per_image, positive_fraction: proposals in the loss; largest share of positives.
        box_std: divisors of the offsets and log sizes (x, y, width, height).
        smooth_l1_beta: where the box loss turns from quadratic to linear; 0 is the L1 loss.
        class_agnostic: predict one box per proposal, not one per class.
        score_threshold, nms_iou, max_detections: which detections remain.
    """

    pooler: Literal["roi_align", "roi_pool"] = "roi_align"
    pool_size: Count = 7
    sampling_ratio: Annotated[int, Field(ge=0)] = 0
    fg_iou: Share = 0.5
    bg_iou: Annotated[Sequence[Share], Field(min_length=2, max_length=2)] = (0.0, 0.5)
    rois_per_image: Count = 512
    positive_fraction: Share = 0.25
    box_std: Annotated[Sequence[Positive], Field(min_length=4, max_length=4)] = (0.1, 0.1, 0.2, 0.2)
    smooth_l1_beta: NotNegative = 1 / 9
    class_agnostic: bool = False
    score_threshold: Share = 0.05
    nms_iou: Share = 0.5
    max_detections: Count = 100

    def __post_init__(self) -> None:
        low, high = self.bg_iou
        if not low < high <= self.fg_iou:
            raise ValueError(f"bg_iou [{low}, {high}) must be a range below fg_iou {self.fg_iou}")


class BoxHeads(nn.Module):
    """Pools each proposal, classifies it and corrects its box.

    Detections are a dict per image: `boxes` (N, 4) float32 xyxy, `scores` (N,) descending, `labels`
    (N,) in 0..K-1. K is the background.

    Args:
        strides: of the feature maps that are pooled.
        box_head: (R, C, S, S) -> (R, D).
        feature_dim: D.
    """

    def __init__(
        self,
        strides: Sequence[int],
        box_head: nn.Module,
        feature_dim: int,
        num_classes: int,
        options: BoxOptions,
    ) -> None:
        super().__init__()
        self.pooler = RoiPooler(strides, options)
        self.box_head = box_head
        self.box_predictor = BoxPredictor(feature_dim, num_classes, options.class_agnostic)
        self.num_classes = num_classes
        self.options = options
        self.box_coder = BoxCoder(tuple(1 / std for std in options.box_std))

    def forward(
        self,
        maps: Sequence[Tensor],
        proposals: list[Tensor],
        image_sizes: Sizes,
        objects: Sequence[Objects] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return detections and no losses or, with objects, only the losses of a sample.

        Args:
            maps: feature maps, (B, C, H / stride, W / stride) each.
            proposals: (P, 4) xyxy of each image, in pixels of the padded batch.
            image_sizes: of each image in it; boxes are clipped there.
        """
        if objects is not None:
            proposals, labels, truth = self._sample(proposals, objects)
        logits, codes = self.box_predictor(self.box_head(self.pooler(maps, proposals)))
        if objects is not None:
            return [], self._losses(logits, codes, torch.cat(proposals), labels, truth)
        counts = [len(boxes) for boxes in proposals]
        parts = proposals, logits.softmax(-1).split(counts), codes.split(counts), image_sizes
        return [self._detections(*image) for image in zip(*parts, strict=True)], {}

    @torch.no_grad()
    def _sample(
        self, proposals: list[Tensor], objects: Sequence[Objects]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return sampled proposals, their labels (R,) and the boxes (R, 4) of their objects."""
        options = self.options
        low, high = options.bg_iou
        sampled, labels, truth = [], [], []
        for boxes, image in zip(proposals, objects, strict=True):
            boxes = torch.cat([boxes, image.boxes])  # the objects are candidates too
            status, matched = assign(boxes, image, options.fg_iou, (low, high))
            index = torch.cat(sample(status, options.rois_per_image, options.positive_fraction))
            is_object = status[index] == POSITIVE
            object_index = matched[index[is_object]]
            label = torch.full_like(index, self.num_classes)
            label[is_object] = image.labels[object_index]
            box = boxes[index].clone()
            box[is_object] = image.boxes[object_index]
            sampled.append(boxes[index])
            labels.append(label)
            truth.append(box)
        return sampled, torch.cat(labels), torch.cat(truth)

    def _losses(
        self, logits: Tensor, codes: Tensor, proposals: Tensor, labels: Tensor, truth: Tensor
    ) -> dict[str, Tensor]:
        """Return both losses as means over all proposals, including background."""
        count = max(len(labels), 1)
        positive = torch.where(labels < self.num_classes)[0]
        column = torch.zeros_like(positive) if codes.shape[1] == 1 else labels[positive]
        target = self.box_coder.encode_single(truth[positive], proposals[positive])
        loss_box = F.smooth_l1_loss(
            codes[positive, column], target, beta=self.options.smooth_l1_beta, reduction="sum"
        )
        loss_cls = F.cross_entropy(logits, labels, reduction="sum")
        return {"loss_cls": loss_cls / count, "loss_box": loss_box / count}

    def _detections(
        self, proposals: Tensor, scores: Tensor, codes: Tensor, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        options = self.options
        scores = scores[:, : self.num_classes]
        row, label = torch.where(scores > options.score_threshold)
        column = torch.zeros_like(label) if codes.shape[1] == 1 else label
        boxes = self.box_coder.decode_single(codes[row, column], proposals[row])
        boxes = clip_boxes_to_image(boxes, size)
        large = remove_small_boxes(boxes, SMALLEST_PX)
        boxes, score, label = boxes[large], scores[row, label][large], label[large]
        kept = batched_nms(boxes, score, label, options.nms_iou)[: options.max_detections]
        return {"boxes": boxes[kept], "scores": score[kept], "labels": label[kept]}


class BoxPredictor(nn.Module):
    """(R, D) -> float32 logits (R, K + 1), background last, and box codes (R, K or 1, 4)."""

    def __init__(self, feature_dim: int, num_classes: int, class_agnostic: bool) -> None:
        super().__init__()
        self.cls_score = nn.Linear(feature_dim, num_classes + 1)
        self.bbox_pred = nn.Linear(feature_dim, 4 if class_agnostic else 4 * num_classes)
        # Start with equal scores and no correction (Fast R-CNN, section 2.3).
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        codes: Tensor = self.bbox_pred(features).float()
        return self.cls_score(features).float(), codes.unflatten(1, (-1, 4))


class RoiPooler(nn.Module):
    """(maps, proposals) -> (R, C, S, S) float32, each box from the feature map for its size."""

    def __init__(self, strides: Sequence[int], options: BoxOptions) -> None:
        super().__init__()
        self.strides = list(strides)
        self.options = options

    def forward(self, maps: Sequence[Tensor], proposals: Sequence[Tensor]) -> Tensor:
        """Pool the (P, 4) xyxy proposals of each image; `maps` may have further, coarser levels."""
        boxes = torch.cat(list(proposals))
        image = torch.cat([box.new_full((len(box), 1), i) for i, box in enumerate(proposals)])
        rois = torch.cat([image, boxes], 1)
        # In bfloat16, coordinates would be rounded to 8 bits.
        used = [features.float() for features in maps[: len(self.strides)]]
        if len(used) == 1:
            return self._pool(used[0], rois, self.strides[0])
        level_of = self._level_of(boxes)
        side = self.options.pool_size
        pooled = used[0].new_zeros(len(rois), used[0].shape[1], side, side)
        for level, (features, stride) in enumerate(zip(used, self.strides, strict=True)):
            row = torch.where(level_of == level)[0]
            pooled[row] = self._pool(features, rois[row], stride)
        return pooled

    def _level_of(self, boxes: Tensor) -> Tensor:
        side = box_area(boxes).sqrt() / CANONICAL_SIDE_PX
        finest = self.strides[0].bit_length() - 1
        level = torch.floor(CANONICAL_LEVEL + torch.log2(side + 1e-8)) - finest
        return level.clamp(0, len(self.strides) - 1).long()

    def _pool(self, features: Tensor, rois: Tensor, stride: int) -> Tensor:
        size, ratio = self.options.pool_size, self.options.sampling_ratio
        if self.options.pooler == "roi_pool":
            pooled: Tensor = roi_pool(features, rois, size, 1 / stride)
        else:
            pooled = roi_align(features, rois, size, 1 / stride, ratio, aligned=True)
        return pooled


class Borrowed(nn.Module):
    """A layer of the backbone as part of a box head: not a submodule, so it is saved only once."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # torch does not register modules in a tuple

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self._layer[0](features)
        return output


def last_stage(backbone: Backbone) -> Borrowed:
    """Return stage layer4 of a ResNet, to follow layer3; raise a ValueError for other backbones."""
    stages = dict(backbone.model.named_children())
    if not {"layer3", "layer4"} <= stages.keys():
        raise ValueError(
            "A C4 detector needs a ResNet, whose stage layer4 becomes the box head, and this "
            f"{type(backbone.model).__name__} has {list(stages)}. Use a feature pyramid."
        )
    return Borrowed(stages["layer4"])


def fully_connected(backbone: Backbone) -> tuple[nn.Linear | nn.Conv2d, nn.Linear | nn.Conv2d]:
    """Return fc6 and fc7 of a torchvision or timm VGG; raise a ValueError for other backbones."""
    for fc6, fc7 in (("classifier.0", "classifier.3"), ("pre_logits.fc1", "pre_logits.fc2")):
        modules = dict(backbone.model.named_modules())
        layers = modules.get(fc6), modules.get(fc7)
        if "features" in modules and all(isinstance(x, nn.Linear | nn.Conv2d) for x in layers):
            return layers  # type: ignore[return-value]
    raise ValueError(
        "torchvision_c5 needs a VGG, whose fc6 and fc7 become the box head, and this backbone is "
        f"a {type(backbone.model).__name__}. Use torchvision_c4 or torchvision_fpn."
    )
