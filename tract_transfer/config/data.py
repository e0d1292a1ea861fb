"""The data sections of a config: where images come from, their transforms, their batches.

Fields become arguments of the same names (see tract_transfer.build.data and build.batches).
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from tract_transfer.config.sections import (
    Count,
    CountOrZero,
    Fraction,
    NonNegative,
    OpenFraction,
    Rules,
    Section,
    Uses,
)


class HuggingFaceRows(Section):
    """A hub id, parquet file or folder, or saved dataset."""

    source: Literal["huggingface"]
    path: str
    split: str
    config_name: str | None = None
    revision: str | None = None
    image_column: str | None = None


class HuggingFaceSource(HuggingFaceRows):
    """Rows of images with a label, or an image folder.

    `streaming` reads it sequentially and copies nothing; `num_classes` is then the number of
    classes if labels are integers without names.
    """

    label_column: str | None = None
    streaming: bool = False
    num_classes: Annotated[int, Field(ge=2)] | None = None

    def uses(self) -> Uses:
        yield "num_classes", self.streaming, "num_classes is for streaming: true"


class DigitsSource(Section):
    """scikit-learn's handwritten digits at 32 px; `classes` selects some of the ten."""

    source: Literal["digits"]
    split: Literal["train", "test"]
    classes: list[int] | None = None


class HeldOutSource(Section):
    """A stratified `fraction` held out from data.train; `seed: null` is the run's seed.

    data.test is held out first, and data.val is a fraction of what is left.
    """

    source: Literal["train"]
    fraction: OpenFraction
    seed: CountOrZero | None = None


class VocSource(Section):
    """Split files of a VOC devkit, such as `sets: [2007/trainval, 2012/trainval]`."""

    source: Literal["voc"]
    root: str
    sets: Annotated[list[str], Field(min_length=1)]
    classes: list[str] | None = None


class CocoSource(Section):
    """A folder of images and a COCO json of boxes; `classes: null` takes its categories by id."""

    source: Literal["coco"]
    images: str
    annotations: str
    classes: list[str] | None = None


class HuggingFaceBoxesSource(HuggingFaceRows):
    """Rows of images with objects; `classes` is required if they are not a ClassLabel."""

    box_format: Literal["xywh", "xyxy", "cxcywh"]
    box_unit: Literal["pixel", "relative"] = "pixel"
    classes: list[str] | None = None
    objects_column: str | None = None


class DigitScenesSource(Section):
    """Digits on photographs, written to `root` as a VOC devkit on first use.

    `root: null` is a folder below output/data, one for each size and number.
    """

    source: Literal["digit_scenes"]
    split: Literal["train", "test"]
    root: str | None = None
    num_train: Count = 200
    num_test: Count = 100
    size_px: Annotated[int, Field(ge=64)] = 128


class PluginSource(Section):
    """A source that a plug-in registers in SOURCES, and the arguments of its function."""

    source: str
    args: dict[str, Any] = Field(default={})


_BUILT_IN = ("huggingface", "digits", "train", "voc", "coco", "digit_scenes")
PLUGIN = "a name of a plug-in"  # the tag of a PluginSource, as error messages have it


def _tag(section: Any) -> str | None:
    """Return which section a source has: its own, or that of all sources of plug-ins."""
    is_tree = isinstance(section, dict)
    source = section.get("source") if is_tree else getattr(section, "source", None)
    keys = set(section) if is_tree else set()
    if not isinstance(source, str) or source in _BUILT_IN:
        return source if source is None else str(source)
    # Without a slash and with other keys, it is a built-in source with a typing error.
    return PLUGIN if "/" in source or keys <= {"source", "args"} else source


_BY_SOURCE = Discriminator(_tag)
_HuggingFace = Annotated[HuggingFaceSource, Tag("huggingface")]
_Digits = Annotated[DigitsSource, Tag("digits")]
_HeldOut = Annotated[HeldOutSource, Tag("train")]
_Voc = Annotated[VocSource, Tag("voc")]
_Coco = Annotated[CocoSource, Tag("coco")]
_HuggingFaceBoxes = Annotated[HuggingFaceBoxesSource, Tag("huggingface")]
_DigitScenes = Annotated[DigitScenesSource, Tag("digit_scenes")]
_Plugin = Annotated[PluginSource, Tag(PLUGIN)]
ImageSource = Annotated[_HuggingFace | _Digits | _Plugin, _BY_SOURCE]
ValSource = Annotated[_HuggingFace | _Digits | _HeldOut | _Plugin, _BY_SOURCE]
BoxSource = Annotated[_Voc | _Coco | _HuggingFaceBoxes | _DigitScenes | _Plugin, _BY_SOURCE]
ProbeSource = Annotated[_HuggingFace | _Digits | _Voc | _DigitScenes | _Plugin, _BY_SOURCE]
BoxSourceOrPart = Annotated[
    _Voc | _Coco | _HuggingFaceBoxes | _DigitScenes | _HeldOut | _Plugin, _BY_SOURCE
]
ProbeSourceOrPart = Annotated[
    _HuggingFace | _Digits | _Voc | _DigitScenes | _HeldOut | _Plugin, _BY_SOURCE
]


class EvalTransformsConfig(Section):
    """Test images: resize the short side to size_px / crop_ratio, then crop the center.

    `resize: whole` resizes the whole image to the square instead.
    """

    size_px: Count
    resize: Literal["short", "whole"] = "short"
    crop_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def uses(self) -> Uses:
        yield "crop_ratio", self.resize == "short", "it is for resize: short, and resize is whole"


class ClassificationTransformsConfig(EvalTransformsConfig):
    """Training images: a crop, then flips, rotations, `augment`, color jitter and erasing.

    `crop`: `pad` by pad_px (4) and crop, `resize_random` the same by reflection, `random_resized`
    crop of `scale` of the area ([0.08, 1]), or none. `augment`: an entry of AUGMENTATIONS.
    """

    crop: Literal["pad", "resize_random", "random_resized", "none"] = "none"
    pad_px: CountOrZero | None = None
    scale: Annotated[list[Fraction], Field(min_length=2, max_length=2)] | None = None
    flip_prob: Fraction = 0.0
    rotation_deg: Annotated[float, Field(ge=0, le=180)] = 0.0
    augment: str | None = None
    augment_args: dict[str, Any] = Field(default={})
    color_jitter: Fraction = 0.0
    erase_prob: Fraction = 0.0

    def uses(self) -> Uses:
        yield from super().uses()
        for key, crops in (("pad_px", ("pad", "resize_random")), ("scale", ("random_resized",))):
            reason = f"{key} is for crop: {' or '.join(crops)}, and crop is {self.crop}"
            yield key, self.crop in crops, reason
        yield "augment_args", self.augment is not None, "augment is null"


class DetectionTransformsConfig(Section):
    """Training images: resized to one of `short_sides_px`, the long side at most `max_side_px`.

    `photometric_prob` is the probability of each of SSD's color distortions (0.5 in SSD).
    """

    short_sides_px: Annotated[list[Count], Field(min_length=1)]
    max_side_px: Count
    flip_prob: Fraction = 0.5
    photometric_prob: Fraction = 0.0


class LoadingConfig(Section):
    """`batch_size`: images in an optimizer step, over all processes and micro-batches.

    `max_pixels`: larger images are not decoded; the upper bound is PIL's own limit.
    """

    batch_size: Count
    num_workers: CountOrZero = 2
    cache: Literal["none", "ram"] = "none"
    undecodable: Literal["error", "skip"] = "error"
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 89_478_485

    @property
    def streamed(self) -> list[str]:
        """The splits that are streamed, such as `data.train`."""
        splits = ("train", "val", "test")
        return [f"data.{s}" for s in splits if getattr(getattr(self, s), "streaming", False)]


class MixupConfig(Section):
    """mixup and CutMix over the batch; an alpha of 0 disables one.

    `prob`: probability of mixing a batch at all; `switch_prob`: of CutMix instead of mixup.
    """

    mixup_alpha: NonNegative = 0.0
    cutmix_alpha: NonNegative = 0.0
    prob: Annotated[float, Field(gt=0, le=1)] = 1.0
    switch_prob: Fraction = 0.5

    def uses(self) -> Uses:
        reason = "it chooses between mixup_alpha and cutmix_alpha, and one of them is 0"
        yield "switch_prob", 0 not in (self.mixup_alpha, self.cutmix_alpha), reason

    def rules(self) -> Rules:
        is_mixed = bool(self.mixup_alpha or self.cutmix_alpha)
        yield is_mixed, "give mixup_alpha or cutmix_alpha, or set data.mixup: null"


class ClassificationData(LoadingConfig):
    """`val` is for selection, `test` for the report.

    `repeats`: copies of an image in a batch, augmented independently; the length of an epoch stays,
    so it has fewer distinct images. `cache: device` keeps the training images on the device and
    crops, flips and erases whole batches there. For a streamed train, `shuffle_rows` is the size of
    the shuffle buffer (2048), filled from `readers` positions at once (8).
    """

    cache: Literal["none", "ram", "device"] = "none"  # type: ignore[assignment]
    train: ImageSource
    val: ValSource | None = None
    test: ValSource | None = None
    transforms: ClassificationTransformsConfig
    mixup: MixupConfig | None = None
    repeats: Count = 1
    shuffle_rows: Count | None = None
    readers: Count | None = None

    def uses(self) -> Uses:
        yield "shuffle_rows readers", "data.train" in self.streamed, "data.train.streaming is false"

    def rules(self) -> Rules:
        section = self.transforms
        others = [k for k in ("rotation_deg", "augment", "color_jitter") if getattr(section, k)]
        others += ["crop"] if section.crop == "resize_random" else []
        yield (
            self.cache != "device" or not others,
            "cache: device supports crop: pad, random_resized or none, flip_prob and erase_prob of "
            f"data.transforms, and not its {', '.join(others)}. Set cache: ram",
        )


class DetectionData(LoadingConfig):
    """`val` is for selection, `test` for the report.

    For training images, `empty_images` keeps or drops those without objects, `group_by_aspect`
    batches wide and tall ones separately, and `repeat_threshold` is the fraction of images below
    which a class is oversampled (LVIS).
    """

    train: BoxSource
    val: BoxSourceOrPart | None = None
    test: BoxSourceOrPart | None = None
    transforms: DetectionTransformsConfig
    invalid_boxes: Literal["error", "clip"] = "error"
    empty_images: Literal["keep", "drop"] = "keep"
    group_by_aspect: bool = False
    repeat_threshold: Annotated[float, Field(gt=0, le=1)] | None = None


class ProbeData(LoadingConfig):
    """`val` is for selection; without it, a part of train is.

    Features are stored in `feature_cache`, or in the run folder if that is null.
    """

    train: ProbeSource
    val: ImageSource | None = None
    test: ProbeSourceOrPart
    transforms: EvalTransformsConfig
    feature_cache: str | None = None

    @property
    def has_many_labels(self) -> bool:
        """Whether an image may show several classes: those of its objects."""
        return isinstance(self.train, VocSource | DigitScenesSource)

    def rules(self) -> Rules:
        is_part = isinstance(self.test, HeldOutSource)
        yield (
            is_part or self.has_many_labels == isinstance(self.test, VocSource | DigitScenesSource),
            f"data.train is {self.train.source} and data.test {self.test.source}: one has several "
            "labels an image, the other has one. Use two of the same kind",
        )
