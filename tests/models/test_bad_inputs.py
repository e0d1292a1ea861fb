"""Bad names, arguments and combinations of models, each refused with the fix."""

import pytest
import torch
from small_detectors import detector

from tract_transfer.models import build_backbone
from tract_transfer.models.detection.detectors import with_options
from tract_transfer.models.detection.roi_heads import BoxOptions
from tract_transfer.models.detection.rpn import RpnOptions
from tract_transfer.models.freeze import freeze_stages, set_drop_path, set_norm


def backbone(name, **options):
    with torch.device("meta"):
        return build_backbone(name, **options)


def built(name, **options):
    return lambda: build_backbone(name, **options)


def detector_on(kind, name, args=None):
    return lambda: detector(kind, backbone=backbone(name, args=args))


def rpn(**options):
    return lambda: with_options(RpnOptions(), options, "rpn")


def box(**options):
    return lambda: with_options(BoxOptions(), options, "box")


BUILT = r"cannot be built with model\.backbone\.args .*"
PATCH_14 = {"img_size": 56, "depth": 1, "patch_size": 14, "embed_dim": 48}
# backbone -> what the message says
UNKNOWN = {
    "cifar/resnet19": "Did you mean 'cifar/resnet18'",
    "resnet18": "Did you mean 'cifar/resnet18'",
    "timm/resnt18": "Did you mean 'resnet18'",
    "timm/vit_tiny_patch16_225": "Did you mean 'vit_tiny_patch16_224'",
    "torchvision/resnet19": "Did you mean 'resnet18'",
    "timm": "timm has no model ''",
    "torchvision/fasterrcnn_resnet50_fpn": "no classification model",
}
# (backbone, its arguments) -> what the message says
ARGS = [
    ("cifar/vit", {"depht": 3}, "depht"),
    ("cifar/vit", {"width": 100}, "divisible by num_heads"),
    ("timm/test_resnet", {"bogus": 1}, "bogus"),
    ("timm/test_resnet", {"num_classes": 3}, "num_classes"),
    ("torchvision/resnet18", {"weights": None}, "weights"),
]
# (backbone, stem) -> what the message says
STEMS = [
    ("timm/resnet18", "patch_norm", "patch_norm needs a model that starts with a convolution over"),
    ("timm/mobilenetv2_050", "dual_patch_norm", "Set model.backbone.stem: default"),
    ("cifar/vit", "cifar", r"stem: cifar needs .* whose windows overlap .set the patch size"),
    ("timm/test_convnext", "cifar", "set the patch size"),
    ("timm/repvgg_a0", "cifar", "starts with .*conv_kxk.*conv_1x1.*None"),
    ("timm/repvgg_a0", "whitened", "whitened needs a model that starts with one ungrouped conv"),
    ("timm/resnet18", "round", "one of default, cifar, patch_norm, dual_patch_norm, whitened"),
]
# (detector, backbone, its arguments) -> what the message says
DETECTORS = [
    ("torchvision_fpn", "timm/test_vit", {"dynamic_img_size": True}, r"this backbone has \[16\]"),
    ("torchvision_fpn", "cifar/vit", {"depth": 1}, "takes 32 px alone"),
    ("torchvision_vitdet", "timm/test_resnet", {}, r"one stride.*\[2, 4, 8, 16, 32\].*_fpn"),
    ("torchvision_vitdet", "timm/vit_tiny_patch16_224", PATCH_14, r"that 4 divides.*\[14\]"),
    ("torchvision_c4", "timm/test_vit", {}, r"needs a ResNet.*layer4.*VisionTransformer"),
    ("torchvision_c4", "timm/vgg11", {}, r"needs a ResNet.*layer4.*VGG"),
    ("torchvision_c5", "timm/test_resnet", {}, r"needs a VGG.*fc6 and fc7.*ResNet"),
]
# What is refused: how it is made, and what the message says.
BAD = {
    **{
        f"{name} with the arguments {args}": (built(name, args=args), f"{name} {BUILT}{match}")
        for name, args, match in ARGS
    },
    **{f"{name} with the stem {stem}": (built(name, stem=stem), say) for name, stem, say in STEMS},
    "published weights for cifar/vit": (
        built("cifar/vit", pretrained=True),
        r"no published weights; set model\.weights",
    ),
    "more frozen stages than a VGG has": (
        lambda: freeze_stages(build_backbone("timm/vgg11_bn", args={"mlp_ratio": 0.01}), 6),
        r"model\.freeze_at 6 must be at most 5",
    ),
    "frozen norms in a ViT": (
        lambda: set_norm(backbone("timm/test_vit"), "frozen"),
        r"model\.norm: frozen needs BatchNorms.*none",
    ),
    "stochastic depth in a VGG": (
        lambda: set_drop_path(backbone("timm/vgg11").model, 0.1, "linear"),
        r"model\.backbone\.drop_path is for timm's models with residual branches",
    ),
    **{
        f"{kind} on {name} with {args}": (detector_on(kind, name, args), match)
        for kind, name, args, match in DETECTORS
    },
    "torchvision_fpn with one level": (
        lambda: detector(num_levels=1),
        r"num_levels: 1; .*\[2, 4, 8",
    ),
    "torchvision_fpn with six levels": (lambda: detector(num_levels=6), "num_levels: 6; "),
    "a pool size that fc6 cannot read": (
        lambda: detector("torchvision_c5", box={"pool_size": 14}),
        r"^box\.pool_size: 14 gives fc6 512 x 14\^2 inputs",
    ),
    "an unknown rpn option": (rpn(nms_io=0.5), r"^rpn\.nms_io: unknown\. Did you mean 'nms_iou'\?"),
    "an IoU above 1": (rpn(nms_iou=1.5), r"^rpn\.nms_iou: .*less than or equal to 1, got 1\.5"),
    "a number of proposals that is a float": (rpn(post_nms_test=10.0), r"^rpn\.post.*: .*integer"),
    "no anchor scales": (rpn(anchor_scales=[]), r"^rpn\.anchor_scales: .*at least 1"),
    "a negative ratio": (rpn(anchor_ratios=[1.0, -1.0]), r"^rpn\.anchor_ratios\.1: .*than 0"),
    "an infinite size": (rpn(min_size_px=float("inf")), r"^rpn\.min_size_px: .*finite"),
    "background above objects": (rpn(bg_iou=0.8), r"bg_iou 0\.8 must not exceed fg_iou 0\.7"),
    "an unknown pooler": (box(pooler="roi_crop"), r"^box\.pooler: .*'roi_align' or 'roi_pool'"),
    "one standard deviation of four": (box(box_std=[0.1]), r"^box\.box_std: .*at least 4"),
    "a background range above objects": (
        box(bg_iou=[0.1, 0.6]),
        r"\[0\.1, 0\.6\) must be a range below fg_iou 0\.5",
    ),
    "a word for a boolean": (box(class_agnostic="no"), r"^box\.class_agnostic: .*boolean"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name, refused):
    make, match = BAD[name]
    with refused(name, ValueError, match=match):
        make()


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_backbone_names_the_nearest(name):
    with pytest.raises(KeyError) as error:
        build_backbone(name)
    assert UNKNOWN[name] in error.value.args[0]
