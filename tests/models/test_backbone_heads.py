"""Box heads that are the backbone's own: a ResNet's fourth stage, a VGG's fc6 and fc7."""

import pytest
import torch
from small_detectors import detector, losses_of
from torch import nn
from torchvision.models import vgg11

from tract_transfer.models import build_backbone
from tract_transfer.models.freeze import set_norm
from tract_transfer.models.weights import load_weights


@pytest.mark.parametrize("kind", ["torchvision_c4", "torchvision_c5"])
def test_the_box_head_is_the_backbone_s_and_stays_there(kind):
    plain, model = detector(kind).backbone, detector(kind)
    last = {"torchvision_c4": "layer4.", "torchvision_c5": "pre_logits."}[kind]
    assert list(model.backbone.state_dict()) == list(plain.state_dict())
    assert not any(last in name for name in model.roi_heads.state_dict())
    sum(losses_of(model).values()).backward()
    assert all(p.grad is not None for n, p in model.backbone.named_parameters() if last in n)


@pytest.mark.parametrize("name", ["cifar/resnet18", "torchvision/resnet18"])
def test_the_fourth_stage_sees_proposals_alone(name):
    """Its BatchNorms would else mix the statistics of whole images into those of proposals."""
    args = {"width": 8} if name == "cifar/resnet18" else {}
    model = detector("torchvision_c4", backbone=build_backbone(name, args=args))
    seen = []
    model.backbone.model.layer4.register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0])
    )
    losses_of(model)
    assert [len(each) for each in seen] == [2 * 16]
    assert seen[0].shape[2:] == (14, 14)


def test_the_extra_norm_is_normal_and_synchronised_where_the_others_are():
    assert isinstance(detector("torchvision_c4").roi_heads.box_head.norm, nn.Identity)
    model = detector("torchvision_c4", extra_norm=True)
    norm = model.roi_heads.box_head.norm
    assert type(norm) is nn.BatchNorm2d
    seen = []
    norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    losses_of(model)
    torch.testing.assert_close(seen[0].mean((0, 2, 3)), torch.zeros(64), rtol=0, atol=1e-5)
    synced = set_norm(build_backbone("cifar/resnet18", args={"width": 8}), "synced")
    model = detector("torchvision_c4", backbone=synced, extra_norm=True)
    assert isinstance(model.roi_heads.box_head.norm, nn.SyncBatchNorm)


@torch.no_grad()
def test_a_vgg_s_box_head_is_its_classifier():
    """An image of 7 x 7 cells, pooled to itself, is classified as by the VGG."""
    images = torch.rand(2, 3, 224, 224)
    for name, args in (("timm/vgg11", {"mlp_ratio": 0.01}), ("torchvision/vgg11", {})):
        backbone = build_backbone(name, args=args).eval()
        model = detector("torchvision_c5", backbone=backbone).eval()
        assert model.map_names == ["features.19"]
        assert model.rpn.strides == [16]
        pooled = backbone.model.features(backbone.normalize(images))
        torch.testing.assert_close(model.roi_heads.box_head(pooled), backbone.pooled(images))


def test_dropout_is_in_training_alone():
    pooled = torch.rand(2, 512, 7, 7)
    for dropout, differs in ((0.5, True), (0.0, False)):
        head = detector("torchvision_c5", dropout=dropout).roi_heads.box_head
        assert torch.equal(head.eval()(pooled), head(pooled))
        assert (not torch.equal(head.train()(pooled), head(pooled))) == differs
    with pytest.raises(ValueError, match=r"^dropout: must lie in \[0, 1\), got 1\.0"):
        detector("torchvision_c5", dropout=1.0)


def test_a_vgg_without_its_classifier_s_weights_is_refused(tmp_path):
    state = {n: t for n, t in vgg11().state_dict().items() if not n.startswith("classifier")}
    torch.save(state, tmp_path / "features.pth")
    with torch.device("meta"):
        backbone = build_backbone("torchvision/vgg11")
    with pytest.raises(ValueError, match=r"does not fit.*Missing classifier\.0\.weight"):
        load_weights(backbone, tmp_path / "features.pth")


@pytest.mark.parametrize(
    "kind, name, says",
    [
        ("torchvision_c4", "timm/test_vit", r"needs a ResNet.*layer4.*VisionTransformer"),
        ("torchvision_c4", "timm/vgg11", r"needs a ResNet.*layer4.*VGG"),
        ("torchvision_c5", "timm/test_resnet", r"needs a VGG.*fc6 and fc7.*ResNet"),
    ],
)
def test_a_backbone_without_such_layers_is_refused(kind, name, says, refused):
    with torch.device("meta"):
        backbone = build_backbone(name)
    with refused(f"{kind} on {name}", ValueError, match=says):
        detector(kind, backbone=backbone)


def test_a_pool_that_fc6_cannot_read_is_refused():
    with pytest.raises(ValueError, match=r"^box\.pool_size: 14 gives fc6 512 x 14\^2 inputs"):
        detector("torchvision_c5", box={"pool_size": 14})
