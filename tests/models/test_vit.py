"""Plain ViTs as backbones of detectors."""

import pytest
import torch
from small_detectors import detector, losses_of

from tract_transfer.models import build_backbone
from tract_transfer.models.detection.detectors import accept_any_size


@pytest.mark.parametrize(
    "name, args, strides",
    [
        ("timm/test_vit", {}, [4, 8, 16, 32, 64]),
        ("cifar/vit", {"depth": 1, "width": 48}, [1, 2, 4, 8, 16]),
        ("timm/vit_tiny_patch16_224", {"depth": 1, "dynamic_img_size": True}, [4, 8, 16, 32, 64]),
    ],
)
def test_a_vit_sees_any_size_on_a_pyramid_around_its_patches(name, args, strides):
    backbone = build_backbone(name, args=args)
    names = list(backbone.state_dict())
    model = detector("torchvision_vitdet", backbone=backbone)
    assert model.rpn.strides == strides
    assert list(backbone.state_dict()) == names
    seen = []
    model.rpn.head.register_forward_pre_hook(lambda _module, inputs: seen.extend(inputs[0]))
    losses_of(model)
    # Images of 64x96 and 80x64, padded to a multiple of the second-coarsest stride.
    height, width = (-(-side // strides[-2]) * strides[-2] for side in (80, 96))
    assert [tuple(each.shape[2:]) for each in seen] == [
        (-(-height // stride), -(-width // stride)) for stride in strides
    ]


def test_at_its_own_size_a_freed_vit_is_the_same():
    backbone = build_backbone("cifar/vit", args={"depth": 2, "width": 48}).eval()
    size = backbone.image_size_px
    images = torch.rand(1, 3, size, size)
    (name,) = backbone.pyramid()
    before, pooled = backbone.maps(images, [name])[name], backbone.pooled(images)
    accept_any_size(backbone)
    assert backbone.image_size_px is None
    torch.testing.assert_close(backbone.maps(images, [name])[name], before)
    torch.testing.assert_close(backbone.pooled(images), pooled)


@pytest.mark.parametrize(
    "name, args, says",
    [
        ("timm/test_resnet", {}, r"maps of one stride.*\[2, 4, 8, 16, 32\].*torchvision_fpn"),
        (
            "timm/vit_tiny_patch16_224",
            {"img_size": 56, "depth": 1, "patch_size": 14, "embed_dim": 48},
            r"that 4 divides.*\[14\]",
        ),
    ],
)
def test_what_is_no_plain_vit_is_refused(name, args, says, refused):
    with refused(f"torchvision_vitdet on {name}", ValueError, match=says):
        detector("torchvision_vitdet", backbone=build_backbone(name, args=args))
