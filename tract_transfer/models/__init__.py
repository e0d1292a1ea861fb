"""Backbones, heads, and the two kinds of model built from them: classifiers and detectors."""

from tract_transfer.models.backbone import Backbone
from tract_transfer.models.backbones import BACKBONES, build_backbone
from tract_transfer.models.cifar import ZOO
from tract_transfer.models.classifier import HEADS, Classifier
from tract_transfer.models.detection.detectors import DETECTORS

__all__ = ["BACKBONES", "DETECTORS", "HEADS", "ZOO", "Backbone", "Classifier", "build_backbone"]
