"""The bridge: where a Config becomes models and evaluators."""

import re
from typing import Any, cast
from torch import nn
import tract_transfer.detectron2  # noqa: F401 - registers its detector
from tract_transfer.build.weights import build_with_weights
from tract_transfer.build.weights import call_checked
from tract_transfer.config.schema import (ClassificationConfig, Config, DetectionConfig, ProbeConfig)
from tract_transfer.config.file import ConfigError
from tract_transfer.config.sections import (ComponentConfig, FeatureModelConfig)
from tract_transfer.engine.determinism import (seed_all)
from tract_transfer.engine.hooks import Evaluator
from tract_transfer.evaluation import (EVALUATORS, ClassificationEvaluator)
from tract_transfer.models import (DETECTORS, HEADS, Backbone, Classifier)
from tract_transfer.models.freeze import set_drop_path
from tract_transfer.models.classifier import FlipClassifier
from tract_transfer.models.detection.two_stage import FlipDetector
from tract_transfer.models.freeze import (freeze_stages, set_norm)
from tract_transfer.models.detection.options import BoxOptions
from tract_transfer.registry import Registry


TrainedTask = ClassificationConfig | DetectionConfig


def build_features(config: Config) -> Backbone:
    """Build the backbone of a config, with its weights.

    Raises:
        ConfigError: no such backbone, or one that its weights do not fit.
    """
    wanted = config.model.backbone
    backbone = build_with_weights(config)
    if wanted.drop_path is not None:
        try:
            set_drop_path(backbone.model, wanted.drop_path.rate, wanted.drop_path.mode)
        except ValueError as error:
            raise with_place(config, str(error)) from error
    if needs_whitening(config) and not isinstance(config, ClassificationConfig):
        raise config.error(
            "model.backbone.stem",
            "whitened is made from the images of a classification's training. Set model.weights "
            "to its run folder, or another stem.",
        )
    if not isinstance(config, DetectionConfig):
        size_px, fixed_px = config.data.transforms.size_px, backbone.image_size_px
        if fixed_px not in (None, size_px):
            raise config.error(
                "data.transforms.size_px",
                f"the backbone takes images of {fixed_px} px, not of {size_px}. Set {fixed_px}, or "
                "its own image size in model.backbone.args (timm: img_size).",
            )
    return backbone


def needs_whitening(config: Config) -> bool:
    """Whether the stem's filters are to be made from training images: no weights bring them."""
    model: FeatureModelConfig = config.model
    return model.backbone.stem == "whitened" and model.weights in (None, "pretrained")


def build_model(config: Config, num_classes: int) -> nn.Module:
    """Build the model of a task: its weights are random by `seed`, or loaded.

    Raises:
        ConfigError: a name or argument is unknown, or the parts do not fit.
    """
    seed_all(config.seed, 0, 0)
    backbone = build_features(config)
    if isinstance(config, DetectionConfig):
        try:
            freeze_stages(set_norm(backbone, config.model.norm), config.model.freeze_at)
        except ValueError as error:
            raise with_place(config, str(error)) from error
        section, positional = config.model.detector, (backbone, num_classes)
        return cast(nn.Module, _construct(DETECTORS, section, "model.detector", config, positional))
    if isinstance(config, ProbeConfig):
        return backbone
    positional_head = (backbone.feature_dim, num_classes)
    head = _construct(HEADS, config.model.head, "model.head", config, positional_head)
    losses = config.model.model_dump(include={"label_smoothing", "loss", "bce_target_threshold"})
    return Classifier(backbone, head, **losses)


def build_evaluator(config: Config, class_names: list[str]) -> Evaluator:
    """Build the evaluator of a task.

    Raises:
        ConfigError: the protocol is unknown, or the metric is not defined for so few classes.
    """
    if not isinstance(config, DetectionConfig):
        if config.evaluation.metric == "top5" and len(class_names) <= 5:
            message = f"top5 needs more than 5 classes, and there are {len(class_names)}. Set top1."
            raise config.error("evaluation.metric", message)
        return ClassificationEvaluator(class_names)
    try:
        make = EVALUATORS.get(config.evaluation.protocol)
    except KeyError as error:
        raise config.error("evaluation.protocol", str(error.args[0])) from error
    return cast(Evaluator, make(class_names))


def build_evaluated(config: TrainedTask, model: nn.Module) -> nn.Module:
    """Return what is measured of a trained model: it as it is, or over both views of an image."""
    if not config.evaluation.flip:
        return model
    if not isinstance(config, DetectionConfig):
        return FlipClassifier(model)
    # Views are joined as the detector joins its own boxes, where it says how.
    box = getattr(getattr(model, "roi_heads", None), "options", BoxOptions())
    return FlipDetector(model, box.nms_iou, box.max_detections)


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
    args = f"{key}.args"
    return call_checked(entry, section.name, section.args, args, config, positional)


def with_place(config: Config, message: str) -> ConfigError:
    """Say where the key a message begins with was set, as `data.batch_size must lie in ...`."""
    begins = re.match(r"((?:solver|data|model)[.\w]*):? ", message)
    if begins is None:
        return config.error("solver", message)
    return config.error(begins[1], message[begins.end() :])
