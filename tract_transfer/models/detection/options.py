"""Groups of a detector's arguments: a dict from a config, checked against a frozen dataclass."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
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
    """The region proposal network: its anchors, what it trains on, and what it proposes.

    Attributes:
        anchor_scales: sides of a cell's anchors over the map's stride.
        anchor_ratios: heights over widths.
        anchor_offset: where in its cell an anchor is centred: 0.0 is the cell's corner
            (detectron2, torchvision), 0.5 its middle (py-faster-rcnn).
        drop_cross_boundary: train without the anchors that leave the image (py-faster-rcnn).
        fg_iou, bg_iou: an anchor of at least `fg_iou` with an object is one, as is the best of
            each object; below `bg_iou` it is background.
        samples_per_image, positive_fraction: anchors of the loss, and how many are objects at most.
        smooth_l1_beta: where the box loss turns from quadratic to linear; 0 is the L1 loss.
        pre_nms_train, pre_nms_test: best anchors of each map that go into the NMS.
        post_nms_train, post_nms_test: proposals of an image that come out of it.
        nms_iou: of two proposals with more than this, the better one stays.
        min_size_px: smaller proposals, in pixels of the image before it was resized, are dropped.
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
    """The box head: what it reads, what it trains on, and what it reports.

    Attributes:
        pooler: `roi_align` samples between cells, `roi_pool` takes the largest of whole cells.
        pool_size: side of what is pooled, in cells.
        sampling_ratio: RoIAlign's samples a side of a pooled cell; 0 is one a map's cell.
        fg_iou: a proposal of at least this with an object is that object.
        bg_iou: [lo, hi): a proposal whose largest IoU lies in it is background.
        rois_per_image, positive_fraction: proposals of the loss, and how many are objects at most.
        box_std: what offsets and log sizes are divided by (x, y, width, height).
        smooth_l1_beta: where the box loss turns from quadratic to linear; 0 is the L1 loss.
        class_agnostic: one box a proposal, not one for each class.
        score_threshold, nms_iou, max_detections: what remains of the detections.
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


def with_options(defaults: Options, given: Mapping[str, Any], key: str) -> Options:
    """Return `defaults` with those of `given`; `key` is what the group is called.

    Raises:
        ValueError: an unknown name, or a value out of its type or range: `key.name: problem`.
    """
    assert is_dataclass(defaults) and not isinstance(defaults, type)
    known = [field.name for field in fields(defaults)]
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"{key}.{name}: unknown.{hint} {key} takes {known}.")
    try:
        return type(defaults)(**{**asdict(defaults), **given})
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join([key, *(str(part) for part in problem["loc"])])
        message = problem["msg"].removeprefix("Value error, ")
        raise ValueError(f"{name}: {message}, got {problem['input']!r}.") from error
