"""Argument groups of a detector: frozen dataclasses that check the dicts of a config."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from tract_transfer.registry import did_you_mean

Options = TypeVar("Options")
Iou = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
STRICT = ConfigDict(strict=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RpnOptions:
    """The region proposal network: its anchors, training samples and proposals.

    Attributes:
        anchor_scales: anchor sides in units of the feature map's stride.
        anchor_ratios: height over width.
        anchor_offset: center of the anchors in a cell: 0.0 is its corner (detectron2,
            torchvision), 0.5 its middle (py-faster-rcnn).
        drop_cross_boundary: train without anchors that leave the image (py-faster-rcnn).
        fg_iou: an anchor is positive from this IoU with an object, or if it is the object's best.
        bg_iou: an anchor is negative below this IoU.
        samples_per_image, positive_fraction: anchors in the loss, and the largest share of
            positives.
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
    fg_iou: Iou = 0.7
    bg_iou: Iou = 0.3
    samples_per_image: Count = 256
    positive_fraction: Iou = 0.5
    smooth_l1_beta: Annotated[float, Field(ge=0)] = 1 / 9
    pre_nms_train: Count = 2000
    pre_nms_test: Count = 1000
    post_nms_train: Count = 1000
    post_nms_test: Count = 1000
    nms_iou: Iou = 0.7
    min_size_px: Annotated[float, Field(ge=0)] = 0.0

    def __post_init__(self) -> None:
        if self.bg_iou > self.fg_iou:
            raise ValueError(f"bg_iou {self.bg_iou} must not exceed fg_iou {self.fg_iou}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BoxOptions:
    """The box head: its inputs, training samples and detections.

    Attributes:
        pooler: `roi_align` interpolates between cells, `roi_pool` takes the maximum of whole cells.
        pool_size: side of the pooled features, in cells.
        sampling_ratio: RoIAlign's samples per side of a pooled cell; 0 is one per map cell.
        fg_iou: a proposal is positive from this IoU with an object.
        bg_iou: [low, high): a proposal is background if its largest IoU is in this range.
        rois_per_image, positive_fraction: proposals in the loss, and the largest share of
            positives.
        box_std: divisors of the offsets and log sizes (x, y, width, height).
        smooth_l1_beta: where the box loss turns from quadratic to linear; 0 is the L1 loss.
        class_agnostic: predict one box per proposal, not one per class.
        score_threshold, nms_iou, max_detections: which detections remain.
    """

    pooler: Literal["roi_align", "roi_pool"] = "roi_align"
    pool_size: Count = 7
    sampling_ratio: Annotated[int, Field(ge=0)] = 0
    fg_iou: Iou = 0.5
    bg_iou: Annotated[Sequence[Iou], Field(min_length=2, max_length=2)] = (0.0, 0.5)
    rois_per_image: Count = 512
    positive_fraction: Iou = 0.25
    box_std: Annotated[Sequence[Positive], Field(min_length=4, max_length=4)] = (0.1, 0.1, 0.2, 0.2)
    smooth_l1_beta: Annotated[float, Field(ge=0)] = 1 / 9
    class_agnostic: bool = False
    score_threshold: Iou = 0.05
    nms_iou: Iou = 0.5
    max_detections: Count = 100

    def __post_init__(self) -> None:
        low, high = self.bg_iou
        if not low < high <= self.fg_iou:
            raise ValueError(f"bg_iou [{low}, {high}) must be a range below fg_iou {self.fg_iou}")


def with_options(defaults: Options, given: Mapping[str, Any], group: str) -> Options:
    """Return `defaults` updated with `given`; `group` is the name of the argument.

    Raises:
        ValueError: an unknown name, or a value of the wrong type or range: `group.name: problem`.
    """
    assert is_dataclass(defaults) and not isinstance(defaults, type)
    names = [field.name for field in fields(defaults)]
    for name in given:
        if name not in names:
            hint = did_you_mean(name, names)
            raise ValueError(f"{group}.{name}: unknown.{hint} {group} takes {names}.")
    try:
        return replace(defaults, **given)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join([group, *(str(part) for part in problem["loc"])])
        message = problem["msg"].removeprefix("Value error, ")
        raise ValueError(f"{name}: {message}, got {problem['input']!r}.") from error
