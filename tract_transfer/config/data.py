"""The data sections of a config: where images come from, their transforms, their batches.

A source goes to a loader of tract_transfer.data as arguments of the same names (see build_data.py).
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tract_transfer.config.sections import Count, Fraction, Positive, Section


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


class HeldOutSource(Section):
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
    HuggingFaceSource | DigitsSource | HeldOutSource, Field(discriminator="source")
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


# --- The sections of a probe's config: its data, and the probes to run on frozen features.

ProbeSource = Annotated[
    HuggingFaceSource | DigitsSource | VocSource | DigitScenesSource,
    Field(discriminator="source"),
]
Decay = Annotated[float, Field(ge=0)]
Candidates = Annotated[list[Positive], Field(min_length=1)]
_ONE_LABEL_METRICS = ("top1", "top5", "mean_per_class")
_MANY_LABELS_METRICS = ("map_11point", "map_area")


class ProbeData(LoadingConfig):
    """`val` is for selection; without it a part of train is. Features are kept in `feature_cache`,
    or, where that is null, in the run folder."""

    train: ProbeSource
    val: ImageSource | None = None
    test: ProbeSource
    transforms: EvalTransformsConfig
    feature_cache: str | None = None

    @property
    def has_many_labels(self) -> bool:
        """Whether an image may show several classes: those of its objects."""
        return isinstance(self.train, VocSource | DigitScenesSource)

    @model_validator(mode="after")
    def _labels_are_of_one_kind(self) -> "ProbeData":
        if self.has_many_labels != isinstance(self.test, VocSource | DigitScenesSource):
            raise ValueError(
                f"data.train is {self.train.source} and data.test {self.test.source}: one has "
                "several labels an image, the other has one. Take both of one kind"
            )
        return self


class KnnConfig(Section):
    """Weighted nearest neighbours (DINO); every k is reported."""

    ks: Annotated[list[Count], Field(min_length=1)] = Field(default=[10, 20, 100, 200])
    temperature: Positive = 0.07


class LogisticRegressionConfig(Section):
    """L-BFGS; C is selected, then all of train is fitted. By default DINOv2's 45 values of C."""

    cs: Candidates = Field(default=[10 ** (-6 + 11 * i / 44) for i in range(45)])
    max_iters: Count = 1000


class LinearConfig(Section):
    """SGD with a cosine; learning rate and weight decay are selected, then all of train is fitted.

    `batch_size` counts rows of features.
    """

    lrs: Candidates = Field(default=[0.001, 0.003, 0.01, 0.03, 0.1, 0.3])
    weight_decays: Annotated[list[Decay], Field(min_length=1)] = Field(default=[0.0])
    max_epochs: Count = 30
    batch_size: Count = 256
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class SvmConfig(Section):
    """A linear SVM for each class (VISSL); its C is selected by cross-validation on train."""

    cs: Candidates = Field(
        default=[0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0]
    )
    folds: Annotated[int, Field(ge=2)] = 3
    max_iters: Count = 2000


class FewShotConfig(Section):
    """k training images a class, `samplings` times each; mean and deviation are reported.

    `cs` ([0.01, 0.1, 1, 10, 100]) and `folds` (3) are for logistic and svm, `temperature` (0.07)
    is for knn.
    """

    ks: Annotated[list[Count], Field(min_length=1)] = Field(default=[1, 2, 4, 8])
    samplings: Count = 5
    classifier: Literal["logistic", "svm", "knn"] = "logistic"
    cs: Candidates | None = None
    folds: Annotated[int, Field(ge=2)] | None = None
    temperature: Positive | None = None

    @model_validator(mode="after")
    def _arguments_are_the_classifiers(self) -> "FewShotConfig":
        others = ("cs", "folds") if self.classifier == "knn" else ("temperature",)
        for key in others:
            if getattr(self, key) is not None:
                raise ValueError(f"evaluation.few_shot.{key} is not for {self.classifier}")
        return self


class ProbeEvaluation(Section):
    """The probes to run; null leaves one out.

    `val_fraction` (0.1) is the part of train that `logistic_regression` and `linear` select on
    where there is no data.val. `metric`: `knn<k>`, `logistic`, `linear`, `svm` or `shot<k>`, then
    `_top1`, `_top5` or `_mean_per_class`, or of several labels `_map_11point` or `_map_area`.
    """

    knn: KnnConfig | None = KnnConfig()
    logistic_regression: LogisticRegressionConfig | None = LogisticRegressionConfig()
    linear: LinearConfig | None = None
    svm: SvmConfig | None = None
    few_shot: FewShotConfig | None = None
    val_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    metric: str = "logistic_top1"

    @property
    def selects(self) -> bool:
        """Whether a probe selects on data.val, or on a part of train."""
        return self.logistic_regression is not None or self.linear is not None

    def check(self, data: ProbeData) -> None:
        """Check what evaluation and data must agree on.

        Raises:
            ValueError: a probe does not serve the labels, the metric is none that is measured, or
                a part to select on is given and not used, or twice.
        """
        if data.has_many_labels:
            self._check_many_labels(data.train.source)
        if not self.selects:
            for key, value in (
                ("data.val", data.val),
                ("evaluation.val_fraction", self.val_fraction),
            ):
                if value is not None:
                    raise ValueError(
                        f"{key} is for logistic_regression and linear to select on, and neither is "
                        "run. Set it null"
                    )
        if data.val is not None and self.val_fraction is not None:
            raise ValueError("give one of data.val and evaluation.val_fraction to select on")
        kinds = _MANY_LABELS_METRICS if data.has_many_labels else _ONE_LABEL_METRICS
        measured = [f"{probe}_{kind}" for probe in self._measured_probes() for kind in kinds]
        if self.metric not in measured:
            raise ValueError(
                f"evaluation.metric is {self.metric}, and its probe is left out; measured are: "
                f"{', '.join(measured) or 'none: every probe is null'}"
            )

    def _check_many_labels(self, source: str) -> None:
        for name in ("knn", "logistic_regression", "linear"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"data.train: {source} has several labels an image, and evaluation.{name} "
                    f"takes one. Set evaluation.{name}: null, and evaluation.svm"
                )
        if self.few_shot is not None and self.few_shot.classifier != "svm":
            raise ValueError(
                f"data.train: {source} has several labels an image. Set "
                "evaluation.few_shot.classifier: svm"
            )

    def _measured_probes(self) -> Iterable[str]:
        for k in self.knn.ks if self.knn else ():
            yield f"knn{k}"
        if self.logistic_regression:
            yield "logistic"
        if self.linear:
            yield "linear"
        if self.svm:
            yield "svm"
        for k in self.few_shot.ks if self.few_shot else ():
            yield f"shot{k}"
