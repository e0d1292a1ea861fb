"""The sections of a config: a section of a YAML file is a class, a key is a field.

A section goes to a function as arguments of the same names (see build.py).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Colour = Annotated[list[Positive], Field(min_length=3, max_length=3)]
DarkColour = Annotated[list[Fraction], Field(min_length=3, max_length=3)]


class Section(BaseModel):
    """A part of a config: unknown keys, wrong types and later changes are errors."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


# ------------------------------------------------------------------------------------- model


class DropPathConfig(Section):
    """Stochastic depth: `rate` for every block, or from 0 for the first to `rate` for the last."""

    rate: Annotated[float, Field(gt=0, lt=1)]
    mode: Literal["constant", "linear"]


class BackboneConfig(Section):
    """`name: null` takes the backbone that `model.weights` describes.

    `mean: [0, 0, 0]` with `std` of 1 leaves images in [0, 1], and with `std` of 1/255 in [0, 255].
    """

    name: str | None = None
    stem: Literal["default", "cifar", "patch_norm", "dual_patch_norm", "whitened"] = "default"
    args: dict[str, Any] = {}
    mean: DarkColour | None = None
    std: Colour | None = None
    drop_path: DropPathConfig | None = None

    @model_validator(mode="after")
    def _depth_is_told_once(self) -> "BackboneConfig":
        if self.drop_path is not None and "drop_path_rate" in self.args:
            raise ValueError("give one of model.backbone.drop_path and args.drop_path_rate")
        return self


class ComponentConfig(Section):
    """An entry of a registry, and the arguments of its constructor."""

    name: str
    args: dict[str, Any] = {}


class FeatureModelConfig(Section):
    """A backbone. `weights`: null, `pretrained`, a run folder or a weights file.

    `ignore_missing`: patterns of names that the file may lack; `adapt_stem`: resample a ViT's
    patches to the backbone's size.
    """

    backbone: BackboneConfig = BackboneConfig()
    weights: str | None = None
    ignore_missing: list[str] = []
    adapt_stem: bool = False

    @model_validator(mode="after")
    def _backbone_is_known(self) -> "FeatureModelConfig":
        if self.backbone.name is None and self.weights in (None, "pretrained"):
            raise ValueError("model.backbone.name is needed: model.weights names no run folder")
        if self.backbone.name is None and (self.backbone.args or self.backbone.stem != "default"):
            raise ValueError(
                "model.backbone.stem and args need model.backbone.name; without it they come from "
                "model.weights"
            )
        if self.weights in (None, "pretrained") and (self.ignore_missing or self.adapt_stem):
            raise ValueError(
                "model.ignore_missing and model.adapt_stem are for model.weights: a file or folder"
            )
        return self


class ClassifierConfig(FeatureModelConfig):
    """`bce_target_threshold`: targets above it are 1, all others 0; null leaves them."""

    head: ComponentConfig = ComponentConfig(name="linear")
    label_smoothing: Fraction = 0.0
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    bce_target_threshold: Annotated[float, Field(ge=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _threshold_is_bce_s(self) -> "ClassifierConfig":
        if self.bce_target_threshold is None:
            return self
        if self.loss != "bce":
            raise ValueError("bce_target_threshold has no use here: it is for model.loss: bce")
        if self.label_smoothing:
            raise ValueError(
                "bce_target_threshold makes of every smoothed target 0 or 1 again: set "
                "model.label_smoothing: 0, or leave the threshold out"
            )
        return self


class DetectorConfig(FeatureModelConfig):
    """`freeze_at`: stages of the backbone that stay as they are, counted as in detectron2: 1 is the
    stem. `norm`: whether its BatchNorms train."""

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

    @model_validator(mode="after")
    def _off_means_off(self) -> "TractConfig":
        chosen = self.lam, self.lam_mode, self.layers, self.update_every
        if not self.enabled and chosen != (0.1, "absolute", None, 1):
            raise ValueError(
                "tract.lam, lam_mode, layers and update_every are for tract.enabled: true"
            )
        return self


# --------------------------------------------------------------------------------- evaluation


class PeriodicConfig(Section):
    """How often, in epochs or in iterations; neither is: at the end alone."""

    every_epochs: Positive | None = None
    every_iters: Count | None = None

    @model_validator(mode="after")
    def _interval_is_one(self) -> "PeriodicConfig":
        if None not in (self.every_epochs, self.every_iters):
            raise ValueError("give one of every_epochs and every_iters")
        return self


class SelectingEvaluation(PeriodicConfig):
    """`report: best` reports the checkpoint that is best on data.val by `metric`; `patience` ends
    the training after so many evaluations on data.val without a better one."""

    report: Literal["last", "best"] = "last"
    patience: Count | None = None

    @model_validator(mode="after")
    def _patience_has_evaluations(self) -> "SelectingEvaluation":
        if self.patience is not None and not (self.every_epochs or self.every_iters):
            raise ValueError(
                "patience counts evaluations, and there are none before the end: set "
                "evaluation.every_epochs or every_iters"
            )
        return self


class ClassificationEvaluation(SelectingEvaluation):
    """`flip` averages the logits of an image and of its mirror image."""

    metric: Literal["top1", "top5", "mean_per_class"] = "top1"
    flip: bool = False


class DetectionEvaluation(SelectingEvaluation):
    """`protocol`: an entry of evaluation.EVALUATORS; `flip` adds what mirror images show."""

    metric: Literal["ap50", "ap75", "ap"] = "ap50"
    protocol: str = "voc2007_devkit"
    flip: bool = False
    save_detections: Annotated[int, Field(ge=0)] = 8


# ------------------------------------------------------------------------------------- engine


class CheckpointConfig(PeriodicConfig):
    """`keep` last checkpoints stay, and the best."""

    keep: Count = 1


class LogConfig(Section):
    every_iters: Count = 20
    tensorboard: bool = True


class DeviceConfig(Section):
    """`precision` is that of the forward (autocast); weights stay float32. `deterministic`: a run
    gives the same bits again, or raises where torch cannot."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    deterministic: bool = False


class EngineConfig(DeviceConfig):
    """`grad_clip`: the largest gradient norm; `accumulate`: micro-batches of a step; `non_finite`:
    whether a loss or gradient that is no finite number ends the run, or its step is passed over,
    as many as `max_skipped` times."""

    grad_clip: Positive | None = None
    accumulate: Count = 1
    channels_last: bool = False
    non_finite: Literal["stop", "skip"] = "stop"
    max_skipped: Count = 10
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _stopping_skips_nothing(self) -> "EngineConfig":
        if self.non_finite == "stop" and self.max_skipped != 10:
            raise ValueError("engine.max_skipped has no use here: it is of non_finite: skip")
        return self


# --- The solver's section of a config: optimizer, learning rate, schedule and lengths.


class FirstLayerConfig(Section):
    """Another optimizer for the first layer alone, on the same schedule."""

    optimizer: str
    lr: Positive
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Fraction | None = None
    nesterov: bool = False
    optimizer_args: dict[str, Any] = Field(default={})


# What an option of the solver is for, said where it would be ignored.
USES = {
    "end_factor": "it is of schedule: cosine or cosine_epochs",
    "step_factor": "it is of schedule: multistep",
    "warmup_start": "it is of a warm-up, and there is none",
    "ema_warmup": "it is of the average that ema_decay asks for",
}


class SolverConfig(Section):
    """Lengths are in epochs or in iterations: the one given counts."""

    optimizer: str
    lr: Positive
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Fraction | None = None
    nesterov: bool = False
    decay_all: bool = True
    bias_lr_factor: Positive = 1.0
    bias_weight_decay: Annotated[float, Field(ge=0)] | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    optimizer_args: dict[str, Any] = Field(default={})
    max_epochs: Positive | None = None
    max_iters: Count | None = None
    schedule: Literal["cosine", "cosine_epochs", "multistep", "constant"] = "cosine"
    end_factor: Fraction = 0.0
    warmup_epochs: Annotated[float, Field(ge=0)] | None = None
    warmup_iters: Annotated[int, Field(ge=0)] | None = None
    warmup_start: Fraction = 0.0
    steps_epochs: list[Positive] | None = None
    steps_iters: list[Count] | None = None
    step_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    ema_warmup: bool = False
    first_layer: FirstLayerConfig | None = None

    @model_validator(mode="after")
    def _lengths_are_one(self) -> "SolverConfig":
        for what in ("max", "warmup", "steps"):
            given = [getattr(self, f"{what}_{unit}") is not None for unit in ("epochs", "iters")]
            one = f"give one of solver.{what}_epochs and solver.{what}_iters"
            if all(given):
                raise ValueError(
                    f"{one}, and null unsets what a base gives: solver.{what}_epochs: null"
                )
            if what == "max" and not any(given):
                raise ValueError(one)
        steps = self.steps_epochs or self.steps_iters
        if (self.schedule == "multistep") != bool(steps):
            raise ValueError(
                "solver.schedule: multistep and solver.steps_epochs (or steps_iters) go together"
            )
        return self

    @model_validator(mode="after")
    def _parts_end_before_the_whole(self) -> "SolverConfig":
        """Compares what has one unit; build_schedule compares the rest, in iterations."""
        for unit in ("epochs", "iters"):
            length = getattr(self, f"max_{unit}")
            warmup = getattr(self, f"warmup_{unit}")
            steps = getattr(self, f"steps_{unit}")
            if length and warmup and warmup >= length:
                raise ValueError(
                    f"warmup_{unit} must be less than max_{unit}, and {warmup:g} is not less than "
                    f"{length:g}. Shorten it, or set solver.warmup_{unit}: null"
                )
            if length and steps and max(steps) >= length:
                raise ValueError(
                    f"steps_{unit} must lie before max_{unit}, and {max(steps):g} is not before "
                    f"{length:g}. Move them, or set solver.schedule: constant and "
                    f"solver.steps_{unit}: null"
                )
        return self

    @model_validator(mode="after")
    def _options_are_the_schedules(self) -> "SolverConfig":
        ignored = {
            "end_factor": "cosine" not in self.schedule and self.end_factor != 0,
            "step_factor": self.schedule != "multistep" and self.step_factor != 0.1,
            "ema_warmup": self.ema_decay is None and self.ema_warmup,
            "warmup_start": not (self.warmup_epochs or self.warmup_iters)
            and self.warmup_start != 0,
        }
        for key, is_ignored in ignored.items():
            if is_ignored:
                raise ValueError(f"solver.{key} has no use here: {USES[key]}")
        return self
