"""From a config to models and evaluators."""

import re
from typing import Any, cast

from torch import nn

import tract_transfer.detectron2  # noqa: F401 - registers its detector
from tract_transfer.build.weights import build_with_weights, call_checked, check_backbone
from tract_transfer.config.file import ConfigError
from tract_transfer.config.schema import ClassificationConfig, Config, DetectionConfig, ProbeConfig
from tract_transfer.config.sections import ComponentConfig, FeatureModelConfig
from tract_transfer.engine.determinism import seed_all
from tract_transfer.engine.hooks import Evaluator
from tract_transfer.evaluation import EVALUATORS, ClassificationEvaluator
from tract_transfer.models import DETECTORS, HEADS, Backbone, Classifier
from tract_transfer.models.classifier import FlipClassifier
from tract_transfer.models.detection.roi_heads import BoxOptions
from tract_transfer.models.detection.two_stage import FlipDetector
from tract_transfer.models.freeze import freeze_stages, set_drop_path, set_norm
from tract_transfer.registry import Registry

TrainedTask = ClassificationConfig | DetectionConfig


def preflight(config: Config) -> None:
    """Refuse what the config alone shows to be wrong, before data are read or models built.

    Raises:
        ConfigError: backbone, its arguments, its weights or the evaluation protocol do not exist.
    """
    check_backbone(config)
    if isinstance(config, DetectionConfig):
        _entry(EVALUATORS, config.evaluation.protocol, "evaluation.protocol", config)


def build_model(config: Config, num_classes: int) -> nn.Module:
    """Build the model of a task, with random weights by `seed`, or loaded ones.

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


def build_features(config: Config) -> Backbone:
    """Build the backbone of a config, with its weights.

    Raises:
        ConfigError: no such backbone, or its weights, stem or image size do not fit.
    """
    backbone = build_with_weights(config)
    if (drop_path := config.model.backbone.drop_path) is not None:
        try:
            set_drop_path(backbone.model, drop_path.rate, drop_path.mode)
        except ValueError as error:
            raise with_place(config, str(error)) from error
    if needs_whitening(config) and not isinstance(config, ClassificationConfig):
        raise config.error(
            "model.backbone.stem",
            "whitened is computed from the training images of a classification. Set model.weights "
            "to such a run's folder, or another stem.",
        )
    if not isinstance(config, DetectionConfig):
        size_px, fixed_px = config.data.transforms.size_px, backbone.image_size_px
        if fixed_px not in (None, size_px):
            raise config.error(
                "data.transforms.size_px",
                f"the backbone takes images of {fixed_px} px, not of {size_px}. Set {fixed_px}, or "
                "its image size in model.backbone.args (timm: img_size).",
            )
    return backbone


def needs_whitening(config: Config) -> bool:
    """Whether the stem's filters must be computed from training images: no weights have them."""
    model: FeatureModelConfig = config.model
    return model.backbone.stem == "whitened" and model.weights in (None, "pretrained")


def build_evaluator(config: Config, class_names: list[str]) -> Evaluator:
    """Build the evaluator of a task."""
    if not isinstance(config, DetectionConfig):
        return ClassificationEvaluator(class_names)
    return cast(Evaluator, EVALUATORS.get(config.evaluation.protocol)(class_names))


def build_evaluated(config: TrainedTask, model: nn.Module) -> nn.Module:
    """Return the model that is measured: the trained one, or over both views of an image."""
    if not config.evaluation.flip:
        return model
    if not isinstance(config, DetectionConfig):
        return FlipClassifier(model)
    # Views are joined as the detector joins its own boxes, if it has options for that.
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
    entry = _entry(registry, section.name, f"{key}.name", config)
    return call_checked(entry, section.name, section.args, f"{key}.args", config, positional)


def _entry(registry: Registry, name: str, key: str, config: Config) -> Any:
    try:
        return registry.get(name)
    except KeyError as error:
        raise config.error(key, str(error.args[0])) from error


def with_place(config: Config, message: str) -> ConfigError:
    """Return an error at the key a message starts with, as `data.batch_size must be ...`."""
    start = re.match(r"((?:solver|data|model)[.\w]*):? ", message)
    if start is None:
        return config.error("solver", message)
    return config.error(start[1], message[start.end() :])
