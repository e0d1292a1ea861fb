"""Small detectors of all four kinds, with images and targets."""

import torch

from tract_transfer.models import DETECTORS, build_backbone
from tract_transfer.models.detection.rpn import Objects
from tract_transfer.models.detection.two_stage import TwoStageDetector

PYRAMID = {"fpn_channels": 16, "head_dim": 32}
# name of the detector -> backbone, its arguments, arguments that make the detector small
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


def target(boxes, labels, difficult=None, **more) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "difficult": torch.tensor(difficult or [False] * len(labels), dtype=torch.bool),
        "image_id": 7,
        **more,
    }


IMAGES = [picture(64, 96), picture(80, 64, 1)]
TARGETS = [target([[5, 5, 40, 50], [50, 10, 90, 60]], [0, 2]), target([[1, 2, 30, 70]], [1])]


def losses_of(model, targets=TARGETS) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return model.train()(IMAGES, targets)


# What both stages read: feature maps of strides 4 and 8, and the objects of two images of SIZES.
SIZES = [(64, 96), (50, 70)]
NO_BOXES = torch.empty(0, 4)
MANY = 10**6
OBJECTS = [
    Objects(torch.tensor([[5.0, 5, 40, 50], [50, 10, 90, 60]]), torch.tensor([0, 2]), NO_BOXES),
    Objects(torch.tensor([[1.0, 2, 30, 48]]), torch.tensor([1]), NO_BOXES),
]
NO_OBJECTS = [Objects(NO_BOXES, torch.empty(0).long(), NO_BOXES)] * 2
# The same objects in images that consist of nothing but a region to ignore.
IN_IGNORED = [image._replace(ignored=torch.tensor([[0.0, 0, 96, 64]])) for image in OBJECTS]


def some_maps(channels: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, channels, 64 // s, 96 // s, generator=generator) for s in (4, 8)]
