"""The bridge: where a Config becomes models, evaluators and a training."""

# K classes

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from pydantic import ConfigDict, ValidationError, create_model
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from tract_transfer.build_data import Data, build_train_batches
from tract_transfer.config import (
    ClassificationConfig,
    Config,
    DetectionConfig,
    ProbeConfig,
)
from tract_transfer.config_file import ConfigError
from tract_transfer.config_sections import BackboneConfig, ComponentConfig, FeatureModelConfig
from tract_transfer.engine.trainer import Trainer, seed_all
from tract_transfer.evaluation import EVALUATORS
from tract_transfer.joined_optimizer import JoinedOptimizer, keep_parameters
from tract_transfer.models import DETECTORS, HEADS, Backbone, Classifier, build_backbone
from tract_transfer.models.weights import build_from_card, has_card, load_weights, read_card
from tract_transfer.registry import Registry, did_you_mean
from tract_transfer.solver import build_optimizer, build_schedule, set_progress
from tract_transfer.tract import TrAct, find_first_layers

TrainedTask = ClassificationConfig | DetectionConfig
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_features(config: Config) -> Backbone:
    """Build the backbone of a config, with its weights.

    Raises:
        ConfigError: no such backbone, or one that its weights do not fit.
    """
    section: FeatureModelConfig = config.model
    wanted, path = section.backbone, Path(section.weights or "")
    published = section.weights == "pretrained"
    try:
        card = read_card(path) if wanted.name is None else None
        if wanted.name is not None and has_card(path):
            _check_card(read_card(path), wanted)
    except (FileNotFoundError, ValueError) as error:
        raise config.error("model.weights", str(error)) from error
    try:
        if card is not None:
            backbone = build_from_card(card)
        else:
            assert wanted.name is not None
            arguments = wanted.model_dump(include={"stem", "args"})
            backbone = build_backbone(wanted.name, pretrained=published, **arguments)
    except (KeyError, ValueError) as error:
        raise config.error("model.backbone", str(error.args[0])) from error
    if section.weights is not None and not published:
        try:
            load_weights(backbone, path, allow_missing=("mean", "std"), prefix="model.")
        except (FileNotFoundError, ValueError) as error:
            raise config.error("model.weights", str(error)) from error
    backbone.set_colours(wanted.mean, wanted.std)
    if not isinstance(config, DetectionConfig):
        size_px, fixed_px = config.data.transforms.size_px, backbone.image_size_px
        if fixed_px not in (None, size_px):
            raise config.error(
                "data.transforms.size_px",
                f"the backbone takes images of {fixed_px} px, not of {size_px}. Set {fixed_px}, or "
                "its own image size in model.backbone.args (timm: img_size).",
            )
    return backbone


def _check_card(card: Mapping[str, Any], wanted: BackboneConfig) -> None:
    """Refuse a backbone that the card of its weights contradicts, even where shapes fit."""
    told = {"name": card["name"], "stem": card["stem"], "args": card["args"]}
    given = wanted.model_dump(include=set(told))
    if told != given:
        raise ValueError(
            f"the weights are those of {told}, and model.backbone says {given}. Leave "
            "model.backbone out: the weights say what they are."
        )


def build_model(config: Config, num_classes: int) -> nn.Module:
    """Build the model of a task: its weights are random by `seed`, or loaded.

    Raises:
        ConfigError: a name or argument is unknown, or the parts do not fit.
    """
    seed_all(config.seed, 0, 0)
    backbone = build_features(config)
    if isinstance(config, DetectionConfig):
        section, positional = config.model.detector, (backbone, num_classes)
        return cast(nn.Module, _construct(DETECTORS, section, "model.detector", config, positional))
    if isinstance(config, ProbeConfig):
        return backbone
    positional_head = (backbone.feature_dim, num_classes)
    head = _construct(HEADS, config.model.head, "model.head", config, positional_head)
    return Classifier(backbone, head, config.model.label_smoothing)


def build_evaluator(config: Config, class_names: list[str]) -> Any:
    """Build the evaluator of a task."""
    if not isinstance(config, DetectionConfig):
        if config.evaluation.metric == "top5" and len(class_names) <= 5:
            message = f"top5 needs more than 5 classes, and there are {len(class_names)}. Set top1."
            raise config.error("evaluation.metric", message)
        return EVALUATORS.get("classification")(class_names)
    try:
        return EVALUATORS.get("voc")(class_names, config.evaluation.protocol)
    except ValueError as error:
        raise config.error("evaluation.protocol", str(error)) from error


def _construct(
    registry: Registry,
    section: ComponentConfig,
    key: str,
    config: Config,
    positional: tuple[Any, ...],
) -> Any:
    """Call a registry's entry with a section's args, checked against its signature."""
    try:
        entry = registry.get(section.name)
    except KeyError as error:
        raise config.error(f"{key}.name", str(error.args[0])) from error
    keywords = {
        name: (parameter.annotation, parameter.default)
        for name, parameter in inspect.signature(entry).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    strict = ConfigDict(extra="forbid", strict=True)
    schema = create_model("Args", __config__=strict, **cast(Mapping[str, Any], keywords))
    try:
        schema.model_validate(section.args)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        message = f"{problem['msg']}, got {problem['input']!r}."
        if problem["type"] == "extra_forbidden":
            message = f"unknown.{did_you_mean(name, keywords)}"
        message = f"{message} {section.name} takes {list(keywords)}."
        raise config.error(f"{key}.args.{name}", message) from error
    try:
        return entry(*positional, **section.args)
    except ValueError as error:
        raise config.error(key, str(error)) from error


class Length(NamedTuple):
    """A run's length and intervals in iterations."""

    iters_per_epoch: int
    max_iters: int
    warmup_iters: int
    steps_iters: list[int]
    evaluate_every: int | None
    checkpoint_every: int | None


def in_iterations(config: TrainedTask, num_images: int) -> Length:
    """Turn what a config says in epochs into iterations; an epoch drops its incomplete batch."""
    solver, evaluation = config.solver, config.evaluation
    checkpoint = config.engine.checkpoint
    per_epoch = max(1, num_images // config.data.batch_size)

    def count(epochs: float | None, iters: int | None) -> int | None:
        return max(1, round(epochs * per_epoch)) if epochs else iters

    steps = solver.steps_iters or [round(e * per_epoch) for e in solver.steps_epochs or []]
    max_iters = count(solver.max_epochs, solver.max_iters)
    assert max_iters is not None
    return Length(
        iters_per_epoch=per_epoch,
        max_iters=max_iters,
        warmup_iters=count(solver.warmup_epochs, solver.warmup_iters) or 0,
        steps_iters=steps,
        evaluate_every=count(evaluation.every_epochs, evaluation.every_iters),
        checkpoint_every=count(checkpoint.every_epochs, checkpoint.every_iters),
    )


def build_tract(config: TrainedTask, model: nn.Module) -> TrAct:
    """Build TrAct; where it is off, one that treats no layer.

    Raises:
        ConfigError: the layer is frozen, or none that TrAct can treat.
    """
    section = config.tract
    layers = section.layers if section.enabled else []
    try:
        return TrAct(
            model,
            section.lam,
            lam_mode=section.lam_mode,
            layers=layers,
            update_every=section.update_every,
        )
    except ValueError as error:
        key = "tract.layers" if section.layers else "tract"
        raise config.error(key, str(error)) from error


def _build_ema(config: TrainedTask, model: nn.Module, max_iters: int) -> ModelEmaV3 | None:
    """Build the average of the weights; refuse one that would still be the initial ones."""
    decay = config.solver.ema_decay
    if decay is None:
        return None
    if decay**max_iters > 0.01:
        fitting = 0.01 ** (1 / max_iters)
        raise config.error(
            "solver.ema_decay",
            f"{decay} over {max_iters} iterations leaves {decay**max_iters:.0%} of the initial "
            f"weights in the average. Set {fitting:.4f} or less.",
        )
    return ModelEmaV3(model, decay=decay)


def _build_optimizer(config: TrainedTask, model: nn.Module) -> Optimizer:
    """Build the optimizer; with `solver.first_layer`, one of its own for the first layer."""
    solver = config.solver
    rest = build_optimizer(
        model,
        **solver.model_dump(
            include={
                "optimizer", "lr", "weight_decay", "momentum", "nesterov", "decay_all",
                "optimizer_args",
            }
        ),
    )  # fmt: skip
    if solver.first_layer is None:
        return rest
    try:
        first = build_optimizer(model, **solver.first_layer.model_dump())
        names = config.tract.layers or find_first_layers(model)
    except ValueError as error:
        message = str(error).removeprefix("solver.")
        raise config.error("solver.first_layer", message) from error
    of_first = {parameter for name in names for parameter in model.get_submodule(name).parameters()}
    keep_parameters(first, of_first)
    keep_parameters(rest, [each for each in model.parameters() if each not in of_first])
    return JoinedOptimizer([first, rest])


def build_accelerator(config: Config) -> Accelerator:
    """Join the process group this process was launched in, or run alone.

    Raises:
        ConfigError: a GPU is asked for, and there is none.
    """
    device = config.engine.device
    if device == "cuda" and not torch.cuda.is_available():
        raise config.error("engine.device", "cuda was asked for, and torch sees no GPU. Set auto.")
    # A detector leaves the ends of its backbone unused.
    unused = isinstance(config, DetectionConfig)
    return Accelerator(
        cpu=device == "cpu" or not torch.cuda.is_available(),
        mixed_precision="no",  # engine.precision is, whatever the launcher's own default
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
    )


def build_trainer(
    config: ClassificationConfig | DetectionConfig, data: Data, accelerator: Accelerator
) -> Trainer:
    """Build the model and everything that trains it; hooks are the caller's.

    Raises:
        ConfigError: a part of the config does not fit another, or the data.
    """
    solver, engine = config.solver, config.engine
    build_evaluator(config, data.class_names)  # raises now, and not after the training
    model = build_model(config, len(data.class_names))
    if engine.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = _build_ema(config, model, in_iterations(config, len(data.train)).max_iters)
    tract = build_tract(config, model)
    length = in_iterations(config, len(data.train))
    try:
        optimizer = _build_optimizer(config, model)
        schedule = build_schedule(
            max_iters=length.max_iters,
            warmup_iters=length.warmup_iters,
            steps_iters=length.steps_iters,
            **solver.model_dump(include={"schedule", "warmup_start", "step_factor", "end_factor"}),
        )
        batches = build_train_batches(
            config,
            data.train,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            pin_memory=accelerator.device.type == "cuda",
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise _with_place(config, str(error)) from error
    if ema is not None:
        ema.to(accelerator.device)
    return Trainer(
        accelerator=accelerator,
        model=accelerator.prepare_model(model),
        optimizer=optimizer,
        schedule=schedule,
        set_lr=set_progress,
        batches=batches,
        tract=tract,
        max_iters=length.max_iters,
        seed=config.seed,
        precision=PRECISIONS[engine.precision],
        grad_clip=engine.grad_clip,
        accumulate=engine.accumulate,
        ema=ema,
    )


def _with_place(config: Config, message: str) -> ConfigError:
    """Say where the key a message begins with was set, as `data.batch_size must lie in ...`."""
    begins = re.match(r"((?:solver|data)[.\w]*):? ", message)
    if begins is None:
        return config.error("solver", message)
    return config.error(begins[1], message[begins.end() :])
