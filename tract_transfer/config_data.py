"""The data sections of a config: where images come from, their transforms, their batches.

A source goes to a loader of tract_transfer.data as arguments of the same names (see build_data.py).
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tract_transfer.config_sections import Count, Fraction, Section


class HuggingFaceSource(Section):
    """A hub id, parquet file or folder, image folder or saved dataset.

    `streaming` reads it from beginning to end and copies nothing; `num_classes` is then that of
    integers without names.
    """

    source: Literal["huggingface"]
    path: str
    split: str
    config_name: str | None = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    streaming: bool = False
    num_classes: Annotated[int, Field(ge=2)] | None = None

    @model_validator(mode="after")
    def _classes_are_counted_unless_streamed(self) -> "HuggingFaceSource":
        if self.num_classes is not None and not self.streaming:
            raise ValueError("num_classes is for streaming: true; else all labels are read")
        return self


class DigitsSource(Section):
    """scikit-learn's handwritten digits at 32 px; `classes` keeps some of the ten."""

    source: Literal["digits"]
    split: Literal["train", "test"]
    classes: list[int] | None = None


class CarvedSource(Section):
    """A stratified `fraction` of data.train, which then lacks it."""

    source: Literal["train"]
    fraction: Annotated[float, Field(gt=0, lt=1)]


class VocSource(Section):
    """Split files of a VOC devkit, such as `sets: [2007/trainval, 2012/trainval]`."""

    source: Literal["voc"]
    root: str
    sets: Annotated[list[str], Field(min_length=1)]
    classes: list[str] | None = None


class CocoSource(Section):
    """A folder of images and a COCO json of boxes; `classes: null` are its categories by id."""

    source: Literal["coco"]
    images: str
    annotations: str
    classes: list[str] | None = None


class HuggingFaceBoxesSource(Section):
    """A hub id, parquet file or folder, or saved dataset, with a column of objects.

    `classes` is needed where the classes are no ClassLabel.
    """

    source: Literal["huggingface"]
    path: str
    split: str
    box_format: Literal["xywh", "xyxy", "cxcywh"]
    box_unit: Literal["pixel", "relative"] = "pixel"
    classes: list[str] | None = None
    config_name: str | None = None
    revision: str | None = None
    image_column: str | None = None
    objects_column: str | None = None


class DigitScenesSource(Section):
    """Digits on photographs, written to `root` as a VOC devkit when first asked for.

    `root: null` is a folder of its own for each size and number, under output/data.
    """

    source: Literal["digit_scenes"]
    split: Literal["train", "test"]
    root: str | None = None
    num_train: Count = 200
    num_test: Count = 100
    size_px: Annotated[int, Field(ge=64)] = 128


ImageSource = Annotated[HuggingFaceSource | DigitsSource, Field(discriminator="source")]
ValSource = Annotated[
    HuggingFaceSource | DigitsSource | CarvedSource, Field(discriminator="source")
]
BoxSource = Annotated[
    VocSource | CocoSource | HuggingFaceBoxesSource | DigitScenesSource,
    Field(discriminator="source"),
]


class EvalTransformsConfig(Section):
    """Test images: the short side to size / crop_ratio, then the centre of size; or, with
    `resize: whole`, the whole image to the square."""

    size_px: Count
    resize: Literal["short", "whole"] = "short"
    crop_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    @model_validator(mode="after")
    def _whole_is_not_cropped(self) -> "EvalTransformsConfig":
        if self.resize == "whole" and self.crop_ratio != 1:
            raise ValueError("crop_ratio is for resize: short, and resize is whole")
        return self


class ClassificationTransformsConfig(EvalTransformsConfig):
    """Training images: `pad` by pad_px (4) and crop, `resize_random` the same by reflection,
    `random_resized` crop of `scale` of the area ([0.08, 1]), or none.

    Then flips, rotations, the policy `augment` (an entry of data.augment.AUGMENTATIONS), colour
    jitter and erasing.
    """

    crop: Literal["pad", "resize_random", "random_resized", "none"] = "none"
    pad_px: Annotated[int, Field(ge=0)] | None = None
    scale: Annotated[list[Fraction], Field(min_length=2, max_length=2)] | None = None
    flip_prob: Fraction = 0.0
    rotation_deg: Annotated[float, Field(ge=0, le=180)] = 0.0
    augment: (
        Literal[
            "rand_augment",
            "auto_augment_cifar10",
            "auto_augment_imagenet",
            "auto_augment_svhn",
            "trivial_augment",
            "three_augment",
        ]
        | None
    ) = None
    augment_args: dict[str, Any] = Field(default={})
    color_jitter: Fraction = 0.0
    erase_prob: Fraction = 0.0

    @model_validator(mode="after")
    def _arguments_are_the_crops(self) -> "ClassificationTransformsConfig":
        for key, crops in (("pad_px", ("pad", "resize_random")), ("scale", ("random_resized",))):
            if getattr(self, key) is not None and self.crop not in crops:
                raise ValueError(
                    f"{key} is for crop: {' or '.join(crops)}, and crop is {self.crop}"
                )
        if self.augment_args and self.augment is None:
            raise ValueError("augment_args has no use here: augment is null")
        return self


class DetectionTransformsConfig(Section):
    """Training images: one of `short_sides_px`, the long side at most `max_side_px`, flips.

    `photometric_prob` is that of each of SSD's colour distortions, which has 0.5.
    """

    short_sides_px: Annotated[list[Count], Field(min_length=1)]
    max_side_px: Count
    flip_prob: Fraction = 0.5
    photometric_prob: Fraction = 0.0


class LoadingConfig(Section):
    """`batch_size` counts the images of an optimizer step, over all processes and micro-batches.
    An image of more than `max_pixels` is not decoded."""

    batch_size: Count
    num_workers: Annotated[int, Field(ge=0)] = 2
    cache: Literal["none", "ram"] = "none"
    undecodable: Literal["error", "skip"] = "error"
    # PIL's own limit: above it, an image is refused whatever is set here.
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 89_478_485


class MixupConfig(Section):
    """mixup and CutMix over the batch; an alpha of 0 leaves one out. With both, `switch_prob` is
    CutMix's share; `prob` is that of mixing an iteration's images at all."""

    mixup_alpha: Annotated[float, Field(ge=0)] = 0.0
    cutmix_alpha: Annotated[float, Field(ge=0)] = 0.0
    prob: Annotated[float, Field(gt=0, le=1)] = 1.0
    switch_prob: Fraction = 0.5

    @model_validator(mode="after")
    def _something_is_mixed(self) -> "MixupConfig":
        if not (self.mixup_alpha or self.cutmix_alpha):
            raise ValueError("give mixup_alpha or cutmix_alpha, or set data.mixup: null")
        if self.switch_prob != 0.5 and not (self.mixup_alpha and self.cutmix_alpha):
            raise ValueError(
                "switch_prob has no use here: it chooses between mixup_alpha and cutmix_alpha, "
                "and one of them is 0"
            )
        return self


class ClassificationData(LoadingConfig):
    """`val` is for selection, `test` for the report.

    `repeats` is how often an image comes in a batch, each time augmented anew; an epoch shows as
    many images as without, and so fewer different ones. `cache: device` keeps the training images
    on the device, and crops, flips and erases in whole batches there. Where train is streamed,
    `shuffle_rows` images are shuffled at a time (2048), read at `readers` places at once (8).
    """

    cache: Literal["none", "ram", "device"] = "none"  # type: ignore[assignment]
    train: ImageSource
    val: ValSource | None = None
    test: ImageSource | None = None
    transforms: ClassificationTransformsConfig
    mixup: MixupConfig | None = None
    repeats: Count = 1
    shuffle_rows: Count | None = None
    readers: Count | None = None

    @model_validator(mode="after")
    def _streams_are_shuffled(self) -> "ClassificationData":
        if not getattr(self.train, "streaming", False):
            for key in ("shuffle_rows", "readers"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} has no use here: it is for data.train.streaming: true")
        return self

    @model_validator(mode="after")
    def _device_augments_batches(self) -> "ClassificationData":
        chosen = self.transforms
        others = {
            "crop": chosen.crop == "resize_random",
            "rotation_deg": chosen.rotation_deg != 0,
            "augment": chosen.augment is not None,
            "color_jitter": chosen.color_jitter != 0,
        }
        found = [key for key, is_used in others.items() if is_used]
        if self.cache == "device" and found:
            raise ValueError(
                "cache: device knows crop: pad, random_resized or none, flip_prob and erase_prob "
                f"of data.transforms, and not its {', '.join(found)}. Set cache: ram"
            )
        return self


class DetectionData(LoadingConfig):
    """`val` is for selection, `test` for the report.

    Of the training images, `empty_images` keeps or drops those without objects,
    `group_by_aspect` keeps wide and tall ones in batches of their own, and `repeat_threshold` is
    the fraction of images below which a class is shown more often (LVIS).
    """

    train: BoxSource
    val: BoxSource | None = None
    test: BoxSource | None = None
    transforms: DetectionTransformsConfig
    invalid_boxes: Literal["error", "clip"] = "error"
    empty_images: Literal["keep", "drop"] = "keep"
    group_by_aspect: bool = False
    repeat_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
