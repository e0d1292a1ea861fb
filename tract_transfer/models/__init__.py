"""Backbones, heads, and the two models made of them: the classifier and the detectors."""

from tract_transfer.models.backbones import BACKBONES, Backbone, build_backbone
from tract_transfer.models.cifar import ZOO
from tract_transfer.models.classifier import Classifier
from tract_transfer.models.detectors import DETECTORS
from tract_transfer.models.detectron2 import detectron2_detector
from tract_transfer.models.heads import HEADS

__all__ = [
    "BACKBONES",
    "DETECTORS",
    "HEADS",
    "ZOO",
    "Backbone",
    "Classifier",
    "build_backbone",
    "detectron2_detector",
]
