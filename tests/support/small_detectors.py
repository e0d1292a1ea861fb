"""The four kinds of detector, small, and what they are given."""

import torch

from tract_transfer.models import DETECTORS, build_backbone
from tract_transfer.models.detection.two_stage import TwoStageDetector

PYRAMID = {"fpn_channels": 16, "head_dim": 32}
# Backbone, its arguments, the detector's own small ones.
KINDS = {
    "torchvision_fpn": ("timm/test_resnet", {}, PYRAMID),
    "torchvision_c4": ("cifar/resnet18", {"width": 8}, {}),
    "torchvision_c5": ("timm/vgg11", {"mlp_ratio": 0.01}, {}),
    "torchvision_vitdet": ("timm/test_vit", {}, PYRAMID),
}
SMALL = {"short_side_px": 64, "max_side_px": 96}
FEW = {"post_nms_train": 50, "post_nms_test": 50}


def detector(kind="torchvision_fpn", backbone=None, **args) -> TwoStageDetector:
    torch.manual_seed(0)
    name, backbone_args, small = KINDS[kind]
    backbone = backbone or build_backbone(name, args=backbone_args)
    rpn = {**FEW, **args.pop("rpn", {})}
    box = {"rois_per_image": 16, **args.pop("box", {})}
    return DETECTORS.get(kind)(backbone, 3, **{**SMALL, **small, **args}, rpn=rpn, box=box)


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)


def target(boxes, labels, difficult=None) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "difficult": torch.tensor(difficult or [False] * len(labels), dtype=torch.bool),
        "image_id": 7,
    }


IMAGES = [picture(64, 96), picture(80, 64, 1)]
TARGETS = [target([[5, 5, 40, 50], [50, 10, 90, 60]], [0, 2]), target([[1, 2, 30, 70]], [1])]


def losses_of(model, targets=TARGETS) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return model.train()(IMAGES, targets)
