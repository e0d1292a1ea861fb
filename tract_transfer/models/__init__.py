"""Backbones, heads, and the two kinds of model built from them: classifiers and detectors."""

import tract_transfer.models.cifar  # noqa: F401 - registers its backbones
from tract_transfer.models.backbone import Backbone
from tract_transfer.models.backbones import BACKBONES, build_backbone
from tract_transfer.models.classifier import HEADS, Classifier
from tract_transfer.models.detection.detectors import DETECTORS

__all__ = ["BACKBONES", "DETECTORS", "HEADS", "Backbone", "Classifier", "build_backbone"]
