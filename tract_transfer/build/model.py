"""From a config to models and evaluators."""

from typing import Any, cast

import torch
from torch import nn

import tract_transfer.detectron2  # noqa: F401 - registers its detector
from tract_transfer.build.batches import build_transforms
from tract_transfer.build.data import SOURCE_KEYS, source_entry
from tract_transfer.build.weights import (
    build_with_weights,
    call_entry,
    check_backbone,
    errors_at,
    find_entry,
    use_plugins,
)
from tract_transfer.config.data import PluginSource
from tract_transfer.config.schema import (
    ClassificationConfig,
    Config,
    DetectionConfig,
    ProbeConfig,
    TrainedTask,
)
from tract_transfer.data.sources import SOURCES
from tract_transfer.engine.determinism import seed_all
from tract_transfer.engine.hooks import Evaluator, evaluating
from tract_transfer.evaluation import find_evaluator, metrics_of
from tract_transfer.models import DETECTORS, HEADS, Backbone, Classifier
from tract_transfer.models.classifier import FlipClassifier
from tract_transfer.models.detection.roi_heads import BoxOptions
from tract_transfer.models.detection.two_stage import FlipDetector
from tract_transfer.models.freeze import freeze_stages, set_drop_path, set_norm
from tract_transfer.registry import did_you_mean


def preflight(config: Config) -> None:
    """Refuse what the config alone shows to be wrong, before data are read or models built."""
    check_backbone(config)
    check_entries(config)


def check_entries(config: Config) -> None:
    """Refuse sources, augmentations, heads, detectors and evaluators that do not exist or fit."""
    use_plugins(config)
    for name in ("train", "val", "test"):
        section = getattr(config.data, name)
        if isinstance(section, PluginSource):
            entry = source_entry(section)
            find_entry(config, SOURCES, f"data.{name}", entry, subkeys=SOURCE_KEYS)
    build_transforms(config)
    if isinstance(config, DetectionConfig):
        find_entry(config, DETECTORS, "model.detector", config.model.detector)
    elif isinstance(config, ClassificationConfig):
        find_entry(config, HEADS, "model.head", config.model.head)
    if not isinstance(config, ProbeConfig):
        metric, metrics = config.evaluation.metric, metrics_of(_find_evaluator(config))
        if metric not in metrics:
            hint = did_you_mean(metric, metrics)
            message = f"{metric!r} is no metric of {_protocol(config)}.{hint} It has {metrics}."
            raise config.error("evaluation.metric", message)


def _protocol(config: Config) -> str:
    return (
        "accuracy" if isinstance(config, ProbeConfig) else config.evaluation.protocol or "accuracy"
    )


def _find_evaluator(config: Config) -> Any:
    """Return the evaluator's entry; a probe's is that of classification."""
    task = "detection" if isinstance(config, DetectionConfig) else "classification"
    with errors_at(config, "evaluation.protocol", (KeyError, ValueError)):
        return find_evaluator(_protocol(config), task)


def build_model(config: Config, num_classes: int) -> nn.Module:
    """Build the model of a task, with random weights by `seed`, or loaded ones."""
    seed_all(config.seed, 0, 0)
    backbone = build_features(config)
    if isinstance(config, DetectionConfig):
        with errors_at(config, "model", prefix=r"model\.\w+"):
            freeze_stages(set_norm(backbone, config.model.norm), config.model.freeze_at)
        entry = config.model.detector
        detector = call_entry(config, DETECTORS, "model.detector", entry, backbone, num_classes)
        if not DETECTORS.is_built_in(entry.name):
            with errors_at(config, "model.detector"):
                _check_detector(entry.name, detector, backbone)
        return cast(nn.Module, detector)
    if isinstance(config, ProbeConfig):
        return backbone
    dims = (backbone.feature_dim, num_classes)
    head = call_entry(config, HEADS, "model.head", config.model.head, *dims)
    if not HEADS.is_built_in(config.model.head.name):
        with errors_at(config, "model.head"):
            _check_head(config.model.head.name, head, *dims)
    losses = config.model.model_dump(include={"label_smoothing", "loss", "bce_target_threshold"})
    return Classifier(backbone, head, **losses)


def _check_head(name: str, head: Any, feature_dim: int, num_classes: int) -> None:
    """Refuse a plug-in's head that does not map (B, D) features to (B, K) logits."""
    if not isinstance(head, nn.Module):
        raise ValueError(f"{name} returns {type(head).__name__}. Return a torch.nn.Module.")
    with torch.random.fork_rng(devices=[]), evaluating(head):
        try:
            shape = tuple(head(torch.zeros(2, feature_dim)).shape)
        except Exception as error:  # whatever the module of a plug-in raises
            message = f"{name} fails on features of shape (2, {feature_dim})"
            raise ValueError(f"{message}: {type(error).__name__}: {error}") from error
    if shape != (2, num_classes):
        raise ValueError(
            f"{name} maps features of shape (2, {feature_dim}) to {shape}. Return logits of shape "
            f"(2, {num_classes})."
        )


def _check_detector(name: str, detector: Any, backbone: Backbone) -> None:
    """Refuse a plug-in's detector that a run could neither evaluate nor save."""
    if not isinstance(detector, nn.Module) or getattr(detector, "backbone", None) is not backbone:
        raise ValueError(
            f"{name} returns {type(detector).__name__}. Return a torch.nn.Module whose attribute "
            "backbone is the backbone that it was given."
        )
    with torch.random.fork_rng(devices=[]), evaluating(detector):
        try:
            (found,) = detector([torch.zeros(3, 128, 128, dtype=torch.uint8)])
        except Exception as error:  # whatever the module of a plug-in raises
            message = f"{name} fails on a list of one blank image of 128 px"
            raise ValueError(f"{message}: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict) or not {"boxes", "scores", "labels"} <= found.keys():
        raise ValueError(
            f"{name} must return boxes, scores and labels for each image in eval mode."
        )


def build_features(config: Config) -> Backbone:
    """Build the backbone of a config, with its weights."""
    backbone = build_with_weights(config)
    if (drop_path := config.model.backbone.drop_path) is not None:
        key = "model.backbone.drop_path"
        with errors_at(config, key, prefix=key):
            set_drop_path(backbone.model, drop_path.rate, drop_path.mode)
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
    return config.model.backbone.stem == "whitened" and config.model.weights_path is None


def build_evaluator(config: Config, class_names: list[str]) -> Evaluator:
    """Build the evaluator of a task."""
    return cast(Evaluator, _find_evaluator(config)(class_names))


def build_evaluated(config: TrainedTask, model: nn.Module) -> nn.Module:
    """Return the model that is measured: the trained one, or over both views of an image."""
    if not config.evaluation.flip:
        return model
    if not isinstance(config, DetectionConfig):
        return FlipClassifier(model)
    # Views are joined as the detector joins its own boxes, if it has options for that.
    box = getattr(getattr(model, "roi_heads", None), "options", BoxOptions())
    return FlipDetector(model, box.nms_iou, box.max_detections)
