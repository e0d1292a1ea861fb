"""From a config to models and evaluators."""

from typing import cast

from torch import nn

import tract_transfer.detectron2  # noqa: F401 - registers its detector
from tract_transfer.build.batches import build_transforms
from tract_transfer.build.weights import build_with_weights, call_entry, check_backbone, errors_at
from tract_transfer.config.schema import (
    ClassificationConfig,
    Config,
    DetectionConfig,
    ProbeConfig,
    TrainedTask,
)
from tract_transfer.engine.determinism import seed_all
from tract_transfer.engine.hooks import Evaluator
from tract_transfer.evaluation import EVALUATORS, ClassificationEvaluator
from tract_transfer.models import DETECTORS, HEADS, Backbone, Classifier
from tract_transfer.models.classifier import FlipClassifier
from tract_transfer.models.detection.roi_heads import BoxOptions
from tract_transfer.models.detection.two_stage import FlipDetector
from tract_transfer.models.freeze import freeze_stages, set_drop_path, set_norm


def preflight(config: Config) -> None:
    """Refuse what the config alone shows to be wrong, before data are read or models built."""
    check_backbone(config)
    build_transforms(config)
    if isinstance(config, DetectionConfig):
        with errors_at(config, "evaluation.protocol", KeyError):
            EVALUATORS.get(config.evaluation.protocol)


def build_model(config: Config, num_classes: int) -> nn.Module:
    """Build the model of a task, with random weights by `seed`, or loaded ones."""
    seed_all(config.seed, 0, 0)
    backbone = build_features(config)
    if isinstance(config, DetectionConfig):
        with errors_at(config, "model", prefix=r"model\.\w+"):
            freeze_stages(set_norm(backbone, config.model.norm), config.model.freeze_at)
        entry = config.model.detector
        detector = call_entry(config, DETECTORS, "model.detector", entry, backbone, num_classes)
        return cast(nn.Module, detector)
    if isinstance(config, ProbeConfig):
        return backbone
    dims = (backbone.feature_dim, num_classes)
    head = call_entry(config, HEADS, "model.head", config.model.head, *dims)
    losses = config.model.model_dump(include={"label_smoothing", "loss", "bce_target_threshold"})
    return Classifier(backbone, head, **losses)


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
