"""The sections of a probe's config: its data, and the probes to run on frozen features."""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tract_transfer.config_data import (
    DigitScenesSource,
    DigitsSource,
    EvalTransformsConfig,
    HuggingFaceSource,
    ImageSource,
    LoadingConfig,
    VocSource,
)
from tract_transfer.config_sections import Count, Positive, Section

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
