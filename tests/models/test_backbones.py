"""The contract of a backbone, for models of every source."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from tract_transfer.models import Backbone, build_backbone
from tract_transfer.models.cifar import CIFAR_MEAN, CIFAR_STD
from tract_transfer.registry import load_plugins

load_plugins(["paper/cifar_zoo.py"])
SMALL = {
    "cifar/resnet18": {"width": 16},
    "cifar/vit": {"depth": 1, "width": 48},
    "cifar/squeezenet": {},
    "cifar/shufflenet": {},
    "cifar/nasnet": {"depth": 1, "width": 8},
    "cifar/wideresnet": {"layers": (1, 1, 1), "channels": (16, 16, 16)},
    "timm/test_resnet": {},
    "timm/test_vit": {},
    "timm/test_convnext": {},
    "timm/test_efficientnet": {},
    "timm/mobilenetv3_small_050": {},
    "timm/lcnet_035": {},
    "timm/regnetx_002": {},
    "torchvision/mobilenet_v3_small": {},
    "torchvision/squeezenet1_1": {},
    "torchvision/shufflenet_v2_x0_5": {},
    "torchvision/mnasnet0_5": {},
    "torchvision/swin_t": {},
}


@pytest.fixture(scope="module", params=SMALL)
def backbone(request) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(request.param, args=SMALL[request.param]).eval()


def some_images(backbone: Backbone) -> torch.Tensor:
    size = [backbone.image_size_px] * 2 if backbone.image_size_px else [64, 96]
    return torch.randint(256, (2, 3, *size), dtype=torch.uint8)


@torch.no_grad()
def test_maps_have_the_documented_channels_and_strides(backbone):
    images = some_images(backbone)
    names = list(backbone.map_info)
    maps = backbone.maps(images, names)
    assert list(maps) == names
    without_padding = backbone.origin["name"] == "torchvision/squeezenet1_1"
    for name, (channels, stride) in backbone.map_info.items():
        sizes = [size / stride for size in images.shape[-2:]]
        assert maps[name].shape[:2] == (2, channels)
        for size, expected in zip(maps[name].shape[-2:], sizes, strict=True):
            assert size == expected if not without_padding else expected - 2 < size <= expected
    strides = [info.stride for info in backbone.pyramid().values()]
    assert strides == sorted(set(strides))
    last = names[-2:][::-1]
    chosen = backbone.maps(images, last)
    assert list(chosen) == last
    assert all(torch.equal(chosen[name], maps[name]) for name in last)


@torch.no_grad()
def test_uint8_and_float_images_have_the_same_features(backbone):
    images = some_images(backbone)
    features = backbone.pooled(images)
    assert features.shape == (2, backbone.feature_dim)
    torch.testing.assert_close(features, backbone.pooled(images.float() / 255))
    assert images.dtype == torch.uint8


@torch.no_grad()
def test_one_state_dict_serves_features_and_maps(backbone):
    rebuilt = build_backbone(**backbone.origin).eval()
    names = list(rebuilt.map_info)
    rebuilt.load_state_dict(backbone.state_dict())
    images = some_images(backbone)
    assert torch.equal(rebuilt.pooled(images), backbone.pooled(images))
    first, second = backbone.maps(images, names), rebuilt.maps(images, names)
    assert all(torch.equal(first[name], second[name]) for name in names)


def test_first_layer_reads_the_normalized_image_and_is_trained(backbone):
    (name,) = backbone.first_layers
    layer, inputs = backbone.get_submodule(name), []
    handle = layer.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    images = some_images(backbone)
    backbone.zero_grad()
    backbone.pooled(images).square().sum().backward()
    handle.remove()
    assert torch.equal(inputs[0], backbone.normalize(images))
    assert layer.weight.grad.isfinite().all()
    backbone.zero_grad()


def test_normalization_is_part_of_the_state_dict():
    first, second = (build_backbone("cifar/vit", args={"depth": 1}) for _ in range(2))
    torch.testing.assert_close(first.mean.flatten(), torch.tensor(CIFAR_MEAN))
    torch.testing.assert_close(first.std.flatten(), torch.tensor(CIFAR_STD))
    first.set_normalization(mean=[0.1, 0.2, 0.3])
    torch.testing.assert_close(first.std.flatten(), torch.tensor(CIFAR_STD))
    first.set_normalization(std=[1, 0.5, 2])
    second.load_state_dict(first.state_dict())
    image = torch.rand(3, 4, 4)
    expected = torch.stack([(image[0] - 0.1) / 1, (image[1] - 0.2) / 0.5, (image[2] - 0.3) / 2])
    torch.testing.assert_close(second.normalize(image), expected)
    config = timm.get_pretrained_cfg("test_vit")
    of_timm = build_backbone("timm/test_vit").mean.flatten().tolist()
    assert tuple(of_timm) == pytest.approx(config.mean)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_pretrained_inception_is_rebuilt_from_its_origin(name, monkeypatch):
    """Its weights expect [-1, 1]; a backbone rebuilt without them must normalize the same."""
    kwargs = {"init_weights": False, "aux_logits": True}
    published = torchvision.models.get_model(name, **kwargs).eval()
    monkeypatch.setattr(
        "torchvision.models._api.WeightsEnum.get_state_dict",
        lambda *_, **__: published.state_dict(),
    )
    backbone = build_backbone(f"torchvision/{name}", pretrained=True).eval()
    rebuilt = build_backbone(**backbone.origin).eval()
    rebuilt.load_state_dict(backbone.state_dict())
    images = torch.rand(2, 3, 96, 96)
    published.fc, published.transform_input = nn.Identity(), True
    with torch.no_grad():
        features = backbone.pooled(images)
        assert torch.equal(features, rebuilt.pooled(images))
        expected = published(build_backbone("torchvision/resnet18").normalize(images))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert backbone.train().pooled(images).shape == (2, backbone.feature_dim)


def test_measuring_the_maps_changes_no_mode_statistic_or_random_state():
    backbone = build_backbone("cifar/resnet18", args={"width": 8}).train()
    backbone.model.bn1.eval()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    modes = [module.training for module in backbone.modules()]
    state = torch.get_rng_state()
    assert backbone.map_info is backbone.map_info
    assert [module.training for module in backbone.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    after = backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_stride_need_not_be_a_power_of_two():
    args = {"img_size": 56, "depth": 1, "patch_size": 14, "embed_dim": 48}
    backbone = build_backbone("timm/vit_tiny_patch16_224", args=args)
    assert [info.stride for info in backbone.map_info.values()] == [14]


def test_vit_of_dynamic_size_has_no_fixed_size():
    fixed, free = (
        build_backbone("timm/vit_tiny_patch16_224", args={"depth": 1, "dynamic_img_size": dynamic})
        for dynamic in (False, True)
    )
    assert (fixed.image_size_px, free.image_size_px) == (224, None)
    assert free.pooled(torch.rand(1, 3, 32, 64)).shape == (1, 192)


def test_several_maps_of_one_module_have_different_names():
    with torch.device("meta"):
        info = build_backbone("timm/coat_tiny").map_info
    assert [stride for _, stride in info.values()] == [4, 8, 16, 32]
