"""Stochastic depth: timm's own where it is linear, DeiT III's where it is constant."""

import pytest
import timm
import torch
from timm.layers import DropPath

from tract_transfer.build.model import build_features, build_model
from tract_transfer.config.schema import ConfigError
from tract_transfer.models import build_backbone
from tract_transfer.models.freeze import set_drop_path

MODELS = {
    "deit3_small_patch16_224": {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 32},
    "resnet18": {"channels": [8, 8, 8, 8]},
    "convnext_atto": {"depths": [1, 1, 2, 1]},
    "swin_tiny_patch4_window7_224": {"depths": [1, 1, 2, 1], "img_size": 64, "window_size": 2},
}
VIT = "model.backbone={name: cifar/vit, args: {depth: 3, width: 48, num_heads: 3}"


def rates_of(model):
    return {name: p.drop_prob for name, p in model.named_modules() if isinstance(p, DropPath)}


@pytest.mark.parametrize("name", MODELS)
def test_linear_is_timm_s_own(name):
    expected = rates_of(timm.create_model(name, drop_path_rate=0.3, **MODELS[name]))
    model = timm.create_model(name, drop_path_rate=0.0, **MODELS[name])
    assert rates_of(model) == {}
    set_drop_path(model, 0.3, "linear")
    assert rates_of(model) == pytest.approx(expected, abs=1e-6)
    assert len(expected) > 3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("given", [{}, {"drop_path_rate": 0.3}])
def test_constant_is_every_block_s_rate(name, given):
    model = timm.create_model(name, **MODELS[name], **given)
    linear = timm.create_model(name, drop_path_rate=0.3, **MODELS[name])
    set_drop_path(model, 0.1, "constant")
    rates = rates_of(model)
    assert set(rates.values()) == {0.1}
    assert rates.keys() > rates_of(linear).keys()  # timm leaves the first block out


def test_it_drops_in_training_alone_and_whole_branches():
    torch.manual_seed(0)
    args = {"depth": 3, "width": 48, "num_heads": 3}
    backbone = build_backbone("cifar/vit", args=args)
    images = torch.rand(1, 3, 32, 32)
    plain = backbone.eval().pooled(images)
    set_drop_path(backbone.model, 0.5, "constant")
    torch.testing.assert_close(backbone.pooled(images), plain)
    backbone.train()
    with torch.no_grad():
        found = {backbone.pooled(images)[0, 0].item() for _ in range(60)}
    assert 10 < len(found) <= 2**6  # six branches, each there or not


def test_a_config_s_rate_reaches_the_model(tmp_path, load_tiny):
    words = VIT + ", drop_path: {rate: 0.2, mode: constant}}"
    model = build_model(load_tiny(tmp_path, words, "data.transforms.size_px=32"), 3)
    assert list(rates_of(model).values()) == [0.2] * 6
    assert model.backbone.origin["args"] == {"depth": 3, "width": 48, "num_heads": 3}


@pytest.mark.parametrize(
    ("task", "words", "says"),
    [
        ("classification", "model.backbone={name: torchvision/resnet18, "
            "drop_path: {rate: 0.1, mode: linear}}", "model.backbone.drop_path: is for timm's"),
        ("classification", "model.backbone={name: timm/vgg11, "
            "drop_path: {rate: 0.1, mode: linear}}", "model.backbone.drop_path: is for timm's"),
        ("classification", VIT + ", drop_path: {rate: 0.1}}", "drop_path.mode: required"),
        ("classification", VIT + ", drop_path: {rate: 1.0, mode: linear}}", "drop_path.rate: "),
        ("classification", "model.backbone={name: timm/resnet18, args: {drop_path_rate: 0.1}, "
            "drop_path: {rate: 0.1, mode: linear}}", "give one of model.backbone.drop_path and"),
        ("probe", VIT + ", drop_path: {rate: 0.1, mode: linear}}",
            "model.backbone.drop_path has no use here: a probe trains no backbone"),
    ],
)  # fmt: skip
def test_what_cannot_drop_is_refused(tmp_path, load_tiny, task, words, says):
    with pytest.raises(ConfigError) as error:
        build_features(load_tiny(tmp_path, words, "data.transforms.size_px=32", task=task))
    assert says in str(error.value)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode must be constant or linear, got 'cubic'"):
        set_drop_path(timm.create_model("resnet18"), 0.1, "cubic")
