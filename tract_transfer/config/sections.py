"""The sections of a config but its data: a section of a YAML file is a class, a key is a field.

Fields become arguments of the same names (see tract_transfer.build).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Channels = Field(min_length=3, max_length=3)
Uses = Iterator[tuple[str, bool, str]]
Rules = Iterator[tuple[bool, str]]


class Section(BaseModel):
    """A part of a config: unknown keys, wrong types and assignments are errors."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    def uses(self) -> Uses:
        """Yield keys (`a b`), whether they have an effect beside the others, and why not.

        A key that has none and is not at its default is an error.
        """
        yield from ()

    def rules(self) -> Rules:
        """Yield what must hold between keys, and the message if it does not."""
        yield from ()

    @model_validator(mode="after")
    def _keys_fit(self) -> "Section":
        fields = type(self).model_fields
        for keys, has_effect, reason in self.uses():
            for key in keys.split():
                if not has_effect and getattr(self, key) != fields[key].default:
                    context = {"key": key, "reason": reason}
                    raise PydanticCustomError("unused_key", "{reason}", context)
        for holds, message in self.rules():
            if not holds:
                raise ValueError(message)
        return self


# Model.


class DropPathConfig(Section):
    """Stochastic depth: `rate` for every block, or from 0 for the first to `rate` for the last."""

    rate: OpenFraction
    mode: Literal["constant", "linear"]


class BackboneConfig(Section):
    """`name: null` takes the backbone that `model.weights` describes.

    `mean: [0, 0, 0]` with `std` of 1 leaves images in [0, 1], and with `std` of 1/255 in [0, 255].
    """

    name: str | None = None
    stem: Literal["default", "cifar", "patch_norm", "dual_patch_norm", "whitened"] = "default"
    args: dict[str, Any] = {}
    mean: Annotated[list[Fraction], Channels] | None = None
    std: Annotated[list[Positive], Channels] | None = None
    drop_path: DropPathConfig | None = None

    def uses(self) -> Uses:
        reason = "give one of model.backbone.drop_path and args.drop_path_rate"
        yield "drop_path", "drop_path_rate" not in self.args, reason


class ComponentConfig(Section):
    """An entry of a registry, and the arguments of its constructor."""

    name: str
    args: dict[str, Any] = {}


class FeatureModelConfig(Section):
    """A backbone and its weights: null, `pretrained`, a run folder or a weights file.

    `ignore_missing`: patterns of names that the file may lack; `adapt_stem`: resample a ViT's
    patches to the backbone's size.
    """

    backbone: BackboneConfig = BackboneConfig()
    weights: str | None = None
    ignore_missing: list[str] = []
    adapt_stem: bool = False

    @property
    def weights_path(self) -> Path | None:
        """The file or folder of the weights; None if there is none, or they are published."""
        return None if self.weights in (None, "pretrained") else Path(str(self.weights))

    def uses(self) -> Uses:
        reason = "ignore_missing and adapt_stem are for model.weights: a file or folder"
        yield "ignore_missing adapt_stem", self.weights_path is not None, reason

    def rules(self) -> Rules:
        backbone = self.backbone
        if backbone.name is None:
            message = "model.backbone.name is needed: model.weights names no run folder"
            yield self.weights_path is not None, message
            message = (
                "model.backbone.stem and args need model.backbone.name: weights have their own"
            )
            yield not backbone.args and backbone.stem == "default", message


class ClassifierConfig(FeatureModelConfig):
    """`bce_target_threshold`: targets above it become 1, all others 0; null keeps targets."""

    head: ComponentConfig = ComponentConfig(name="linear")
    label_smoothing: Fraction = 0.0
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    bce_target_threshold: Annotated[float, Field(ge=0, lt=1)] | None = None

    def uses(self) -> Uses:
        yield from super().uses()
        yield "bce_target_threshold", self.loss == "bce", "it is for model.loss: bce"
        reason = "bce_target_threshold makes smoothed targets 0 or 1. Leave one of them out"
        yield "label_smoothing", self.bce_target_threshold is None, reason


class DetectorConfig(FeatureModelConfig):
    """`freeze_at`: number of frozen stages of the backbone, as in detectron2 (1 is the stem).

    `norm`: whether the backbone's BatchNorms train.
    """

    freeze_at: Annotated[int, Field(ge=0, le=5)] = 0
    norm: Literal["trained", "frozen", "synced"] = "trained"
    detector: ComponentConfig = ComponentConfig(name="torchvision_fpn")


class TractConfig(Section):
    """TrAct on the first layer, or on the `layers` named (from the model's root)."""

    enabled: bool = False
    lam: Positive = 0.1
    lam_mode: Literal["absolute", "relative"] = "absolute"
    layers: list[str] | None = None
    update_every: Count = 1

    def uses(self) -> Uses:
        yield "lam lam_mode layers update_every", self.enabled, "it is for tract.enabled: true"


# Evaluation.


class PeriodicConfig(Section):
    """An interval in epochs or in iterations; with neither, only the end of the training."""

    every_epochs: Positive | None = None
    every_iters: Count | None = None

    def uses(self) -> Uses:
        yield "every_epochs", self.every_iters is None, "give one of every_epochs and every_iters"


class SelectingEvaluation(PeriodicConfig):
    """`report: best` reports the checkpoint that is best on data.val by `metric`.

    `patience` ends the training after that many evaluations on data.val without an improvement.
    """

    report: Literal["last", "best"] = "last"
    patience: Count | None = None

    def uses(self) -> Uses:
        yield from super().uses()
        reason = "no evaluation before the end: set evaluation.every_epochs or every_iters"
        yield "patience", bool(self.every_epochs or self.every_iters), reason


class ClassificationEvaluation(SelectingEvaluation):
    """`protocol`: an entry of EVALUATORS, null for `accuracy`, and `metric` one of its metrics.

    `flip` averages the logits of an image and of its mirror image.
    """

    metric: str = "top1"
    protocol: str | None = None
    flip: bool = False


class DetectionEvaluation(SelectingEvaluation):
    """`protocol`: an entry of EVALUATORS, and `metric` one of its metrics.

    `flip` adds the detections of the mirror image.
    """

    metric: str = "ap50"
    protocol: str = "voc2007_devkit"
    flip: bool = False
    save_detections: CountOrZero = 8


class KnnConfig(Section):
    """Weighted nearest neighbours (DINO); every k is reported."""

    ks: Annotated[list[Count], Field(min_length=1)] = [10, 20, 100, 200]
    temperature: Positive = 0.07


Candidates = Annotated[list[Positive], Field(min_length=1)]


class LogisticRegressionConfig(Section):
    """L-BFGS; C is selected, then all of train is fitted. By default DINOv2's 45 values of C."""

    cs: Candidates = [10 ** (-6 + 11 * i / 44) for i in range(45)]
    max_iters: Count = 1000


class LinearConfig(Section):
    """SGD with a cosine; learning rate and weight decay are selected, then all of train is fitted.

    `batch_size` counts rows of features.
    """

    lrs: Candidates = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
    weight_decays: Annotated[list[NonNegative], Field(min_length=1)] = [0.0]
    max_epochs: Count = 30
    batch_size: Count = 256
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class SvmConfig(Section):
    """A linear SVM for each class (VISSL); its C is selected by cross-validation on train."""

    cs: Candidates = [0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0]
    folds: Annotated[int, Field(ge=2)] = 3
    max_iters: Count = 2000


class FewShotConfig(Section):
    """k training images a class, `samplings` times each; mean and deviation are reported.

    `cs` ([0.01, 0.1, 1, 10, 100]) and `folds` (3) are for logistic and svm, `temperature` (0.07)
    is for knn.
    """

    ks: Annotated[list[Count], Field(min_length=1)] = [1, 2, 4, 8]
    samplings: Count = 5
    classifier: Literal["logistic", "svm", "knn"] = "logistic"
    cs: Candidates | None = None
    folds: Annotated[int, Field(ge=2)] | None = None
    temperature: Positive | None = None

    def uses(self) -> Uses:
        reason = f"it is not for classifier: {self.classifier}"
        yield "cs folds", self.classifier != "knn", reason
        yield "temperature", self.classifier == "knn", reason


SELECTION_ONLY = "only logistic_regression and linear select on it, and neither runs. Set it null"


class ProbeEvaluation(Section):
    """The probes to run; null excludes one.

    `val_fraction` (0.1) is the part of train that `logistic_regression` and `linear` select on
    without data.val. `metric`: `knn<k>`, `logistic`, `linear`, `svm` or `shot<k>`, then `_top1`,
    `_top5` or `_mean_per_class`, or for several labels an image `_map_11point` or `_map_area`.
    """

    knn: KnnConfig | None = KnnConfig()
    logistic_regression: LogisticRegressionConfig | None = LogisticRegressionConfig()
    linear: LinearConfig | None = None
    svm: SvmConfig | None = None
    few_shot: FewShotConfig | None = None
    val_fraction: OpenFraction | None = None
    metric: str = "logistic_top1"

    def uses(self) -> Uses:
        yield "val_fraction", self.selects, SELECTION_ONLY

    @property
    def selects(self) -> bool:
        """Whether a probe selects on data.val, or on a part of train."""
        return self.logistic_regression is not None or self.linear is not None

    def probes(self) -> list[str]:
        """Return the names that the metrics of the probes to run start with."""
        return [
            *(f"knn{k}" for k in (self.knn.ks if self.knn else ())),
            *(["logistic"] if self.logistic_regression else []),
            *(["linear"] if self.linear else []),
            *(["svm"] if self.svm else []),
            *(f"shot{k}" for k in (self.few_shot.ks if self.few_shot else ())),
        ]


# Engine.


class CheckpointConfig(PeriodicConfig):
    """The last `keep` checkpoints are kept, and the best."""

    keep: Count = 1


class LogConfig(Section):
    every_iters: Count = 20
    tensorboard: bool = True


class DeviceConfig(Section):
    """`precision` is that of the forward pass (autocast); weights stay float32.

    `deterministic`: repeated runs give the same bits, or raise where torch cannot.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    deterministic: bool = False


class EngineConfig(DeviceConfig):
    """`grad_clip`: the largest gradient norm; `accumulate`: micro-batches in a step.

    `non_finite`: whether a loss or gradient that is not finite ends the run, or its step is
    skipped, at most `max_skipped` times.
    """

    grad_clip: Positive | None = None
    accumulate: Count = 1
    channels_last: bool = False
    non_finite: Literal["stop", "skip"] = "stop"
    max_skipped: Count = 10
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def uses(self) -> Uses:
        yield "max_skipped", self.non_finite == "skip", "it is for engine.non_finite: skip"


# Solver.


class OptimizerConfig(Section):
    """An optimizer; of `solver.first_layer`, another one for the first layer."""

    optimizer: str
    lr: Positive
    weight_decay: NonNegative = 0.0
    momentum: Fraction | None = None
    nesterov: bool = False
    optimizer_args: dict[str, Any] = {}


class SolverConfig(OptimizerConfig):
    """Optimizer and schedule; lengths are in epochs or in iterations, of which one is given."""

    decay_all: bool = True
    bias_lr_factor: Positive = 1.0
    bias_weight_decay: NonNegative | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    max_epochs: Positive | None = None
    max_iters: Count | None = None
    schedule: Literal["cosine", "cosine_epochs", "multistep", "constant"] = "cosine"
    end_factor: Fraction = 0.0
    warmup_epochs: NonNegative | None = None
    warmup_iters: CountOrZero | None = None
    warmup_start: Fraction = 0.0
    steps_epochs: list[Positive] | None = None
    steps_iters: list[Count] | None = None
    step_factor: OpenFraction = 0.1
    ema_decay: OpenFraction | None = None
    ema_warmup: bool = False
    first_layer: OptimizerConfig | None = None

    def uses(self) -> Uses:
        has_warmup = bool(self.warmup_epochs or self.warmup_iters)
        yield "end_factor", "cosine" in self.schedule, "it is for schedule: cosine or cosine_epochs"
        yield "step_factor", self.schedule == "multistep", "it is for schedule: multistep"
        yield "warmup_start", has_warmup, "there is no warm-up"
        yield "ema_warmup", self.ema_decay is not None, "it is for the average that ema_decay sets"

    def rules(self) -> Rules:
        for what in ("max", "warmup", "steps"):
            given = sum(getattr(self, f"{what}_{unit}") is not None for unit in ("epochs", "iters"))
            one = f"give one of solver.{what}_epochs and solver.{what}_iters"
            yield given < 2, f"{one}, and null unsets what a base gives: solver.{what}_epochs: null"
            yield given > 0 or what != "max", one
        has_steps = bool(self.steps_epochs or self.steps_iters)
        message = "solver.schedule: multistep and solver.steps_epochs (or steps_iters) go together"
        yield has_steps == (self.schedule == "multistep"), message
        # Lengths of the same unit; build_schedule compares others, in iterations.
        for unit in ("epochs", "iters"):
            length = getattr(self, f"max_{unit}") or float("inf")
            warmup = getattr(self, f"warmup_{unit}") or 0
            last_step = max(getattr(self, f"steps_{unit}") or [0])
            message = f"warmup_{unit} must be less than max_{unit}: {warmup:g} < {length:g}. "
            yield warmup < length, f"{message}Shorten it, or set solver.warmup_{unit}: null"
            message = f"steps_{unit} must lie before max_{unit}: {last_step:g} < {length:g}. "
            constant = f"solver.schedule: constant and solver.steps_{unit}: null"
            yield last_step < length, f"{message}Move them, or set {constant}"
